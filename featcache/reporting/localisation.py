"""Localisation scores per probe and method, from a run's attribution.csv."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from featcache.attribution.methods import METHODS
from featcache.attribution.results import IDENTITY
from featcache.attribution.scores import LOCALISATION_SCORES
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.probes.runs.run import Run, open_run
from featcache.probes.runs.run_file import ATTRIBUTION
from featcache.probes.scores.jackknife import deviations, fraction_interval, influences
from featcache.reporting.configuration import naming
from featcache.reporting.table import percent

EXPLAINED, MAPS = ATTRIBUTION
# A mean over less than this share of the maps is marked: it is no mean over the images that others are means over.
FEW, MARK = 0.5, "(!)"
MARKED = f"{MARK} rests on less than half of the maps, since the others have none: do not compare it with full means."


@dataclass(frozen=True, eq=False)
class Localisation:
    """What attribution.csv says of the probes of a run.

    scores: those that it has columns of. rows: as in the file, with the values of the scores as floats, None where
    a map has no score.
    """

    scores: Sequence[type[LocalisationScore]]
    rows: Sequence[dict[str, Any]]

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
        return [*lines, MARKED]


def read_localisation(run: Run) -> Localisation:
    """Read attribution.csv. Raises BadInput for damage.

    Maps of probes that the run does not have any more are left out, and so are the columns of scores that are not
    installed; a notice names them.
    """
    table = run.table(EXPLAINED, probe=str, method=str, id=str)
    names = list(table[0]) if table else []
    scores = [score for score in LOCALISATION_SCORES.values() if set(score.columns) <= set(names)]
    if table and not scores:
        raise run.damaged(EXPLAINED, "it has no columns of a localisation score")
    columns = [column for score in scores for column in score.columns]
    try:
        rows = [row | {c: float(row[c]) if row[c] else None for c in columns} for row in table]
    except ValueError as error:
        raise run.damaged(EXPLAINED, error) from None
    probes = {row["probe"] for row in run.scores}
    gone = list(dict.fromkeys(row["probe"] for row in rows if row["probe"] not in probes))
    if gone:
        click.echo(
            f"notice: {EXPLAINED} of run {run.path} has {len(gone)} probes that the run does not have "
            f"({', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''}); they are left out, attribute again",
            err=True,
        )
    reported = {column for method in METHODS.values() for column in method.columns}
    unknown = [name for name in names if name not in (*IDENTITY, *columns, *reported)]
    if unknown:
        click.echo(
            f"notice: {EXPLAINED} of run {run.path} has columns of localisation scores that are not installed "
            f"({', '.join(unknown)}); they are left out",
            err=True,
        )
    return Localisation(scores, [row for row in rows if row["probe"] in probes])


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


def means_of(localisation: Localisation, score: type[LocalisationScore]) -> dict[tuple[str, str], Mean]:
    """Return the Mean of each probe and method, in the order of the table."""
    column, uniform = score.columns
    means = {}
    for key, rows in _grouped(localisation).items():
        scored = [row for row in rows if row[column] is not None]
        levels = [row[uniform] for row in rows if row[uniform] is not None]
        level = float(np.mean(levels)) if levels else math.nan
        means[key] = Mean(*_mean_with_interval(scored, column), level, len(scored) < FEW * len(rows))
    return means


def _grouped(localisation: Localisation) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of each probe and method, in order."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in localisation.rows:
        groups.setdefault((row["probe"], row["method"]), []).append(row)
    return groups


def narrow_tables(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[list[str], list[list[str]]]]:
    """Split the table of localisation_rows for a narrow terminal: what the probes are, then a table for each score."""
    method = columns.index("method")
    probes = dict.fromkeys(tuple(row[:method]) for row in rows)
    tables = [(list(columns[:method]), [list(probe) for probe in probes])]
    for start in range(method + 1, len(columns), 4):
        own = slice(start, start + 4)
        tables.append((["probe", "method", *columns[own]], [[row[0], row[method], *row[own]] for row in rows]))
    return tables


def table_of(run: Run, localisation: Localisation) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) of a run's Localisation, as localisation_rows does."""
    texts, specs = naming(run), {row["probe"]: row for row in run.scores}
    columns = ["probe", *texts, "method"]
    for score in localisation.scores:
        columns += [f"{score.heading} %", "uniform map %", "maps", "empty"]
    rows = []
    for (probe, method), members in _grouped(localisation).items():
        rows.append([probe, *(text(specs[probe]) for text in texts.values()), method])
        for score in localisation.scores:
            rows[-1] += _cells(members, *score.columns)
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
    click.echo(
        f"notice: {name} of run {run.path} {'has no checksum in run.json' if exists else 'is missing'}; "
        "it is left out, attribute again",
        err=True,
    )
    return False


def _mean_with_interval(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float, float]:
    """Return the mean of a column, with its 95% interval over images, which may have several maps each; NaN without rows."""
    if not rows:
        return math.nan, math.nan, math.nan
    images = {i: n for n, i in enumerate(dict.fromkeys(row["id"] for row in rows))}
    at = torch.tensor([images[row["id"]] for row in rows])
    values = torch.tensor([row[column] for row in rows], dtype=torch.float64)
    sums, maps = (torch.zeros(len(images)).double().index_add_(0, at, v) for v in (values, torch.ones_like(values)))
    mean = sums.sum() / maps.sum()
    deviation = deviations(influences(mean, (sums.sum() - sums) / (maps.sum() - maps)))
    low, high = fraction_interval(mean, deviation, mean.new_tensor(len(images)))
    return mean.item(), low.item(), high.item()
