"""A metric's value with its standard error."""
