"""A checkpoint file or a module as a callable from images to features."""
