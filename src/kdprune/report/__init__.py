"""What a run found, for people: results.json, page, tables and model card. Never imports torch."""
