"""What pruning would give and take, by count, from a config alone."""
