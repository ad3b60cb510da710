"""docs/trust.md from results/trust/*.json.

python benchmarks/trust/page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from settings import BROKEN, plan
from table import HERE, RESULTS, RULES

from repmetrics.atomic_write import write_text

PAGE = HERE.parent.parent / "docs" / "trust.md"
DOMAINS = {"cifar10": "CIFAR-10", "cells": "blood cells", "nuclei": "nuclei in H&E"}
SIGNALS_SHOWN = ("view_retrieval_whitened_natural", "view_retrieval_whitened_weak", "view_retrieval_whitened_geometry",
                 "view_retrieval_whitened_turned", "view_retrieval_whitened_stain", "rotation_probe", "dse", "rankme",
                 "rankme_centered", "odcorr", "alpha_distance", "participation_ratio", "lidar", "cluster_learnability",
                 "mst_dimension", "mean_direction", "loss")  # fmt: skip


def points(value: float | None, *, places: int = 1) -> str:
    """A share as points, hundredths."""
    return "–" if value is None else f"{100 * value:.{places}f}"


def span(interval: Sequence[float | None], *, places: int = 1, share: bool = False) -> str:
    """An estimate with its interval, in points, or as a share with two digits."""
    value, low, high = (f"{v:.2f}" if share and v is not None else points(v, places=places) for v in interval[:3])
    return f"{value} [{low}, {high}]"


def rows(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def headline(confirm: dict[str, Any]) -> str:
    """The first sentence."""
    parts = []
    for domain, title in DOMAINS.items():
        content = confirm["domains"][domain]
        rule = content["rules"]["views"]
        parts.append(f"{points(rule['regret'][0])} on {title} (random: {points(content['random'][0])})")
    return (
        "**Retrieval of the domain's fixed views chooses well among five runs.** Points that its choice loses against "
        f"the best of the five: {'; '.join(parts)}. RankMe, ODCorr and the loss do not come near it."
    )


def main_table(confirm: dict[str, Any], rules: dict[str, Any]) -> str:
    body = []
    for domain, title in DOMAINS.items():
        content = confirm["domains"][domain]
        rule, pruning, stop = content["rules"]["views"], content["halving"]["15 and 30 %"], content["stopping"]
        body.append([
            title, f"`{rules['view_sets'][domain]['set']}`", span(rule["pairwise"], share=True),
            span(rule["regret"]), points(content["random"][0]),
            f"{100 * pruning['saved']:.0f} % / {span(pruning['lost_probed'])}",
            f"{100 * stop['saved'][0]:.0f} % / {span(stop['lost'])}",
        ])  # fmt: skip
    heads = ("domain", "views", "pairwise accuracy", "regret of the best of 5", "random choice",
             "halving: steps saved / points lost", "stopping: steps saved / points lost")  # fmt: skip
    return rows(heads, body)


def rule_table(confirm: dict[str, Any], explore: dict[str, Any]) -> str:
    body = []
    for domain, title in DOMAINS.items():
        first, second = (report["domains"][domain] for report in (explore, confirm))
        for name, rule in second["rules"].items():
            body.append([
                title, name, span(first["rules"][name]["pairwise"], share=True), span(rule["pairwise"], share=True),
                span(rule["pairwise_within"], share=True), span(rule["regret"]), span(rule["gain"]),
            ])  # fmt: skip
    heads = ("domain", "rule", "exploring half", "confirming half", "within a method", "regret(5)", "random − regret")
    return rows(heads, body)


def early_table(confirm: dict[str, Any]) -> str:
    body = []
    for domain, title in DOMAINS.items():
        content = confirm["domains"][domain]
        stages = [content["early"][share]["views"] for share in ("0.15", "0.3", "0.5")] + [content["rules"]["views"]]
        body.append([title, *(f"{s['pairwise'][0]:.2f} / {points(s['regret'][0])}" for s in stages)])
    return rows(("domain", "15 %", "30 %", "50 %", "end"), body)


def label_table(confirm: dict[str, Any]) -> str:
    body = []
    for domain, title in DOMAINS.items():
        content = confirm["domains"][domain]
        views = content["rules"]["views"]
        for kind, name in (("probe", "probe on n labels"), ("family", "n labels choose the family")):
            cells = [
                f"{r[f'{kind}_pairwise'][0]:.2f} / {points(r[f'{kind}_regret'][0])}"
                for r in content["few_labels"]["1.0"]
            ]
            body.append([title, name, *cells])
        body.append([title, "views, no label", f"{views['pairwise'][0]:.2f} / {points(views['regret'][0])}", *[""] * 5])
    return rows(("domain", "", *(f"{n:,}" for n in (20, 50, 100, 200, 500, 1000))), body)


def worth(content: dict[str, Any]) -> str:
    """Smallest number of labels whose probe orders the runs at least as well as the views."""
    views = content["rules"]["views"]["pairwise"][0]
    enough = [r["labels"] for r in content["few_labels"]["1.0"] if r["probe_pairwise"][0] >= views]
    return f"about {enough[0]:,}" if enough else "more than 1,000"


def signal_table(explore: dict[str, Any], confirm: dict[str, Any]) -> str:
    body = []
    for name in SIGNALS_SHOWN:
        cells = []
        for domain in DOMAINS:
            value = explore["domains"][domain]["signals"].get(name)
            tested = confirm["domains"][domain]["sensitivity"].get(name)
            cells.append(
                ""
                if value is None
                else f"{value['pairwise'][0]:.2f}" + (f" → {tested['pairwise'][0]:.2f}" if tested else "")
            )
        body.append([f"`{name}`", *cells])
    return rows(("signal", *DOMAINS.values()), body)


def domain_table(confirm: dict[str, Any], explore: dict[str, Any], rules: dict[str, Any]) -> str:
    body = []
    for domain, title in DOMAINS.items():
        both = [report["domains"][domain] for report in (explore, confirm)]
        best, worst = max(c["probe"][2] for c in both), min(c["probe"][0] for c in both)
        untrained = [min(c["untrained"][0] for c in both), max(c["untrained"][2] for c in both)]
        body.append([
            title, f"{both[0]['runs']} + {both[1]['runs']}", f"{points(untrained[0])}–{points(untrained[1])}",
            f"{points(worst)}–{points(best)}", points(both[1]["probe_se"]), rules["view_sets"][domain]["argument"],
        ])  # fmt: skip
    heads = ("domain", "runs (explore + confirm)", "probe, untrained", "probe, end", "its standard error",
             "why this view set")  # fmt: skip
    return rows(heads, body)


def aims(confirm: dict[str, Any]) -> str:
    """Aims of the protocol, met or missed."""
    lines = []
    for domain, title in DOMAINS.items():
        content = confirm["domains"][domain]
        rule, natural = content["rules"]["views"], domain == "cifar10"
        share = rule["regret"][0] / content["random"][0]
        checks = {
            f"pairwise accuracy {rule['pairwise'][0]:.2f} (aim {0.85 if natural else 0.75})":
                rule["pairwise"][0] >= (0.85 if natural else 0.75),
            f"regret {share:.2f} of random's (aim {0.2 if natural else 0.5})": share <= (0.2 if natural else 0.5),
            f"halving loses {points(content['halving']['15 and 30 %']['lost_probed'][0], places=2)} points (aim 0.5)":
                content["halving"]["15 and 30 %"]["lost_probed"][0] <= 0.005,
            f"stopping loses {points(content['stopping']['lost'][0], places=2)} points (aim 0.5)":
                content["stopping"]["lost"][0] <= 0.005,
        }  # fmt: skip
        lines.append(
            f"- {title}: "
            + "; ".join(f"{text}: {'met' if met else '**missed**'}" for text, met in checks.items())
            + "."
        )
    return "\n".join(lines)


def alarm_table(alarms: dict[str, Any]) -> str:
    """False alarms and hits by half."""
    titles = {"explore": "random, exploring half", "confirm": "random, confirming half"}
    titles["settings"] = "settings meant to break training"
    body = [
        [
            titles[name],
            f"{len(content['false'])} of {content['healthy']}",
            f"{content['found']} of {len(content['broken'])}",
            str(content["in_time"]),
        ]
        for name, content in alarms.items()
    ]
    return rows(("runs", "false alarms of healthy runs", "broken runs found", "in time"), body)


def missed(content: dict[str, Any]) -> str:
    """Range of the probe's losses, in points, in broken runs without an alarm."""
    losses = sorted(-run["change"] for run in content["broken"].values() if run["alarm"] is None)
    return f"{points(losses[0], places=0)} to {points(losses[-1], places=0)}"


def main() -> None:
    explore, confirm, about = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("explore", "confirm", "experiment")
    )
    rules = json.loads(RULES.read_text(encoding="utf-8"))
    alarms, content = json.loads((RESULTS / "alarms.json").read_text(encoding="utf-8")), confirm["domains"]
    geometry = content["cells"]["sensitivity"]["view_retrieval_whitened_geometry"]
    values = {
        "headline": headline(confirm),
        "main": main_table(confirm, rules),
        "worth": "; ".join(f"{title}: {worth(content[domain])} labels" for domain, title in DOMAINS.items()),
        "aims": aims(confirm),
        "runs": len(plan()),
        "steps": about["steps"],
        "workers": about["workers"],
        "minutes": f"{about['seconds'] / 60:.0f}",
        "broken": len(BROKEN),
        "domains": domain_table(confirm, explore, rules),
        "rules": rule_table(confirm, explore),
        "early": early_table(confirm),
        "labels": label_table(confirm),
        "signals": signal_table(explore, confirm),
        "geometry": f"{geometry['pairwise'][0]:.2f}, with a regret of {points(geometry['regret'][0])} points",
        "hash": confirm["rules_sha256"],
        "explored": rules["explored"],
        "pruning": rows(
            ("domain", "stages", "steps saved", "lost, the rule selects the last", "lost, a probe selects the last"),
            [
                [title, name, f"{100 * h['saved']:.0f} %", span(h["lost"]), span(h["lost_probed"])]
                for domain, title in DOMAINS.items()
                for name, h in content[domain]["halving"].items()
            ],
        ),
        "checkpoints": rows(
            ("domain", "last checkpoint loses", "best by views loses", "difference"),
            [
                [title, *(span(content[domain]["checkpoints"][key]) for key in ("last", "signal", "gain"))]
                for domain, title in DOMAINS.items()
            ],
        ),
        "alarms": alarm_table(alarms),
        "fall": f"{alarms['explore']['rank_fall']:.2f}",
        "missed": missed(alarms["confirm"]),
        "hits": f"{alarms['confirm']['found']} of {len(alarms['confirm']['broken'])}",
        "severe": len(alarms["settings"]["broken"]),
    }
    text = (HERE / "page.md").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", str(value))
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
