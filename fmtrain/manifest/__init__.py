"""A folder of slides as a frozen split; no torch."""
