"""A (seed, index) pair as a uint8 patch; no Lightning."""
