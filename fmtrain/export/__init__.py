"""Export of a checkpoint for timm and for eva."""
