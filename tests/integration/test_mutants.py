"""A test detects every fault, and no test fails without a fault."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant, killed, plant, run
from paths import ROOT

MUST_DIE = list(MUTANTS)[:6]


@pytest.mark.slow
def test_without_a_fault_the_tests_pass() -> None:
    baseline = run(tuple(dict.fromkeys(test for name in MUST_DIE for test in MUTANTS[name].tests)))
    assert baseline.code == 0, baseline.output[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MUST_DIE)
def test_the_fault_is_noticed(name) -> None:
    assert killed(MUTANTS[name])


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_still_fits_the_code(name) -> None:
    mutant = MUTANTS[name]
    assert (ROOT / "repmetrics" / mutant.file).read_text().count(mutant.old) == 1
    for test in mutant.tests:
        file, function = test.split("[")[0].split("::")
        assert f"def {function}(" in (ROOT / "tests" / "repmetrics" / file).read_text()


def test_a_mutant_that_does_not_fit_says_so(tmp_path) -> None:
    (tmp_path / "repmetrics").mkdir()
    (tmp_path / "repmetrics" / "spectrum.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"spectrum.py holds 'y = 2' 0 times, not once: update the mutant"):
        plant(Mutant("spectrum.py", "y = 2", "y = 3", ()), tmp_path)
