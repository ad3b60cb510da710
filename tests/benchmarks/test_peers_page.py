"""docs/peers.md states the recorded figures."""

from __future__ import annotations

import json
import re

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))


def test_versions_and_numbers_that_differ() -> None:
    for peer in ("monai", "reptrix", "stable-pretraining", "lightly"):
        assert f"{peer} {RECORD['versions'][peer]}" in PAGE.lower()
    for features, values in RECORD["not the paper's"].items():
        row = next(line for line in PAGE.splitlines() if features.partition(",")[0].lower() in line.lower())
        assert all(f"{value:.4f}" in row for value in values.values())


@pytest.mark.parametrize(
    ("row", "peer", "quantity"),
    [
        ("lightly's dimension term", "lightly", "rankme"),
        ("MONAI's score", "monai", "rankme_centered"),
        ("| stable-pretraining's RankMe", "stable-pretraining", 'rankme(compat="stable-pretraining")'),
        ("| reptrix's RankMe", "reptrix", 'rankme(compat="reptrix")'),
        ("lightly's regularizer", "lightly", "dse"),
    ],
)
def test_numbers_that_agree(row: str, peer: str, quantity: str) -> None:
    (line,) = (line for line in PAGE.splitlines() if row in line)
    agreement = re.search(r"agrees to (\S+)", line)
    assert agreement is not None
    compared = [check for check in RECORD["checks"] if (check["peer"], check["quantity"]) == (peer, quantity)]
    assert compared
    assert max(abs(check["ours"] / check["theirs"] - 1) for check in compared) < float(agreement[1])
