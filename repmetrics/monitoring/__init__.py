"""One evaluation of a model in training, and its record; no Lightning."""
