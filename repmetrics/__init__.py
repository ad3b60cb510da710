"""Label-free monitoring of self-supervised training.

Public names are imported on first use, so that ``import repmetrics`` loads neither torch nor Lightning nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repmetrics import functional as functional
    from repmetrics import metrics as metrics
    from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping as RepresentationEarlyStopping
    from repmetrics.callbacks.model_checkpoint import LocalMaximaCheckpoint as LocalMaximaCheckpoint
    from repmetrics.callbacks.representation_monitor import RepresentationMonitor as RepresentationMonitor
    from repmetrics.data.features import embed as embed
    from repmetrics.data.open import open_data as open_data
    from repmetrics.encoders.checkpoint import load_encoder as load_encoder
    from repmetrics.measurement.measure import measure as measure
    from repmetrics.measurement.moments import Moments as Moments
    from repmetrics.measurement.registry import METRICS as METRICS
    from repmetrics.measurement.result import Measurement as Measurement
    from repmetrics.measurement.result import difference as difference
    from repmetrics.monitoring.history import History as History
    from repmetrics.monitoring.monitor import Monitor as Monitor
    from repmetrics.monitoring.record import Record as Record
    from repmetrics.probes.knn import knn_probe as knn_probe
    from repmetrics.probes.linear import linear_probe as linear_probe
    from repmetrics.scoring.score import score as score

_MODULES = {
    "History": "monitoring.history",
    "LocalMaximaCheckpoint": "callbacks.model_checkpoint",
    "METRICS": "measurement.registry",
    "Measurement": "measurement.result",
    "Moments": "measurement.moments",
    "Monitor": "monitoring.monitor",
    "Record": "monitoring.record",
    "RepresentationEarlyStopping": "callbacks.early_stopping",
    "RepresentationMonitor": "callbacks.representation_monitor",
    "difference": "measurement.result",
    "embed": "data.features",
    "knn_probe": "probes.knn",
    "linear_probe": "probes.linear",
    "load_encoder": "encoders.checkpoint",
    "measure": "measurement.measure",
    "open_data": "data.open",
    "score": "scoring.score",
}

__all__ = ["__version__", "functional", "metrics", *sorted(_MODULES)]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name in ("functional", "metrics"):
            return import_module(f"repmetrics.{name}")
        if name in _MODULES:
            return getattr(import_module(f"repmetrics.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'repmetrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
