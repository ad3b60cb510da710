"""Lightning callbacks: wiring only."""

from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping
from repmetrics.callbacks.model_checkpoint import LocalMaximaCheckpoint
from repmetrics.callbacks.representation_monitor import RepresentationMonitor

__all__ = ["LocalMaximaCheckpoint", "RepresentationEarlyStopping", "RepresentationMonitor"]
