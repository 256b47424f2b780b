"""Tables on the terminal, and the words for scores."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featcache.errors import printable
from featcache.probes.runs.run import Run
from featcache.probes.runs.seeds import over_seeds
from featcache.probes.scores.metrics import gain, metric_kind
from featcache.reporting.configuration import naming

if TYPE_CHECKING:
    from featcache.probes.compare import Comparison


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of strings under their columns, numbers to the right. Returns text."""
    rows = [[printable(cell) for cell in row] for row in rows]
    cells = [columns, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "-+"


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Format a fraction as percent, with its interval if given; a missing value is a dash."""
    return _with_interval(value, low, high, 100, "{:.1f}")


def scored(metric: str, value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Format a score: as percent if the metric is a fraction, else as a number; a missing value is a dash."""
    return percent(value, low, high) if metric_kind(metric).unit() else _with_interval(value, low, high, 1, "{:.3f}")


def heading(metric: str) -> str:
    """Name a metric, with the unit in which `scored` writes it."""
    return f"{metric_kind(metric).title} {metric_kind(metric).unit()}".strip()


def _with_interval(value: float | None, low: float | None, high: float | None, scale: float, pattern: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    if low is None or high is None or math.isnan(low):
        return pattern.format(scale * value)
    interval = f" [{pattern.format(scale * low)}, {pattern.format(scale * high)}]"
    return pattern.format(scale * value) + interval


def score_rows(run: Run, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) of a run's probes, those that score best on the selection split first.

    Head and loss come first, then whatever varies between the probes. If some differ in their seed alone, the last
    column has mean and standard deviation over these; it is the same for draws. Without a selection split the order is that of the scores.
    most: rows to return, by default all.
    """
    metric, split, name = run.metric, run.chosen_on, heading(run.metric)
    chosen = [r for r in run.scores if r["metric"] == metric and r["split"] == (split or run.scored_on)]
    if split:
        # A refit comes before the probe that was chosen, whose score on the selection split it has.
        chosen.sort(
            key=lambda r: (_gain(metric, run.chosen_by(r["probe"])["value"]), r["probe"] in run.sources), reverse=True
        )
    seeds, texts = seed_texts(run, metric), naming(run)
    columns = ["probe", *texts, *([f"{split} {name}"] if split else []), f"{run.scored_on} {name} [95%]"]
    columns += [f"{run.scored_on} {name} over {over(run)}"] if seeds else []
    rows = []
    for row in chosen[:most]:
        test = run.row(row["probe"], metric, run.scored_on)
        rows.append([row["probe"], *(text(row) for text in texts.values())])
        rows[-1] += [scored(metric, run.chosen_by(row["probe"])["value"])] if split else []
        rows[-1] += [scored(metric, test["value"], test["low"], test["high"])]
        rows[-1] += [seeds.get(row["probe"], "-")] if seeds else []
    return columns, rows


def _gain(metric: str, value: float | None) -> float:
    return -math.inf if value is None else gain(metric, value)


def over(run: Run) -> str:
    """Return what means are taken over in a run: seeds, draws, or both."""
    varying = [
        f"{field}s" for field in ("seed", "draw") if len({row.get(field) for row in run.scores} - {None, ""}) > 1
    ]
    return " and ".join(varying) or "seeds"


def seed_texts(run: Run, metric: str) -> dict[str, str]:
    """Return {probe: mean ± std (n)} over seeds and draws on the role whose scores are reported, for probes that have several."""
    rows = [r for r in run.scores if r["metric"] == metric and r["split"] == run.scored_on]
    texts: dict[str, str] = {}
    for group in over_seeds(rows):
        if group["std"] is not None:
            text = f"{scored(metric, group['mean'])} ± {scored(metric, group['std'])} ({group['n']})"
            texts |= dict.fromkeys(group["probes"].split(), text)
    return texts


def comparison_rows(comparisons: Sequence["Comparison"]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) for the Comparisons of two probes."""
    first, second = comparisons[0].probes
    columns = [f"on {comparisons[0].role}", first, second, "difference [95%]", "p"]
    rows = []
    for c in comparisons:
        values = [scored(c.metric, score) for score in c.scores]
        rows.append([heading(c.metric), *values, scored(c.metric, c.difference, c.low, c.high), f"{c.p:.3f}"])
    return columns, rows
