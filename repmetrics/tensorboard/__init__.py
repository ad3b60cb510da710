"""TensorBoard's charts and summaries of a run, and the server that shows them."""
