"""Faults that the tests must detect, each in a copy of the package.

    python tests/helpers/mutants.py [name ...]

A mutant is one replaced line, and the tests that must fail because of it. The tests run in a temporary copy of the
tree. The baseline, the same tests without the fault, must pass.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from paths import ROOT
from processes import Program


class Mutant(NamedTuple):
    """One fault: ``old``, which occurs once in ``file``, becomes ``new``; one of ``tests`` must then fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


RANKME = "return entropy(spectrum(features).singular_values, eps=eps).exp()"
BY_POSITION = "; index = torch.arange(len(index)) // (len(index) // len(names)) % len(names)"
ACCURACY = "functional/test_accuracy.py::test_rankme_of_float32_features_against_float64_svd"
OF_FORMULA = ("functional/test_spectrum.py::test_equals_the_formula",)

MUTANTS = {
    # The six faults that every test suite of these metrics must detect.
    "epsilon 1e-5": Mutant(
        "functional/spectrum.py", "*, eps: float = 0.0, compat", "*, eps: float = 1e-5, compat", OF_FORMULA
    ),
    "sigma squared": Mutant(
        "functional/spectrum.py", RANKME, RANKME.replace("singular_values", "eigenvalues"), OF_FORMULA
    ),
    "centered for not centered": Mutant(
        "functional/spectrum.py", RANKME, RANKME.replace("(features)", "(features, centered=True)"), OF_FORMULA
    ),
    "mean over the diagonal too": Mutant(
        "functional/correlation.py",
        "return (matrix.abs().sum() - matrix.diagonal().abs().sum()) / pairs",
        "return matrix.abs().mean()",
        ("functional/test_correlation.py::test_the_diagonal_is_left_out",),
    ),
    "float32 Gram": Mutant(
        "functional/linalg.py",
        'if precision == "block_float32":',
        "if True:",
        (ACCURACY + "[lambda k^-4-1e-06-(2048, 256)]",),
    ),
    "views by position": Mutant(
        "functional/multiview.py",
        "index, names = factorize(views)",
        "index, names = factorize(views)" + BY_POSITION,
        ("functional/test_multiview.py::test_ids_not_positions_group_the_rows",),
    ),
    # Further faults.
    "slides by position": Mutant(
        "functional/leakage.py",
        "index, names = factorize(groups)",
        "index, names = factorize(groups)" + BY_POSITION,
        ("functional/test_leakage.py::test_equals_the_formula",),
    ),
    "not centered for centered": Mutant(
        "functional/spectrum.py",
        "return entropy(spectrum(features, centered=True).singular_values).exp()",
        "return entropy(spectrum(features).singular_values).exp()",
        OF_FORMULA,
    ),
    "centering keeps N directions": Mutant(
        "functional/spectrum.py",
        "max(min(n - centered, d), 1)",
        "max(min(n, d), 1)",
        ("functional/test_spectrum.py::test_centered_spectrum_length",),
    ),
    "no floor": Mutant(
        "functional/spectrum.py",
        "below = top <= floor",
        "below = top < 0",
        ("functional/test_spectrum.py::test_floored_eigenvalues_are_counted",),
    ),
    "alpha without weights": Mutant(
        "functional/spectrum.py",
        "(1 / k) / (1 / k).sum()",
        "torch.ones_like(k) / len(k)",
        ("functional/test_spectrum.py::test_alpha_weighs_ranks_11_to_100_by_one_over_k",),
    ),
    "alpha from rank 1": Mutant(
        "functional/spectrum.py",
        "ALPHA_RANKS = (11, 100)",
        "ALPHA_RANKS = (1, 100)",
        ("functional/test_spectrum.py::test_alpha_weighs_ranks_11_to_100_by_one_over_k",),
    ),
    "biased participation ratio": Mutant(
        "functional/spectrum.py",
        "return (linear - sum_norm4) / (square - sum_norm4) if",
        "return linear / square if",
        ("functional/test_spectrum.py::test_the_unbiased_participation_ratio_equals_the_sum_over_distinct_pairs",),
    ),
    "asymptotic null floor": Mutant(
        "functional/correlation.py",
        "return math.exp(math.lgamma((n - 1) / 2) - math.lgamma(n / 2)) / math.sqrt(math.pi)",
        "return math.sqrt(2 / math.pi / n)",
        ("functional/test_correlation.py::test_null_floor_closed_form",),
    ),
    "constant features correlate": Mutant(
        "functional/correlation.py",
        "varies = variance > resolution(dtype) ** 2 * (variance + mean.square())",
        "varies = variance > 0",
        ("functional/test_correlation.py::test_fewer_than_two_varying_features_have_no_correlation",),
    ),
    "dead at a thousandth": Mutant(
        "functional/correlation.py",
        "DEAD_VARIANCE = 1e-6",
        "DEAD_VARIANCE = 1e-5",
        ("functional/test_correlation.py::test_dead_is_below_a_millionth_of_the_median_variance",),
    ),
    "uniformity without the mean": Mutant(
        "functional/hypersphere.py",
        "squared = mean.square().sum() + 1 +",
        "squared = 1 +",
        ("functional/test_hypersphere.py::test_equals_the_formula",),
    ),
    "LiDAR's debiasing with the biased within": Mutant(
        "functional/multiview.py",
        "within / (q - 1)",
        "within / q",
        ("functional/test_multiview.py::test_lidar_equals_the_formula",),
    ),
    "absolute ridge": Mutant(
        "functional/multiview.py",
        "within + delta * scale / dim * torch.eye",
        "within + delta * torch.eye",
        ("functional/test_multiview.py::test_lidar_equals_the_formula",),
    ),
    "a row is its own neighbor": Mutant(
        "functional/neighbors.py",
        "pairs[diagonal, diagonal + start] = math.inf",
        "pass",
        ("functional/test_neighbors.py::test_neighbors_are_those_of_brute_force",),
    ),
    "biased CKA": Mutant(
        "functional/drift.py",
        "/ ((n - 1) * (n - 2))",
        "/ (n * n)",
        ("functional/test_drift.py::test_equals_the_formula",),
    ),
    "leakage of unweighted slides": Mutant(
        "functional/leakage.py",
        "(sums.square().sum(1) / counts).sum()",
        "(sums.square().sum(1) / counts.mean()).sum()",
        ("functional/test_leakage.py::test_equals_the_formula",),
    ),
    "Gram drift without unit tokens": Mutant(
        "functional/dense.py",
        "(directions(t.flatten(0, 1).to(torch.float64)).reshape(t.shape) for t in (tokens, anchor))",
        "(t.to(torch.float64) for t in (tokens, anchor))",
        ("functional/test_dense.py::test_gram_drift_sees_no_rotation_and_no_length",),
    ),
    "processes without a common shift": Mutant(
        "measurement/moments.py",
        "tuple(tensor.clone() for tensor in local._sums_about(shift))",
        "(local.sum.clone(), local.outer.clone())",
        ("measurement/test_moments.py::test_two_processes_with_unequal_or_no_rows_equal_one",),
    ),
    "a shift that is lost in a sum": Mutant(
        "measurement/moments.py",
        "total, outer = other._sums_about(self.shift)",
        "total, outer = other.sum, other.outer",
        ("measurement/test_moments.py::test_any_split_merged_in_any_order_is_one_pass",),
    ),
    "a stale decomposition": Mutant(
        "measurement/moments.py",
        "self._spectra.clear()",
        "pass",
        ("measurement/test_moments.py::test_updates_are_seen_after_a_first_reading",),
    ),
}


def plant(mutant: Mutant, tree: Path) -> None:
    """Write the fault into a copied tree.

    Raises:
        ValueError: The line does not occur exactly once: the code has changed, and the mutant must be updated.
    """
    file = (tree / "repmetrics" / mutant.file).resolve()
    source = file.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times, not once: update the mutant"
        )
    file.write_text(source.replace(mutant.old, mutant.new))


RAN = 64
"""Added to pytest's exit code, so that an error of the process is no failed test."""


class Outcome(NamedTuple):
    """Exit code of pytest, and what it printed."""

    code: int
    output: str


def run(tests: tuple[str, ...], mutant: Mutant | None = None) -> Outcome:
    """Run tests against a copy of the package, with the fault if one is given."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("repmetrics", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if mutant is not None:
            plant(mutant, tree)
        names = [f"tests/repmetrics/{test}" for test in tests]
        program = Program(run_copied_tests, tree, names, folder=tree, environment={"OMP_NUM_THREADS": "1"})
        code = program.wait()
        if code < RAN:
            raise RuntimeError(f"pytest did not run: {program.stderr.read_text()[-2000:]}")
        return Outcome(code - RAN, program.stdout.read_text())


def run_copied_tests(tree: Path, tests: list[str]) -> NoReturn:
    """Exit with pytest's code for tests of the copy, whose modules take the place of the imported ones."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("repmetrics", "fmtrain")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are imported already
    sys.exit(RAN + pytest.main(["-q", "-x", "-p", "no:cacheprovider", *quiet, *tests]))


def killed(mutant: Mutant) -> bool:
    """Whether a test fails because of the fault; an error before the first test (exit code ≥ 2) does not count."""
    return run(mutant.tests, mutant).code == 1


def main() -> int:
    names = sys.argv[1:] or list(MUTANTS)
    baseline = run(tuple(dict.fromkeys(test for name in names for test in MUTANTS[name].tests)))
    if baseline.code:
        sys.stderr.write(f"the tests fail without any fault:\n{baseline.output[-2000:]}\n")
        return 1
    survived = 0
    for name in names:
        dead = killed(MUTANTS[name])
        survived += not dead
        sys.stdout.write(f"{'killed  ' if dead else 'SURVIVED'}  {name}\n")
        sys.stdout.flush()
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
