"""Held-out samples as batches, and batches through an encoder as features."""
