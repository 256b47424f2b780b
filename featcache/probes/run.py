"""A finished run folder, and the choice of probes from it."""

import csv
import json
import os
import re
import sys
from collections import ChainMap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from featcache.errors import BadInput, nearest, shown
from featcache.probes.scores.metrics import gain
from featcache.probes.tables import open_table
from featcache.store.reader import open_store

FILE = "run.json"
# Of scores.csv, before the fields of the probe.
SCORE_COLUMNS = ("probe", "name", "split", "metric", "value", "low", "high", "epoch")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the contents of run.json, and the rows of scores.csv.

    scores: mappings as in the file, with value, low and high as floats (None where the probe diverged).
    """

    path: Path
    summary: dict
    scores: list

    @property
    def judge(self):
        """The role whose scores are reported: test, or the selection split where there is no test split."""
        return "test" if "test" in self.summary["rows"] else self.summary["select"]["split"]

    @property
    def metrics(self):
        """Names of the metrics that the probes are scored with."""
        return tuple(self.summary["chance"][self.judge])

    @property
    def fields(self):
        """Columns of the scores that say what a probe is."""
        return [column for column in self.scores[0] if column == "name" or column not in SCORE_COLUMNS]

    def value(self, probe_id, metric, split):
        """Return the row of scores.csv for a probe, metric and split."""
        return self._rows[probe_id, metric, split]

    @cached_property
    def _rows(self):
        return {(r["probe"], r["metric"], r["split"]): r for r in self.scores}

    def table(self, name):
        """Read another table of the run, such as calibration.csv: a list of dicts of strings. Raises BadInput."""
        try:
            with open_table(self.path, name) as file:
                return list(csv.DictReader(file))
        except (OSError, EOFError) as error:
            raise BadInput(f"damaged run {self.path}: {name}: {getattr(error, 'strerror', None) or error}") from None

    @property
    def caution(self):
        """A line to print beside scores that the choice of probes makes too good, else None."""
        chosen, splits = self.summary["select"]["split"], self.summary["splits"]
        if not set(splits[chosen]) & set(splits[self.judge]):
            return None
        parity = f" (parity {self.summary['parity']})" if self.summary.get("parity") else ""
        return f"chosen on the images that they are scored on, {self.judge}{parity}: the scores are too good"


def read_summary(folder):
    """Read run.json, finished or not. Raises BadInput if `folder` is no run folder."""
    if not isinstance(folder, str | os.PathLike):
        raise BadInput(f"run: expected the path of a folder, not {shown(folder)}")
    try:
        summary = json.loads((Path(folder) / FILE).read_text())
        if not isinstance(summary, dict):
            raise ValueError
        return summary
    except (OSError, ValueError):
        there = "is not a run folder (it has no readable run.json)" if Path(folder).exists() else "not found"
        raise BadInput(f"run {folder} {there}") from None


def open_run(folder):
    """Open a finished run. Raises BadInput if there is none, or it is not finished."""
    summary = read_summary(folder)
    if "key" not in summary:
        raise BadInput(f"run {folder} is not finished; run the command that makes it again to finish it")
    lacking = [field for field in ("store", "store_id", "splits", "select", "rows", "chance") if field not in summary]
    if lacking:
        raise BadInput(f"damaged run {folder}: run.json lacks {lacking[0]}")
    try:
        with open_table(folder, "scores.csv") as file:
            scores = _read_scores(file)
        if not scores:
            raise ValueError("it ends before the first score")
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise BadInput(f"damaged run {folder}: scores.csv: {error}") from None
    return Run(Path(folder), summary, scores)


def _read_scores(file):
    """Read the rows of scores.csv, a hundred thousand maybe: those of a probe share the fields that say what it is."""
    rows, probes = [], {}
    for row in csv.DictReader(file):
        if None in row or None in row.values():
            raise ValueError("a row has other columns than the first")
        own = {column: sys.intern(row.pop(column)) for column in SCORE_COLUMNS if column != "name"}
        own |= {k: float(own[k]) if own[k] else None for k in ("value", "low", "high")}
        rows.append(ChainMap(own, probes.setdefault(own["probe"], row)))
    return rows


def store_of(run, path=None):
    """Open the store that a run was made from, at `path` if it was moved. Raises BadInput if that is another one."""
    store = open_store(path or run.summary["store"])
    if store.id != run.summary["store_id"]:
        raise BadInput(
            f"store {store.path} (id {store.id[:8]}) is not the one of run {run.path} "
            f"(id {run.summary['store_id'][:8]})"
        )
    return store


def select(run, rule):
    """Choose probes by the validation score: "best map", or "best top1 per optimizer.lr,head".

    Returns probe ids, one per group, in order of first appearance; of equal scores the first. The best
    is the lowest of nll and ece, else the highest. Only the split that the grid selects on is looked at;
    that is never test, unless the run says parity. Raises BadInput for a rule that cannot be read.
    """
    match = re.fullmatch(r"\s*best\s+(\w+)(?:\s+per\s+([\w.,\s]+?))?\s*", str(rule))
    if not match:
        raise BadInput(
            f"--select {rule!r}: expected 'best METRIC' or 'best METRIC per FIELD,...', as in 'best map per loss'"
        )
    metric, split = match.group(1).lower(), run.summary["select"]["split"]
    rows = [r for r in run.scores if r["split"] == split and r["value"] is not None]
    metrics = sorted({r["metric"] for r in run.scores})
    if metric not in metrics:
        raise BadInput(
            f"--select {rule!r}: no scores of {metric!r}{nearest(metric, metrics)} (there are {', '.join(metrics)})"
        )
    columns = [_column(name.strip(), run.fields, rule) for name in (match.group(2) or "").split(",") if name.strip()]
    winners = {}
    for row in rows:
        group = tuple(row[c] for c in columns)
        if row["metric"] == metric and (
            group not in winners or gain(metric, row["value"]) > gain(metric, winners[group]["value"])
        ):
            winners[group] = row
    if not winners:
        raise BadInput(f"--select {rule!r}: every probe of run {run.path} diverged")
    return [row["probe"] for row in winners.values()]


def _column(name, fields, rule):
    for column in (name, f"{name}.type"):
        if column in fields:
            return column
    inside = [column for column in fields if column.endswith(f".{name}")]
    hint = (
        f"; did you mean {' or '.join(map(repr, inside))}?"
        if inside
        else nearest(name, [*fields, *(column.partition(".")[0] for column in fields)])
    )
    raise BadInput(f"--select {rule!r}: unknown field {name!r}{hint}")
