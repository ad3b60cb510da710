"""Evaluation of a checkpoint on labeled tasks."""
