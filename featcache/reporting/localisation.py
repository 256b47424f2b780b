"""Localisation scores per probe and method, from a run's attribution.csv."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.attribution.methods import METHODS
from featcache.attribution.results import IDENTITY
from featcache.attribution.scores import SCORES
from featcache.attribution.scores.score import Score
from featcache.attribution.task import REGION
from featcache.probes.runs.run import Run, open_run
from featcache.probes.scores.jackknife import deviations, fraction_interval, influences
from featcache.progress import say
from featcache.reporting.configuration import naming
from featcache.reporting.table import percent

MAPS, FACTS = "attribution.npz", "attribution.json"
# A mean over less than this share of the maps is marked: it is no mean over the images that others are means over.
FEW, MARK = 0.5, "(!)"
# How large the objects of a class are together, with the bound of each size in pixels of the input: COCO's bounds. A
# position of a map with a stride of 32 pixels is as large as the largest small object.
SIZES = {"small (< 32² px)": 32**2, "medium (< 96² px)": 96**2, "large": math.inf}
MARKED = f"{MARK} rests on less than half of the maps, since the others have none: do not compare it with full means."


@dataclass(frozen=True, eq=False)
class Localisation:
    """What attribution.csv says of the probes of a run.

    scores: those that it has columns of. rows: as in the file, with the values of the scores as floats, None where
    a map has no score. facts: the content of attribution.json, empty for a run of an earlier version.
    """

    scores: Sequence[type[Score]]
    rows: Sequence[dict[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _by_identity(self) -> dict[tuple[str, ...], dict[str, Any]]:
        return {tuple(row[name] for name in IDENTITY): row for row in self.rows}

    def caption(self, panel: Sequence[str]) -> str:
        """Write the scores of a map, such as "EPG 42%". panel: begins with the map's IDENTITY. Raises LookupError."""
        row = self._by_identity[tuple(map(str, panel[: len(IDENTITY)]))]
        lines = []
        for score in self.scores:
            value = row[score.columns[0]]
            lines.append(f"no {score.lacking}" if value is None else f"{score.heading} {100 * value:.0f}%")
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Say what each score is, in a line for people, and what the mark means."""
        lines = [
            f"{score.summary()} A map without {score.lacking} has none and is counted as empty."
            for score in self.scores
        ]
        return [*lines, MARKED, *self.settings()]

    def settings(self) -> list[str]:
        """Say how the numbers were made, in a line for people, where that is known."""
        facts = self.facts
        if not facts:
            return []
        line = f"protocol {facts['protocol']}, parity {facts['parity'] or 'none'}"
        if "grids" in facts:
            line += f", {facts['grids']} grids of {facts['drawn_from_images']:,} images of {facts['drawn_from_classes']} classes"
        line += f", {facts['pairs']:,} pairs of class and image, {facts['images']:,} images of {facts['split']} (set {facts['set']})"
        line += f"; scores {', '.join(facts['scores'])}; seed {facts['seed']}"
        return [f"{line}; featcache {facts['version']} on {facts['device']}"]


def read_localisation(run: Run) -> Localisation:
    """Read attribution.csv. Raises BadInput for damage.

    Maps of probes that the run does not have any more are left out, and so are the columns of scores that are not
    installed; a notice names them.
    """
    name = run.attribution_table
    table = run.table(name, probe=str, method=str, id=str)
    columns_held = list(table[0]) if table else []
    scores = [score for score in SCORES.values() if set(score.columns) <= set(columns_held)]
    if table and not scores:
        raise run.damaged(name, "it has no columns of a localisation score")
    columns = [column for score in scores for column in score.columns]
    try:
        numbers = [*columns, *([REGION] if REGION in columns_held else [])]
        rows = [row | {c: float(row[c]) if row[c] else None for c in numbers} for row in table]
    except ValueError as error:
        raise run.damaged(name, error) from None
    probes = {row["probe"] for row in run.scores}
    gone = list(dict.fromkeys(row["probe"] for row in rows if row["probe"] not in probes))
    if gone:
        say(
            f"notice: {name} of run {run.path} has {len(gone)} probes that the run does not have "
            f"({', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''}); they are left out, attribute again"
        )
    reported = {REGION, *(column for method in METHODS.values() for column in method.columns)}
    unknown = [column for column in columns_held if column not in (*IDENTITY, *columns, *reported)]
    if unknown:
        say(
            f"notice: {name} of run {run.path} has columns of localisation scores that are not installed "
            f"({', '.join(unknown)}); they are left out"
        )
    return Localisation(scores, [row for row in rows if row["probe"] in probes], read_facts(run))


def read_facts(run: Run) -> dict[str, Any]:
    """Return the content of attribution.json, empty where an earlier version attributed. Raises BadInput for damage."""
    if FACTS not in run.summary.get("files", ()):
        return {}
    try:
        facts: dict[str, Any] = json.loads(run.read(FACTS))
    except ValueError as error:
        raise run.damaged(FACTS, error) from None
    return facts


def localisation_rows(folder: str | PathLike) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) for a run's folder: the mean of each score, with a 95% interval over images.

    Beside it stands what a uniform map scores on average. Maps without a score are counted, not averaged.
    """
    run = open_run(folder)
    return table_of(run, read_localisation(run))


class Mean(NamedTuple):
    """A score of a method's maps for a probe: its mean with a 95% interval over images, and what it rests on.

    All three are NaN where no map has a score. uniform: the mean of what a uniform map scores. few: whether less than
    half of the maps have a score.
    """

    mean: float
    low: float
    high: float
    uniform: float
    few: bool


def means_of(localisation: Localisation, score: type[Score]) -> dict[tuple[str, str], Mean]:
    """Return the Mean of each probe and method, in the order of the table."""
    column, uniform = score.columns
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in localisation.rows:
        groups.setdefault((row["probe"], row["method"]), []).append(row)
    means = {}
    for key, rows in groups.items():
        scored = [row for row in rows if row[column] is not None]
        levels = [row[uniform] for row in rows if row[uniform] is not None]
        level = float(np.mean(levels)) if levels else math.nan
        means[key] = Mean(*_mean_with_interval(scored, column), level, len(scored) < FEW * len(rows))
    return means


def narrow_tables(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[list[str], list[list[str]]]]:
    """Split a table of scores for a narrow terminal: what the probes are, then a table for each score."""
    method = columns.index("method")
    # A score has four columns; before them there may be one that names a group.
    first = len(columns) - 4 * ((len(columns) - method - 1) // 4)
    probes = dict.fromkeys(tuple(row[:method]) for row in rows)
    tables = [(list(columns[:method]), [list(probe) for probe in probes])]
    for start in range(first, len(columns), 4):
        own = [0, *range(method, first), *range(start, start + 4)]
        tables.append(([columns[n] for n in own], [[row[n] for n in own] for row in rows]))
    return tables


def table_of(run: Run, localisation: Localisation) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) of a run's Localisation, as localisation_rows does."""
    return _table(run, localisation.scores, localisation.rows)


def by_size(run: Run, localisation: Localisation) -> tuple[list[str], list[list[str]]] | None:
    """Return the same table with a row for each of SIZES, or None where all objects are of one size, or none is known."""
    rows = [row for row in localisation.rows if row.get(REGION)]
    scores = [score for score in localisation.scores if score.regions]
    sizes = {id(row): next(name for name, bound in SIZES.items() if row[REGION] < bound) for row in rows}
    if not scores or len(set(sizes.values())) < 2:
        return None
    return _table(run, scores, rows, "objects", list(SIZES), lambda row: sizes[id(row)])


def by_class(run: Run, localisation: Localisation) -> tuple[list[str], list[list[str]]]:
    """Return the same table with a row for each class."""
    classes = run.summary["classes"]
    return _table(run, localisation.scores, localisation.rows, "class", classes, lambda row: str(row["class"]))


def _table(
    run: Run,
    scores: Sequence[type[Score]],
    maps: Sequence[dict[str, Any]],
    heading: str = "",
    order: Sequence[str] = ("",),
    group_of: Callable[[dict[str, Any]], str] = lambda row: "",
) -> tuple[list[str], list[list[str]]]:
    """Lay out the means of scores over each probe's and method's maps, and within them over groups of these.

    heading, order: of the groups. group_of: from a row of the file to its group.
    """
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in maps:
        groups.setdefault((row["probe"], row["method"]), {}).setdefault(group_of(row), []).append(row)
    texts, specs = naming(run), {row["probe"]: row for row in run.scores}
    columns = ["probe", *texts, "method", *([heading] if heading else [])]
    for score in scores:
        columns += [f"{score.heading} %", "uniform map %", "maps", "empty"]
    rows = []
    for (probe, method), parts in groups.items():
        for name in (name for name in order if name in parts):
            own = [probe, *(text(specs[probe]) for text in texts.values()), method, *([name] if heading else [])]
            rows.append([*own, *(cell for score in scores for cell in _cells(parts[name], *score.columns))])
    return columns, rows


def _cells(rows: Sequence[Mapping[str, Any]], column: str, uniform: str) -> list[str]:
    """A score of some maps as text: its mean, what a uniform map scores, how many maps, and how many have none."""
    scored = [row for row in rows if row[column] is not None]
    levels = [row[uniform] for row in rows if row[uniform] is not None]
    mean, level = percent(*_mean_with_interval(scored, column)), percent(np.mean(levels) if levels else None)
    mark = f" {MARK}" if len(scored) < FEW * len(rows) else ""
    return [mean + mark, level, str(len(rows)), str(len(rows) - len(scored))]


def explained(run: Run, name: str) -> bool:
    """Whether a file that attribute writes is there. A notice says if it is missing, or was not finished."""
    files, exists = run.summary.get("files"), (run.path / name).exists()
    if files is None or exists == (name in files):
        return exists
    say(
        f"notice: {name} of run {run.path} {'has no checksum in run.json' if exists else 'is missing'}; "
        "it is left out, attribute again"
    )
    return False


def _mean_with_interval(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float, float]:
    """Return the mean of a column, with its 95% interval over images, which may have several maps each; NaN without rows."""
    if not rows:
        return math.nan, math.nan, math.nan
    mean, influence = mean_with_influences(rows, column)
    low, high = fraction_interval(mean, deviations(influence), mean.new_tensor(len(influence)))
    return mean.item(), low.item(), high.item()


def mean_with_influences(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of a column over maps, and the influence of each image on it [n]; see jackknife.influences."""
    images = {i: n for n, i in enumerate(dict.fromkeys(row["id"] for row in rows))}
    at = torch.tensor([images[row["id"]] for row in rows])
    values = torch.tensor([row[column] for row in rows], dtype=torch.float64)
    sums, maps = (torch.zeros(len(images)).double().index_add_(0, at, v) for v in (values, torch.ones_like(values)))
    mean = sums.sum() / maps.sum()
    return mean, influences(mean, (sums.sum() - sums) / (maps.sum() - maps))
