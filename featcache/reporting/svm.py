"""Tables of support vector machines: a row for each feature, and with few shots for each number of shots."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featcache.probes.runs.run import Run
from featcache.probes.runs.tables import COSTS
from featcache.probes.scores.metrics import metric_kind
from featcache.reporting.table import heading, percent, scored

# The columns of costs.csv, and those of scores.csv that a table groups by.
COST_TYPES = {"probe": str, "class": str, "cost": float, "ap": float, "folds": int, "chosen": int, "excess": float}
FEATURE, SHOTS, LIST = "features", "optimizer.positives", "optimizer.costs"

Row = dict[str, Any]


def read_costs(run: Run) -> dict[str, list[Row]]:
    """Return {probe: its rows of costs.csv}, {} for a run without such a table. Raises BadInput for damage."""
    names = run.summary.get("files", {})
    if not names.keys() & {COSTS, f"{COSTS}.gz"}:
        return {}
    rows: dict[str, list[Row]] = {}
    for row in run.table(COSTS, **COST_TYPES):
        rows.setdefault(row["probe"], []).append(row)
    return rows


def cost_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[int]]:
    """Return (columns, rows of strings, the place of each row's chosen cost) of one probe's costs, a row for each class."""
    classes: dict[str, list[Row]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    costs = [f"{row['cost']:.3g}" for row in next(iter(classes.values()))]
    columns = ["class", "folds", *costs, "objective exceeds its minimum by at most"]
    lines, chosen = [], []
    for name, own in classes.items():
        place = next(n for n, row in enumerate(own) if row["chosen"])
        chosen.append(place)
        cells = ["-" if row["ap"] is None else f"{100 * row['ap']:.1f}" for row in own]
        lines.append([name, str(own[place]["folds"]), *cells, f"{own[place]['excess']:.1e}"])
    return columns, lines, chosen


def svm_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) of a run of machines that train on all images: a row for each probe."""
    costs, metric = read_costs(run), run.metric
    columns = [
        "probe",
        "features",
        f"{run.scored_on} {heading(metric)} [95%]",
        "AP in cross-validation",
        "costs",
        "excess",
    ]
    rows = []
    for row in _scores(run, run.scored_on):
        kept = [one for one in costs[row["probe"]] if one["chosen"]]
        held = [one["ap"] for one in kept if one["ap"] is not None]
        rows.append([
            row["probe"], row[FEATURE], scored(metric, row["value"], row["low"], row["high"]),
            percent(statistics.fmean(held)) if held else "-",
            _span([one["cost"] for one in kept]), f"{max(one['excess'] for one in kept):.0e}",
        ])  # fmt: skip
    return columns, rows


def low_shot_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings): a row for each feature and number of shots, over the samples.

    In a run that chooses on a split, the cost with the highest mean there is the one that is reported. The deviation
    has n - 1, or n under parity, as published.
    """
    ddof = 0 if run.summary.get("parity") else 1
    samples = _by_draw(run, run.scored_on)
    if run.chosen_on:
        means = {key: statistics.fmean(values) for key, values in _by_draw(run, run.chosen_on).items()}
        best: dict[tuple[str, str], tuple[str, str, str]] = {}
        for key, mean in means.items():
            # Of equal ones the first.
            if key[:2] not in best or mean > means[best[key[:2]]]:
                best[key[:2]] = key
        samples = {key: samples[key] for key in best.values()}
    columns = ["features", "k", "samples", "mean", "min", "max", f"std (ddof {ddof})", "cost"]
    rows = []
    for (feature, shots, costs), values in samples.items():
        deviation = _deviation(values, ddof)
        numbers = [f"{100 * v:.2f}" for v in (statistics.fmean(values), min(values), max(values))]
        cost = f"{float(costs):g}" if run.chosen_on else "of each class"
        rows.append(
            [feature, shots, str(len(values)), *numbers, "-" if deviation is None else f"{100 * deviation:.2f}", cost]
        )
    return columns, rows


def notes(run: Run) -> Iterator[str]:
    """Yield lines to print below the table: which average precision it has, and how costs were chosen."""
    kind = metric_kind(run.metric)
    yield f"{kind.title}: {kind.summary()[0].lower()}{kind.summary()[1:].rstrip('.')}"
    costs = read_costs(run)
    if run.chosen_on:
        yield "costs: for all classes together, by the mean of the samples on the images that they are scored on"
        return
    folds: dict[int, set[str]] = {}
    plain: set[float] = set()
    shots = {row["probe"]: row[SHOTS] for row in run.scores}
    several = any(len({row["cost"] for row in rows}) > 1 for rows in costs.values())
    for probe, rows in costs.items():
        for row in rows:
            folds.setdefault(row["folds"], set()).add(shots[probe])
            if row["chosen"] and row["ap"] is None:
                plain.add(row["cost"])
    if not several:
        return
    yield "costs: for each class, by average precision (scikit-learn's) in stratified cross-validation; see costs.csv"
    most = max(folds)
    for count, where in sorted(folds.items()):
        if count < most:
            chosen = f"no cross-validation, cost {_span(sorted(plain))}" if count < 2 else f"{count} folds"
            yield f"k = {', '.join(sorted(where, key=int))}: {chosen}, because each fold needs a positive"


def _scores(run: Run, role: str) -> list[Mapping[str, Any]]:
    return [row for row in run.scores if row["metric"] == run.metric and row["split"] == role]


def _by_draw(run: Run, role: str) -> dict[tuple[str, str, str], list[float]]:
    """Return {(feature, shots, costs): scores of the samples}."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in _scores(run, role):
        groups.setdefault((row[FEATURE], row[SHOTS], row[LIST]), []).append(row["value"])
    return groups


def _deviation(values: Sequence[float], ddof: int) -> float | None:
    if len(values) <= ddof:
        return None
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def _span(costs: Sequence[float]) -> str:
    low, high = min(costs), max(costs)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
