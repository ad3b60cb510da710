"""One evaluation of a model in training, and its record; no Lightning."""

MEASUREMENTS = "measurements.jsonl"
"""Name of the file to which a run appends its records."""
