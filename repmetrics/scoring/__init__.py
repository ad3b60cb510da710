"""Scoring of checkpoints and embeddings: everything behind `score`, `compare` and `select`."""
