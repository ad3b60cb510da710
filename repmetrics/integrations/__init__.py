"""The monitor in the training loops of other libraries."""
