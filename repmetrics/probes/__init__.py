"""Probes: how well labels can be read from frozen features."""
