"""Many variants, one model, one ratio, one protocol."""
