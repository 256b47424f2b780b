"""A finished run folder, and the choice of probes from it."""

import csv
import json
import re
import sys
import zlib
from collections import ChainMap, Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import click

from featcache.arguments import is_path
from featcache.atomic import local_path
from featcache.errors import BadInput, nearest, shown
from featcache.probes.overlap import Overlap
from featcache.probes.probe_file import remedy
from featcache.probes.scores.metrics import gain
from featcache.probes.tables import ATTRIBUTION, attribution_files, damaged_files, find_table, open_table
from featcache.store.reader import open_store
from featcache.store.sealed import unseal

FILE = "run.json"
# Of scores.csv, before the fields of the probe.
SCORE_COLUMNS = ("probe", "name", "split", "metric", "value", "low", "high", "epoch")


# Of fields whose own last word is long.
SHORT = {"optimizer.weight_decay": "wd"}


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run: its folder, the contents of run.json, and the rows of scores.csv.

    scores: mappings as in the file, with value, low and high as floats (None where the probe diverged).
    """

    path: Path
    summary: dict
    scores: list

    def __repr__(self):
        return f"Run({str(self.path)!r}, {self.summary['probes']} probes, scored on {self.judge})"

    @property
    def metric(self):
        """Name of the metric that probes are chosen by."""
        return self.summary["select"]["metric"]

    @property
    def chosen_on(self):
        """The role that probes are chosen on, or None where nothing is chosen: one configuration, of some seeds."""
        return self.summary["select"].get("split")

    @property
    def judge(self):
        """The role whose scores are reported: test, or the selection split where there is no test split."""
        return "test" if "test" in self.summary["rows"] else self.chosen_on

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

    def check(self, name):
        """Compare a table with its checksum, if the run has any. Raises BadInput."""
        path, maker = find_table(self.path, name), "attribute" if name.startswith("attribution") else "train-probes"
        known = attribution_files(self.path) if maker == "attribute" else self.summary.get("files", {})
        if path.name not in known and ATTRIBUTION in known:
            path = self.path / ATTRIBUTION
        for damaged, what in damaged_files(self.path, {path.name: known[path.name]} if path.name in known else {}):
            raise BadInput(f"damaged run {self.path}: {damaged}: {what}; {remedy(self.path, maker)}")

    def table(self, name):
        """Read another table of the run, such as calibration.csv: a list of dicts of strings. Raises BadInput."""
        self.check(name)
        try:
            with open_table(self.path, name) as file:
                return list(csv.DictReader(file))
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"damaged run {self.path}: {name}: {getattr(error, 'strerror', None) or error}") from None

    @property
    def caution(self):
        """A line to print beside scores: that nothing was chosen, or that choice or shared images make them too good."""
        chosen, splits = self.chosen_on, self.summary["splits"]
        said = []
        if chosen is None:
            said.append("nothing was chosen: one configuration, its seeds are reported")
        elif set(splits[chosen]) & set(splits[self.judge]):
            parity = f" (parity {self.summary['parity']})" if self.summary.get("parity") else ""
            said.append(f"chosen on the images that they are scored on, {self.judge}{parity}: the scores are too good")
        said += [f"{Overlap(**found)}: scores on them are too good" for found in self.summary.get("overlap", [])]
        return "; ".join(said) or None


def read_summary(folder):
    """Read run.json, finished or not. Raises BadInput if `folder` is no run folder."""
    if not is_path(folder):
        raise BadInput(f"run: expected the path of a folder, not {shown(folder)}")
    path = local_path(folder, "--run")
    try:
        data = (path / FILE).read_bytes()
    except IsADirectoryError:
        data = b""
    except OSError:
        there = "is not a run folder (it has no readable run.json)" if path.exists() else "not found"
        raise BadInput(f"run {folder} {there}") from None
    try:
        # Runs of older versions are not sealed.
        summary = json.loads(data)
        if not isinstance(summary, dict):
            raise ValueError("it is no table")
        if "crc32" in summary:
            summary = unseal(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"damaged run {folder}: {FILE}: {error}; featcache verify {folder} --repair drops it, and the same command "
            "that made the run makes it anew"
        ) from None
    return summary


def open_run(folder):
    """Open a finished run. Raises BadInput if there is none, or it is not finished."""
    summary = read_summary(folder)
    if "key" not in summary:
        raise BadInput(f"run {folder} is not finished; run the command that makes it again to finish it")
    lacking = [field for field in ("store", "store_id", "splits", "select", "rows", "chance") if field not in summary]
    if lacking:
        raise BadInput(f"damaged run {folder}: run.json lacks {lacking[0]}")
    if not _fits(summary):
        raise BadInput(f"damaged run {folder}: the fields of run.json are not those of a run; {remedy(folder)}")
    if "files" not in summary:
        _say_unsealed(folder)
    found = Run(Path(folder), summary, [])
    found.check("scores.csv")
    try:
        with open_table(folder, "scores.csv") as file:
            scores = _read_scores(file)
        if not scores:
            raise ValueError("it ends before the first score")
    except (OSError, EOFError, zlib.error, KeyError, ValueError) as error:
        raise BadInput(f"damaged run {folder}: scores.csv: {error}") from None
    return Run(Path(folder), summary, scores)


@lru_cache(maxsize=1 << 10)
def _say_unsealed(folder):
    """Once for each run."""
    click.echo(
        f"notice: run {folder} is of an older version, without checksums: its files are taken as they are", err=True
    )


def _fits(summary):
    """Whether the fields of a run.json are of their kinds, and speak of the same roles."""
    names = summary["splits"], summary["select"], summary["rows"], summary["chance"], summary.get("files", {})
    if not all(isinstance(table, dict) for table in names) or not isinstance(summary["store"], str):
        return False
    roles = summary["splits"].keys()
    lists = all(isinstance(splits, list) and all(isinstance(s, str) for s in splits) for splits in names[0].values())
    same = roles == summary["rows"].keys() == summary["chance"].keys()
    role = summary["select"].get("split")
    judged = "test" in roles or role in roles
    return lists and same and judged and "metric" in summary["select"] and (role is None or role in roles)


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


def short_names(fields):
    """Return {field: short name} of fields of probes, such as `lr` for optimizer.lr and `head` for head.type.

    Fields whose short names would be the same keep their own.
    """
    short = {
        f: SHORT.get(f) or (f.removesuffix(".type") if f.endswith(".type") else f.rpartition(".")[2]) for f in fields
    }
    often = Counter(short.values())
    return {field: name if often[name] == 1 else field for field, name in short.items()}


def best(run, per=""):
    """Choose probes by the run's own metric, the best for each combination of some fields ("head,loss").

    Where nothing is chosen these are all that did not diverge. Returns ids, as `select` does. Raises BadInput.
    """
    if run.chosen_on is None:
        return list(dict.fromkeys(row["probe"] for row in _scored(run, run.judge)))
    return select(run, f"best {run.metric}{f' per {per}' if per else ''}")


def select(run, rule):
    """Choose probes by the validation score: "best map", or "best top1 per lr,head".

    Returns probe ids, one per group, in order of first appearance; of equal scores the first. The best
    is the lowest of nll and ece, else the highest. Only the split that the grid selects on is looked at;
    that is never test, unless the run says parity. Raises BadInput for a rule that cannot be read, and
    where the run has no split to choose on.
    """
    match = re.fullmatch(r"\s*best\s+(\w+)(?:\s+per\s+([\w.,\s]+?))?\s*", str(rule))
    if not match:
        raise BadInput(
            f"--select {rule!r}: expected 'best METRIC' or 'best METRIC per FIELD,...', as in 'best map per loss'"
        )
    if run.chosen_on is None and run.summary["probes"] > 1:
        raise BadInput(
            f"--select {rule!r}: run {run.path} has no split to choose on, only the seeds of one configuration; "
            "name probes with --probe"
        )
    metric = match.group(1).lower()
    rows = _scored(run, run.chosen_on or run.judge)
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
    return [row["probe"] for row in winners.values()]


def _scored(run, split):
    """The rows of a run's scores on a split of which there are values. Raises BadInput if there are none."""
    rows = [row for row in run.scores if row["split"] == split and row["value"] is not None]
    if not rows:
        raise BadInput(f"every probe of run {run.path} diverged")
    return rows


def _column(name, fields, rule):
    known = {field: field for field in fields} | {short: field for field, short in short_names(fields).items()}
    inside = [column for column in fields if column.endswith(f".{name}")]
    if name in known or len(inside) == 1:
        return known.get(name) or inside[0]
    hint = f"; did you mean {' or '.join(map(repr, inside))}?" if inside else nearest(name, known)
    raise BadInput(f"--select {rule!r}: unknown field {name!r}{hint}")
