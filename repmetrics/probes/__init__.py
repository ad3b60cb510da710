"""Probes: how well labels can be read from frozen features."""

from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe

__all__ = ["knn_probe", "linear_probe"]
