"""Decision rules over measurements, as pure functions without input or output."""
