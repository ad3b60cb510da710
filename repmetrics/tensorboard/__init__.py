"""What the TensorBoard board shows, and opening it."""
