"""Tables of support vector machines: a row for each feature, and with few shots for each number of shots."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featcache.probes.runs.run import Run
from featcache.probes.runs.tables import COSTS
from featcache.probes.scores.metrics import gain, metric_kind
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
    """Return (columns, rows of strings, the place of each row's chosen cost) of one probe's costs, a row for each class.

    The costs rise from left to right.
    """
    classes: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["cost"]):
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
    for row in (row for row in _scores(run, run.scored_on) if row["probe"] in costs and row[SHOTS] == "0"):
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
    ddof, deviation = (0, statistics.pstdev) if run.summary.get("parity") else (1, statistics.stdev)
    scale = 100 if metric_kind(run.metric).unit() else 1
    samples = _by_draw(run, run.scored_on)
    if run.chosen_on:
        means = {k: gain(run.metric, statistics.fmean(v)) for k, v in _by_draw(run, run.chosen_on).items()}
        best: dict[tuple[str, str], tuple[str, str, str]] = {}
        for key, mean in means.items():
            # Of equal ones the first.
            if key[:2] not in best or mean > means[best[key[:2]]]:
                best[key[:2]] = key
        samples = {key: samples[key] for key in best.values()}
    columns = ["features", "k", "samples", f"mean {heading(run.metric)}", "min", "max", f"std (ddof {ddof})", "cost"]
    rows = []
    for (feature, shots, costs), values in samples.items():
        numbers = [statistics.fmean(values), min(values), max(values)]
        numbers += [deviation(values)] if len(values) > ddof else []
        cells = [f"{scale * number:.2f}" for number in numbers] + ["-"] * (4 - len(numbers))
        cost = f"{float(costs):g}" if _is_number(costs) else "of each class"
        rows.append([feature, shots, str(len(values)), *cells, cost])
    return columns, rows


def notes(run: Run) -> Iterator[str]:
    """Yield lines to print below the table: which average precision it has, and how costs were chosen."""
    kind = metric_kind(run.metric)
    yield f"{kind.title}: {kind.summary()[0].lower()}{kind.summary()[1:].rstrip('.')}"
    costs = read_costs(run)
    if run.chosen_on:
        yield "costs: for all classes together, by the mean of the samples on the images that they are scored on"
        return
    if not any(len({row["cost"] for row in rows}) > 1 for rows in costs.values()):
        return
    shots = {row["probe"]: row[SHOTS] for row in run.scores}
    folds: dict[int, set[str]] = {}
    for probe, rows in costs.items():
        folds.setdefault(rows[0]["folds"], set()).add(shots[probe])
    plain = _span([row["cost"] for rows in costs.values() for row in rows if row["chosen"] and not row["folds"]] or [1])
    if max(folds):
        yield "costs: for each class, by average precision (scikit-learn's) in stratified cross-validation; see costs.csv"
    for count, few in sorted(folds.items()):
        if count < max(2, *folds):
            how = f"{count} folds" if count else f"no cross-validation, cost {plain}"
            yield f"k = {', '.join(sorted(few, key=int))}: {how}, because each fold needs a positive"


def _scores(run: Run, role: str) -> list[Mapping[str, Any]]:
    return [row for row in run.scores if row["metric"] == run.metric and row["split"] == role]


def _by_draw(run: Run, role: str) -> dict[tuple[str, str, str], list[float]]:
    """Return {(feature, shots, costs): scores of the samples}."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in (row for row in _scores(run, role) if int(row[SHOTS] or 0)):
        groups.setdefault((row[FEATURE], row[SHOTS], row[LIST]), []).append(row["value"])
    return groups


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _span(costs: Sequence[float]) -> str:
    low, high = min(costs), max(costs)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
