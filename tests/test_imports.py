"""The folder order and the folder rules of docs/architecture.md, read from the source of every module with ``ast``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

# Bottom up: a folder or file imports only itself and those listed before it.
ORDER = {
    "repmetrics": [
        "atomic_write", "file_lock", "progress", "executor", "functional", "measurement", "metrics", "encoders", "data",
        "probes", "decisions", "monitoring", "tensorboard", "callbacks", "integrations", "scoring", "report", "trust",
        "cli_options", "cli_errors", "cli_scoring", "cli", "__init__", "__main__",
    ],
    "fmtrain": [
        "__init__", "rng", "version", "domains", "stop_signals", "slides", "manifest", "patches", "methods", "training",
        "evaluation", "export", "sweeps", "demo", "cli", "__main__",
    ],
}  # fmt: skip

LIGHTNING = ["lightning", "pytorch_lightning"]
TORCH = ["torch", *LIGHTNING]
FILES = ["tempfile", "shutil", "csv", "json", "pickle", "subprocess", "pathlib", "os"]

# A module or a folder → packages that nothing in it imports.
FORBIDDEN = {
    "repmetrics": ["fmtrain"],
    "repmetrics.functional": [*LIGHTNING, "timm", "torchmetrics", "tensorboard"],
    "repmetrics.measurement": [*LIGHTNING, "timm", "torchmetrics", "tensorboard"],
    "repmetrics.monitoring": LIGHTNING,
    "repmetrics.decisions": [*LIGHTNING, *FILES],
    "fmtrain.slides": TORCH,
    "fmtrain.manifest": TORCH,
    "fmtrain.patches": LIGHTNING,
    "fmtrain.patches.sampling": TORCH,
    "fmtrain.patches.planner": TORCH,
    "fmtrain.patches.slide_pool": TORCH,
    "fmtrain.methods.masking": TORCH,
    "fmtrain.methods.losses": LIGHTNING,
}

# What may import the root of its own package, whose public names live in the folders above it.
VERSION = "repmetrics.__version__"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports_of(source: str) -> set[str]:
    """Every module a source imports, anywhere in it."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
    return imported


def place(module: str) -> int:
    """Position of a module's folder in its package's order.

    Raises:
        ValueError: the folder has no place in the order.
    """
    package, *rest = module.split(".")
    return ORDER[package].index(rest[0] if rest else "__init__")


def violations(module: str, source: str) -> list[str]:
    """Rules that this module's imports break, in words."""
    imported = imports_of(source)
    bad = [
        f"{module} imports {name}"
        for package, forbidden in FORBIDDEN.items()
        if within(module, package)
        for name in sorted(imported)
        if any(within(name, other) for other in forbidden)
    ]
    own = module.split(".")[0]
    for name in sorted(imported - {VERSION}):
        if within(name, own):
            below = name if name.split(".")[1] in ORDER[own] else own
            bad += [f"{module} imports {name} upward"] * (place(below) > place(module))
    return bad


def modules() -> dict[str, str]:
    files = [p for package in ORDER for p in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    return {name: path.read_text() for name, path in zip(names, files, strict=True)}


def cycle(sources: dict[str, str]) -> list[str]:
    """Modules that import one another in a circle; empty where there is none. A package root stands for no file."""
    graph = {
        module: {
            target
            for name in imports_of(source)
            for target in [name if name in sources else name.rpartition(".")[0]]
            if target in sources and target != module and target.count(".")
        }
        for module, source in sources.items()
        if module.count(".")
    }
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    return sorted(graph)


def test_every_module_follows_the_order_and_the_rules() -> None:
    assert [v for name, source in modules().items() for v in violations(name, source)] == []


def test_every_folder_and_file_has_a_place() -> None:
    for package, order in ORDER.items():
        entries = [p for p in (ROOT / package).iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
        assert sorted(p.stem for p in entries) == sorted(order)


def test_no_modules_import_one_another() -> None:
    assert cycle(modules()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("repmetrics.scoring.tables", "import fmtrain.slides"),
        ("repmetrics.measurement.moments", "from repmetrics.metrics import RankMe"),
        ("repmetrics.functional.spectrum", "from repmetrics import measurement"),
        ("repmetrics.functional.spectrum", "from repmetrics import RankMe"),
        ("repmetrics.functional.spectrum", "def f():\n    import lightning.pytorch"),
        ("repmetrics.measurement.measure", "import torchmetrics"),
        ("repmetrics.encoders.checkpoint", "from repmetrics.data.images import ImageFolder"),
        ("repmetrics.atomic_write", "import repmetrics.functional"),
        ("repmetrics.monitoring.monitor", "from lightning.pytorch import Trainer"),
        ("repmetrics.monitoring.record", "from repmetrics.callbacks.base import Callback"),
        ("repmetrics.decisions.alarms", "from pathlib import Path"),
        ("repmetrics.trust.runs", "from repmetrics.cli import main"),
        ("fmtrain.slides.tissue", "import torch.nn"),
        ("fmtrain.slides.slide", "from fmtrain.manifest.scan import Job"),
        ("fmtrain.manifest.split", "from torch import Tensor"),
        ("fmtrain.manifest.build", "from fmtrain.patches import loader"),
        ("fmtrain.patches.sampling", "import torch"),
        ("fmtrain.patches.planner", "import torch"),
        ("fmtrain.patches.slide_pool", "import torch"),
        ("fmtrain.patches.dataset", "import pytorch_lightning"),
        ("fmtrain.methods.masking", "import torch"),
        ("fmtrain.methods.losses", "from lightning import LightningModule"),
        ("fmtrain.methods.dino", "from fmtrain.training.config import FitCLI"),
        ("fmtrain.rng", "from fmtrain.version import code"),
        ("fmtrain.evaluation.tasks", "from fmtrain.sweeps import study"),
    ],
)
def test_a_planted_bad_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


def test_a_planted_circle_is_found() -> None:
    planted = {
        "repmetrics.data.a": "from repmetrics.data.b import f",
        "repmetrics.data.b": "def f():\n    from repmetrics.data import c",
        "repmetrics.data.c": "import repmetrics.data.a",
        "repmetrics.data.d": "import repmetrics.data.a",
        "repmetrics.data.e": "import torch",
    }
    assert cycle(planted) == ["repmetrics.data.a", "repmetrics.data.b", "repmetrics.data.c", "repmetrics.data.d"]


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning", "timm", "tensorboard", "openslide", "fmtrain"])
def test_import_repmetrics_is_light(package: str) -> None:
    code = f"import repmetrics, sys; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("repmetrics.measurement.result", {"torch"}),
        ("repmetrics.scoring.score", {"timm", "safetensors", "huggingface_hub"}),
    ],
)
def test_annotations_import_no_packages(module: str, packages: set[str]) -> None:
    code = f"import {module}, sys; sys.exit(bool({packages!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists() -> None:
    import repmetrics

    assert all(getattr(repmetrics, name) is not None for name in repmetrics.__all__)


def test_functional_exports_the_table_of_metrics() -> None:
    from repmetrics import functional
    from repmetrics.measurement.registry import METRICS

    assert {name: getattr(functional, name) for name in functional.__all__} == {
        name: metric.function.function for name, metric in METRICS.items()
    }


def test_the_architecture_page_names_every_file() -> None:
    page = Path(ROOT / "docs" / "architecture.md").read_text()
    names = {name.split(".")[-1] for name in modules() if name.count(".")}
    assert {
        name for name in names if not any(f"`{form}`" in page for form in (name, f"{name}.py", f"{name}/"))
    } == set()
