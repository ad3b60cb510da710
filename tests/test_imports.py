"""The import rules of docs/architecture.md, read from the source with ``ast``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Later names may import earlier ones, never the other way round.
RIVER = [
    "repmetrics.functional",
    "repmetrics.moments",
    "repmetrics.measurement",
    "repmetrics.metrics",
    "repmetrics.monitor",
    "repmetrics.cli",
]

FORBIDDEN = {
    "repmetrics": ["fmtrain"],
    "repmetrics.functional": ["lightning", "pytorch_lightning", "timm", "torchmetrics", "tensorboard"],
    "repmetrics.moments": ["lightning", "pytorch_lightning", "timm", "torchmetrics", "tensorboard"],
    **{
        f"fmtrain.{room}": ["torch", "lightning"]
        for room in (
            "slides",
            "tiles",
            "tissue",
            "sampling",
            "scan",
            "split",
            "manifest",
            "plans",
            "handles",
            "masking",
        )
    },
    "fmtrain.losses": ["lightning", "pytorch_lightning"],
}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports_of(source: str) -> set[str]:
    """Every module a source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


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
    place = next((i for i, room in enumerate(RIVER) if within(module, room)), None)
    if place is not None:
        downstream = RIVER[place + 1 :]
        bad += [f"{module} imports {n}" for n in sorted(imported) if any(within(n, room) for room in downstream)]
    return bad


def modules() -> dict[str, str]:
    files = [p for package in ("repmetrics", "fmtrain") for p in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    return {name: path.read_text() for name, path in zip(names, files, strict=True)}


def test_imports_point_one_way() -> None:
    assert [v for name, source in modules().items() for v in violations(name, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("repmetrics.report", "import fmtrain.slides"),
        ("repmetrics.moments", "from repmetrics.measurement import measure"),
        ("repmetrics.functional.spectrum", "from repmetrics import moments"),
        ("repmetrics.functional.spectrum", "def f():\n    import lightning.pytorch"),
        ("fmtrain.sampling", "import torch.nn"),
        ("fmtrain.losses", "from lightning import LightningModule"),
    ],
)
def test_a_planted_bad_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning", "timm", "tensorboard", "openslide", "fmtrain"])
def test_import_repmetrics_is_light(package: str) -> None:
    code = f"import repmetrics, sys; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists() -> None:
    import repmetrics

    assert all(getattr(repmetrics, name) is not None for name in repmetrics.__all__)


def test_functional_exports_the_table_of_metrics() -> None:
    from repmetrics import functional
    from repmetrics.catalogue import METRICS

    assert {name: getattr(functional, name) for name in functional.__all__} == {
        name: metric.function for name, metric in METRICS.items()
    }


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = {name.split(".")[-1] for name in modules() if name.count(".")}
    assert {name for name in files if f"`{name}.py`" not in page and f"`{name}`" not in page} - {"functional"} == set()
