"""Public names are typed for users: a script checked by ``mypy --strict``, and access to submodules at run time."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from paths import ROOT

# Statement of a user's script → what mypy prints for its line, or None for nothing.
STATEMENTS = {
    "import torch": None,
    "import repmetrics": None,
    "x = torch.randn(8, 4)": None,
    "repmetrics.measure(x, metrics=['rankme'])['rankme'].standard_error": None,
    "repmetrics.RepresentationMonitor([], encoder='backbone')": None,
    "monitor = repmetrics.RepresentationMonitor([], encoder='backbone', every_n_steps=20)": None,
    "keep = repmetrics.LocalMaximaCheckpoint(metric='rankme')": None,
    "import lightning": None,
    "lightning.Trainer(callbacks=[monitor, keep])": None,
    "metric = repmetrics.metrics.RankMe(4)": None,
    "metric.update(x)": None,
    "float(metric.compute()) + float(repmetrics.functional.odcorr(x))": None,
    "encoder = repmetrics.load_encoder('a.ckpt')": None,
    "plain = repmetrics.Monitor(metrics=['rankme'])": None,
    "record = plain.measure(torch.nn.Identity(), [x], step=0)": None,
    "format(record.measurements['rankme'], '.2f') if record else None": None,
    "plain.history.plot('rankme').savefig('a.png')": None,
    "reveal_type(repmetrics.measure(x))": '"dict[str, repmetrics.measurement.result.Measurement]"',
    "reveal_type(repmetrics.functional.rankme(x))": '"torch._tensor.Tensor"',
    "reveal_type(repmetrics.metrics.RankMe(4))": '"repmetrics.metrics.RankMe"',
    "reveal_type(repmetrics.Monitor)": "-> repmetrics.monitoring.monitor.Monitor",
    "repmetrics.measure(x, metrcs=['rankme'])": 'Unexpected keyword argument "metrcs"',
    "repmetrics.RepresentationMonitor([], encodr='x')": 'Unexpected keyword argument "encodr"',
    "repmetrics.mesure(x)": 'Module has no attribute "mesure"',
}


@pytest.mark.slow
def test_mypy_sees_the_types_of_public_names(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("\n".join(STATEMENTS))
    # The project's settings are strict. Other settings than those of the cache would check everything again.
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *options, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    for number, (statement, expected) in enumerate(STATEMENTS.items(), start=1):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"user.py:{number}:")]
        assert any(expected in line for line in lines) if expected else not lines, (statement, done.stdout, done.stderr)
    assert "Found 3 errors in 1 file" in done.stdout


@pytest.mark.parametrize("name", ["functional.rankme", "metrics.RankMe"])
def test_submodules_need_no_import(name: str) -> None:
    assert subprocess.run([sys.executable, "-c", f"import repmetrics; repmetrics.{name}"], check=False).returncode == 0


PUBLIC = ("repmetrics", "repmetrics.functional", "repmetrics.callbacks", "repmetrics.probes", "fmtrain.methods")
OPTIONAL = {"History.plot", "History.plot_spectrum"}
"""Functions that return objects of matplotlib, which is imported when they are called."""


def public_functions(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A function, or a class with its constructor and public methods, by name; none for other values."""
    if inspect.isclass(value):
        yield name, value
        for key, member in inspect.getmembers(value):
            method = inspect.unwrap(getattr(member, "__func__", None) or getattr(member, "fget", None) or member)
            ours = inspect.isfunction(method) and method.__module__.partition(".")[0] in ("repmetrics", "fmtrain")
            if ours and (key == "__init__" or not key.startswith("_")):
                yield f"{name}.{key}", method
    elif inspect.isfunction(value):
        yield name, value


@pytest.mark.parametrize("module", PUBLIC)
def test_annotations_of_public_names_can_be_resolved(module: str) -> None:
    package = import_module(module)
    functions = dict(pair for name in package.__all__ for pair in public_functions(name, getattr(package, name)))
    assert functions
    for name, function in functions.items():
        if name not in OPTIONAL:
            assert isinstance(get_type_hints(function), dict), name


def test_the_annotations_name_the_classes() -> None:
    from repmetrics import Measurement, RepresentationMonitor, score
    from repmetrics.encoders.encoder import Encoder, IdentifiedEncoder
    from repmetrics.measurement.blocks import Blocks

    assert get_type_hints(Measurement)["blocks"] == Blocks | None
    assert get_type_hints(score)["encoder"] == Encoder | IdentifiedEncoder | None
    assert get_type_hints(RepresentationMonitor.setup)["trainer"].__name__ == "Trainer"
