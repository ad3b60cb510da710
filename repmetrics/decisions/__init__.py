"""Pure decision rules over measurements: no input or output."""
