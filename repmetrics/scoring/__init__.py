"""Everything behind `score`, `compare` and `select`."""
