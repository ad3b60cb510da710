"""A checkpoint measured on labelled tasks."""
