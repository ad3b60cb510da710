"""A checkpoint exported for timm and for eva."""
