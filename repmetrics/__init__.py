"""repmetrics: the instrument panel for self-supervised training.

The public names are loaded on first use, so that ``import repmetrics`` pulls in neither lightning nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "KeepLocalMaxima": "repmetrics.callbacks.early_stopping",
    "METRICS": "repmetrics.measurement.registry",
    "Measurement": "repmetrics.measurement.measure",
    "Moments": "repmetrics.measurement.moments",
    "Monitor": "repmetrics.monitoring.monitor",
    "RepresentationMonitor": "repmetrics.callbacks.representation_monitor",
    "RepresentationStopping": "repmetrics.callbacks.early_stopping",
    "embed": "repmetrics.data.features",
    "load_encoder": "repmetrics.encoders.checkpoint",
    "measure": "repmetrics.measurement.measure",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'repmetrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
