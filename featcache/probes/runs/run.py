"""A finished run folder, and the choice of probes from it."""

import os
import re
import sys
from collections import ChainMap, Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from featcache.errors import BadInput, nearest
from featcache.probes.overlap import Overlap
from featcache.probes.runs.run_file import ATTRIBUTION, maker, read_file, read_summary
from featcache.probes.runs.tables import SCORE_COLUMNS, read_table
from featcache.probes.scores.metrics import gain
from featcache.store.reader import open_store

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
        return f"Run({str(self.path)!r}, {self.summary['probes']} probes, scored on {self.scored_on})"

    @property
    def metric(self):
        """Name of the metric that probes are chosen by."""
        return self.summary["select"]["metric"]

    @property
    def chosen_on(self):
        """The role that probes are chosen on, or None where nothing is chosen: one configuration, of some seeds."""
        return self.summary["select"].get("split")

    @property
    def scored_on(self):
        """The role whose scores are reported: test, or the selection split where there is no test split."""
        return "test" if "test" in self.summary["rows"] else self.chosen_on

    @property
    def metrics(self):
        """Names of the metrics that the probes are scored with."""
        return tuple(self.summary["chance"][self.scored_on])

    @property
    def fields(self):
        """Columns of the scores that say what a probe is."""
        return [column for column in self.scores[0] if column == "name" or column not in SCORE_COLUMNS]

    def row(self, probe_id, metric, split):
        """Return the row of scores.csv for a probe, metric and split. Raises BadInput if there is none."""
        try:
            return self._rows[probe_id, metric, split]
        except KeyError:
            raise self.damaged("scores.csv", f"no {metric} of {probe_id} on {split}") from None

    @cached_property
    def _rows(self):
        return {(r["probe"], r["metric"], r["split"]): r for r in self.scores}

    def table(self, name, **kinds):
        """Read another table of the run, such as calibration.csv: a list of dicts. Raises BadInput for damage.

        kinds: {column: type} of columns that must be there, and are not left as strings; an empty float is None.
        """
        try:
            rows = list(read_table(self.path, name, self.summary.get("files")))
            return [row | {k: _as(kind, row[k]) for k, kind in kinds.items()} for row in rows]
        except KeyError as error:
            raise self.damaged(name, f"it has no column {error}") from None
        except ValueError as error:
            raise self.damaged(name, error) from None

    def read(self, name):
        """Return the bytes of a file of the run that is no table. Raises BadInput for damage."""
        try:
            return read_file(self.path, name, self.summary.get("files"))
        except ValueError as error:
            raise self.damaged(name, error) from None

    def damaged(self, name, reason):
        """Return the BadInput for damage to a file of the run."""
        return _damaged(self.path, name, reason, self.summary)

    @property
    def caution(self):
        """A line to print beside scores: that nothing was chosen, or that choice or shared images make them too good."""
        chosen, splits = self.chosen_on, self.summary["splits"]
        said = []
        if chosen is None:
            said.append("nothing was chosen: one configuration, its seeds are reported")
        elif set(splits[chosen]) & set(splits[self.scored_on]):
            parity = f" (parity {self.summary['parity']})" if self.summary.get("parity") else ""
            said.append(
                f"chosen on the images that they are scored on, {self.scored_on}{parity}: the scores are too good"
            )
        said += [f"{Overlap(**found)}: scores on them are too good" for found in self.summary.get("overlap", [])]
        return "; ".join(said) or None


def open_run(folder):
    """Open a finished run. Raises BadInput if there is none, it is not finished, or it is damaged."""
    summary = read_summary(folder)
    if "key" not in summary:
        raise BadInput(f"run {folder} is not finished; run the command that makes it again to finish it")
    try:
        scores = _read_scores(read_table(folder, "scores.csv", summary.get("files")))
        if not scores:
            raise ValueError("it ends before the first score")
    except KeyError as error:
        raise _damaged(folder, "scores.csv", f"it has no column {error}", summary) from None
    except ValueError as error:
        raise _damaged(folder, "scores.csv", error, summary) from None
    return Run(Path(folder), summary, scores)


def _damaged(folder, name, reason, summary):
    command = "attribute" if name in ATTRIBUTION else maker(summary)
    return BadInput(f"damaged run {folder}: {name}: {reason}; run the same {command} again, which makes it anew")


def _as(kind, text):
    return None if kind is float and not text else kind(text)


def _read_scores(table):
    """Read the rows of scores.csv, a hundred thousand maybe: those of a probe share the fields that say what it is."""
    rows, probes = [], {}
    for row in table:
        own = {column: sys.intern(row.pop(column)) for column in SCORE_COLUMNS if column != "name"}
        own |= {k: float(own[k]) if own[k] else None for k in ("value", "low", "high")}
        if own["probe"] not in probes:
            _check_fields(row)
        rows.append(ChainMap(own, probes.setdefault(own["probe"], row)))
    return rows


def _check_fields(row):
    """Raise KeyError or ValueError unless the fields that say what a probe is are there, and numbers where tables count."""
    for column in ("name", "head.type", "loss.type", "optimizer.type", "seed"):
        row[column]
    for column in ("head.layers", "head.hidden"):
        int(row[column])
    float(row["optimizer.lr"] or 0)


def store_of(run, path=None):
    """Open the store that a run was made from, at `path` if it was moved. Raises BadInput if that is another one."""
    store = open_store(path or _recorded_store(run))
    if store.id != run.summary["store_id"]:
        raise BadInput(
            f"store {store.path} (id {store.id[:8]}) is not the one of run {run.path} "
            f"(id {run.summary['store_id'][:8]})"
        )
    return store


def _recorded_store(run):
    """Where the store of a run lies. A relative path is that of the folder in which the run was made, often above it."""
    store = run.summary["store"]
    if "://" in store or os.path.isabs(store):
        return store
    places = [Path(store), *(parent / store for parent in run.path.resolve().parents)]
    for place in places:
        # Path.exists() raises an error for a name that is too long.
        if os.path.exists(place):
            return place
    raise BadInput(
        f"run {run.path} was made from store {store}, which is not found from here; say where it is with --store"
    )


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
        return list(dict.fromkeys(row["probe"] for row in _scored(run, run.scored_on)))
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
    rows = _scored(run, run.chosen_on or run.scored_on)
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
