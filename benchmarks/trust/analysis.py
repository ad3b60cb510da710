"""Statistics of the experiment: which setting, when to stop, which runs to prune, worth in labels, alarms.

    python benchmarks/trust/analysis.py explore   # every signal, on the exploring half
    python benchmarks/trust/analysis.py confirm   # the rules of rules.json, on the other half; they must be committed

Both write results/trust/<half>.json, which `page.py` renders.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from probes import BUDGETS
from scipy.stats import rankdata
from settings import RANDOM_RUNS
from table import RESULTS, Array, RunRows, read_runs, rules, targets, values

from repmetrics.atomic_write import write_text
from repmetrics.measurement.registry import METRICS
from repmetrics.trust.bootstrap import Interval, interval
from repmetrics.trust.selection import Tournaments, pairwise_accuracy, successive_halving

DRAWS, POOLS = 1000, 300
"""Bootstrap draws, and draws of a set of runs to prune."""
STAGES = (0.15, 0.3, 0.5)
PRUNING = {"15, 30 and 50 %": STAGES, "15 and 30 %": STAGES[:2]}
POOL = 16
"""Number of runs of a pruned sweep."""

LOWER = ("loss", "view_infonce", "mst_dimension")
"""Signals that are better when lower, besides those of METRICS. A lower dimension is better in arXiv 2606.03338."""

Rule = Sequence[tuple[str, int]]
"""Signals with their signs; a run's score is the mean of its ranks."""

BASELINES: Mapping[str, Rule] = {"lowest loss": [("loss", -1)], "RankMe": [("rankme", 1)], "ODCorr": [("odcorr", -1)]}


def sign_of(signal: str) -> int:
    """1 if higher values are better, otherwise −1."""
    if signal.startswith(LOWER):
        return -1
    return -1 if signal in METRICS and METRICS[signal].direction == "lower" else 1


def score(runs: Sequence[RunRows], rule: Rule, *, share: float) -> Array:
    """Mean rank of each run over the signals of a rule, higher is better; NaN ranks last."""
    ranks = []
    for signal, sign in rule:
        column = sign * values(runs, signal, share=share)
        ranks.append(rankdata(np.where(np.isnan(column), -np.inf, column)))
    return np.mean(ranks, axis=0)


def select(runs: Sequence[RunRows], rule: Rule, *, share: float = 1.0) -> dict[str, Any]:
    """Pairwise accuracy and regret of a rule; the target is the probe at the end."""
    tournaments = Tournaments(targets(runs), draws=DRAWS)
    return plain(
        tournaments.selection("", score(runs, rule, share=share), groups=[run.method for run in runs])._asdict()
    )


def chance(runs: Sequence[RunRows]) -> Interval:
    """Regret of a random choice."""
    chances = Tournaments(targets(runs), draws=DRAWS).chance()
    return interval(float(chances[0]), chances[1:], runs=len(runs))


def few_labels(runs: Sequence[RunRows], families: Mapping[str, Rule], *, share: float) -> list[dict[str, Any]]:
    """For each number of labels: a probe on them, and the signal that agrees best with them, mean over draws.

    Args:
        runs: Runs of one domain.
        families: Signals to choose among.
        share: Share of training at which signals and labels are measured.
    """
    tournaments = Tournaments(targets(runs), draws=DRAWS)
    scores = {name: score(runs, rule, share=share) for name, rule in families.items()}
    rows = []
    for n in BUDGETS:
        draws = np.array([run.probes[share][f"labels_{n}"] for run in runs]).T
        chosen = []
        for labels in draws:
            agreements = {name: pairwise_accuracy(values, labels)[0] for name, values in scores.items()}
            chosen.append(max(scores, key=lambda name: np.nan_to_num(agreements[name], nan=-1.0)))
        rows.append(
            {"labels": n}
            | _mean_over_draws(tournaments, list(draws), prefix="probe")
            | _mean_over_draws(tournaments, [scores[name] for name in chosen], prefix="family")
            | {"chosen": {name: chosen.count(name) for name in set(chosen)}}
        )
    return rows


def _mean_over_draws(tournaments: Tournaments, signals: Sequence[Array], *, prefix: str) -> dict[str, Any]:
    target, weights = tournaments.target, tournaments.weights
    regrets = np.mean([tournaments.regret(signal) for signal in signals], axis=0)
    accuracy = float(np.mean([pairwise_accuracy(signal, target)[0] for signal in signals]))
    draws = np.mean([pairwise_accuracy(signal, target, weights=weights) for signal in signals], axis=0)
    runs = len(target)
    return {
        f"{prefix}_pairwise": plain(interval(accuracy, draws, runs=runs)),
        f"{prefix}_regret": plain(interval(float(regrets[0]), regrets[1:], runs=runs)),
    }


def stopping(runs: Sequence[RunRows], rule: Rule) -> dict[str, Any]:
    """Stop at the first evaluation from 15 % on at which no signal of the rule is above its best since step 0.

    Returns steps saved and points lost against training to the end, as means over runs.
    """
    stops = [_stop(run, rule, sorted(share for share in run.signals if share in run.probes)) for run in runs]
    lost = [run.probes[1.0]["probe"] - run.probes[stop]["probe"] for run, stop in zip(runs, stops, strict=True)]
    saved = 1 - np.array(stops)
    return {"saved": plain(_mean(saved)), "lost": plain(_mean(lost)), "stopped": float(np.mean(saved > 0))}


def _stop(run: RunRows, rule: Rule, shares: Sequence[float]) -> float:
    columns = [[sign * run.signals[share].get(signal, -math.inf) for share in shares] for signal, sign in rule]
    for k, share in enumerate(shares):
        if share >= min(STAGES) and not any(column[k] > max(column[:k]) for column in columns):
            return share
    return shares[-1]


def checkpoints(runs: Sequence[RunRows], rule: Rule) -> dict[str, Any]:
    """Cost of the last checkpoint, and of the one with the best signal, against the best of each run."""
    last, by_signal = [], []
    for run in runs:
        shares = sorted(share for share in run.probes if share > 0)
        truth = np.array([run.probes[share]["probe"] for share in shares])
        column = np.mean(
            [rankdata([sign * run.signals[s].get(name, -math.inf) for s in shares]) for name, sign in rule], axis=0
        )
        last.append(truth.max() - truth[-1])
        by_signal.append(truth.max() - truth[len(shares) - 1 - int(np.argmax(column[::-1]))])  # of ties, the last
    return {
        "last": plain(_mean(last)),
        "signal": plain(_mean(by_signal)),
        "gain": plain(_mean(np.subtract(last, by_signal))),
    }


def halving(runs: Sequence[RunRows], rule: Rule, *, shares: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Successive halving of random sets of 16 runs: steps saved, and points lost against probing all at the end."""
    generator, truth = np.random.default_rng(seed), targets(runs)
    stages = {share: score(runs, rule, share=share) for share in shares}
    last, count = score(runs, rule, share=1.0), len(runs)

    def run_pools(sample: NDArray[np.int64], pools: int) -> Array:
        """Means over random sets of a sample of the runs: saved, lost, and lost with probes of the rest."""
        results = []
        for _ in range(pools):
            subset = sample[generator.permutation(count)[: min(POOL, count)]]
            early = {s: v[subset] for s, v in stages.items()}
            results.append(successive_halving(early, truth[subset], last=last[subset]))
        means: Array = np.mean(results, axis=0)
        return means

    saved, lost, probed = run_pools(np.arange(count), POOLS)
    draws = np.array([run_pools(generator.integers(0, count, count), 10) for _ in range(POOLS)])
    return {
        "saved": plain(float(saved)),
        "lost": plain(interval(float(lost), draws[:, 1], runs=count)),
        "lost_probed": plain(interval(float(probed), draws[:, 2], runs=count)),
    }


def alarms(runs: Sequence[RunRows]) -> dict[str, Any]:
    """Alarms on broken runs and on healthy ones: those that end above their untrained network."""
    broken = [run for run in runs if run.kind == "broken"]
    known = [run for run in runs if run.kind == "random" and {0.0, 1.0} <= set(run.probes)]
    healthy = [run for run in known if run.probes[1.0]["probe"] > run.probes[0.0]["probe"]]
    first = [min((share for share in run.alarmed if share > 0), default=math.nan) for run in broken]
    false = [run.name for run in healthy if any(share > 0 for share in run.alarmed)]
    return {
        "broken": len(broken),
        "detected": int(np.sum(~np.isnan(first))),
        "delays": {run.name: None if math.isnan(share) else share for run, share in zip(broken, first, strict=True)},
        "healthy": len(healthy),
        "false": false,
        "unhealthy": len(known) - len(healthy),
    }


def _mean(per_run: Sequence[float] | Array, *, seed: int = 0) -> Interval:
    column = np.asarray(per_run, dtype=float)
    indices = np.random.default_rng(seed).integers(0, len(column), (DRAWS, len(column)))
    return interval(float(column.mean()), column[indices].mean(1), runs=len(column))


def plain(value: Any) -> Any:
    """Numbers rounded to five digits; NaN as None."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def signals_of(runs: Sequence[RunRows]) -> list[str]:
    """Signals that every run has at its end, and that vary."""
    names = [name for name in runs[0].signals[1.0] if not name.endswith("_se")]
    names = [name for name in names if name not in ("step", "share", "nonfinite", "finished", "cka_drift")]
    return [name for name in names if np.ptp(np.nan_to_num(values(runs, name, share=1.0))) > 0]


def of_domain(runs: Sequence[RunRows], domain: str, *, half: str) -> list[RunRows]:
    """Random runs of one domain and half that have a probe at the end."""
    return [r for r in runs if (r.domain, r.half, r.kind) == (domain, half, "random") and 1.0 in r.probes]


def common(runs: Sequence[RunRows], *, rules_of: Mapping[str, Rule], families: Mapping[str, Rule]) -> dict[str, Any]:
    """What both halves report of one domain."""
    probes = targets(runs)
    untrained = [run.probes[0.0]["probe"] for run in runs]
    main = next(iter(rules_of.values()))
    return {
        "runs": len(runs),
        "probe": plain([float(probes.min()), float(np.median(probes)), float(probes.max())]),
        "untrained": plain([float(np.min(untrained)), float(np.median(untrained)), float(np.max(untrained))]),
        "probe_se": plain(float(np.median(targets(runs, probe="probe_se")))),
        "random": plain(chance(runs)),
        "rules": {name: select(runs, rule) for name, rule in {**rules_of, **BASELINES}.items()},
        "early": {
            share: {name: select(runs, rule, share=share) for name, rule in {**rules_of, **BASELINES}.items()}
            for share in STAGES
        },
        "few_labels": {share: few_labels(runs, families, share=share) for share in (0.3, 1.0)},
        "halving": {name: halving(runs, main, shares=shares) for name, shares in PRUNING.items()},
        "stopping": stopping(runs, main),
        "checkpoints": checkpoints(runs, main),
    }


def as_rule(item: Sequence[Any]) -> Rule:
    """Rule of the file: names, "-" in front of a signal that is better when lower."""
    return [(name.removeprefix("-"), -1 if name.startswith("-") else 1) for name in item]


def explore(runs: Sequence[RunRows], domain: str, registered: Mapping[str, Any]) -> dict[str, Any]:
    """Every signal on the exploring half."""
    chosen = of_domain(runs, domain, half="explore")
    table = {name: select(chosen, [(name, sign_of(name))]) for name in signals_of(chosen)}
    early = {name: select(chosen, [(name, sign_of(name))], share=0.3)["pairwise"][0] for name in table}
    return {"signals": table, "early_pairwise": early} | confirm(runs, domain, registered, half="explore")


def confirm(
    runs: Sequence[RunRows], domain: str, registered: Mapping[str, Any], *, half: str = "confirm"
) -> dict[str, Any]:
    """The registered rules on one half."""
    chosen = of_domain(runs, domain, half=half)
    rules_of = {name: as_rule(by_domain[domain]) for name, by_domain in registered["rules"].items()}
    present = set(signals_of(chosen))
    families = {name: as_rule(item) for name, item in registered["families"].items()}
    families = {name: rule for name, rule in families.items() if all(signal in present for signal, _ in rule)}
    sensitivity = {name: select(chosen, [(name, 1)]) for name in registered["sensitivity"] if name in present}
    return common(chosen, rules_of=rules_of, families=families) | {"sensitivity": sensitivity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=["explore", "confirm"])
    parser.add_argument("--tables", type=Path, default=RESULTS)
    half = (args := parser.parse_args()).half
    runs, registered = read_runs(args.tables, confirm=half == "confirm"), rules()
    analyze: Callable[..., dict[str, Any]] = explore if half == "explore" else confirm
    result = {domain: analyze(runs, domain, registered) for domain in RANDOM_RUNS}
    report = {"rules_sha256": registered["sha256"], "alarms": alarms(runs), "domains": result}
    write_text(args.tables / f"{half}.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
