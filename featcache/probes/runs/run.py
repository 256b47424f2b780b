"""A finished run, and rules that choose probes from it."""

import os
import re
import sys
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from featcache.errors import BadInput, nearest
from featcache.probes.overlap import Overlap
from featcache.probes.runs.run_file import TABLES, Summary, maker, of_attribution, read_file, read_summary
from featcache.probes.runs.seeds import shared_fields
from featcache.probes.runs.tables import SCORE_COLUMNS, read_table
from featcache.probes.runs.tuned import BACKBONES, is_tuned
from featcache.probes.sample import FOLDS
from featcache.probes.scores.metrics import gain
from featcache.store.reader import Store, open_store

# A row of scores.csv: {column: value}.
ScoreRow = Mapping[str, Any]
# Short names of fields whose own last word is long.
SHORT = {"optimizer.weight_decay": "wd"}


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run: its folder, the content of run.json, and the rows of scores.csv.

    scores: mappings as in the file, with value, low and high as floats (None where the probe diverged).

        run = featcache.open_run("runs/voc")
        run.row(run.scores[0]["probe"], "map", run.scored_on)["value"]
    """

    path: Path
    summary: Summary
    scores: list[ScoreRow]

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.summary['probes']} probes, scored on {self.scored_on})"

    @property
    def metric(self) -> str:
        """Name of the metric that probes are chosen by."""
        return self.summary["select"]["metric"]

    @property
    def chosen_on(self) -> str | None:
        """The role that probes are chosen on, FOLDS for folds of train, or None where the run has one configuration and nothing is chosen."""
        return self.summary["select"].get("split")

    @property
    def scored_on(self) -> str:
        """The role whose scores are reported: test, or where there is none the role that probes are chosen on."""
        return "test" if "test" in self.summary["rows"] else self.summary["select"]["split"]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the probes are scored with."""
        return tuple(self.summary["chance"][self.scored_on])

    @property
    def fields(self) -> list[str]:
        """Columns of the scores that describe the probe."""
        return [column for column in self.scores[0] if column == "name" or column not in SCORE_COLUMNS]

    def row(self, probe_id: str, metric: str, role: str) -> ScoreRow:
        """Return the row of scores.csv for a probe, metric and role. Raises BadInput if there is none."""
        try:
            return self._rows[probe_id, metric, role]
        except KeyError:
            raise self.damaged("scores.csv", f"no {metric} of {probe_id} on {role}") from None

    def chosen_by(self, probe_id: str) -> ScoreRow:
        """Return the row by which a probe was chosen, or not: that of the probe itself, or of the one that it is a refit of."""
        if self.chosen_on is None:
            raise ValueError("nothing is chosen in this run")
        return self.row(self.sources.get(probe_id, probe_id), self.metric, self.chosen_on)

    @cached_property
    def sources(self) -> dict[str, str]:
        """{id of a probe that was trained again: id of the probe that was chosen}."""
        return {row["probe"]: row["refit_of"] for row in self.scores if row.get("refit_of")}

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str], ScoreRow]:
        return {(r["probe"], r["metric"], r["split"]): r for r in self.scores}

    @cached_property
    def configurations(self) -> int:
        """How many configurations the probes have: those that differ in their seed alone are of one."""
        return len({str(shared_fields(row)) for row in {row["probe"]: row for row in self.scores}.values()})

    def table(self, name: str, **types: type) -> list[dict[str, Any]]:
        """Read another table of the run, such as calibration.csv, as a list of dicts. Raises BadInput for damage.

        types: {column: type} of columns that the table must have; other columns stay strings. An empty float is None.
        """
        try:
            rows = list(read_table(self.path, name, self.summary.get("files")))
            return [row | {column: _as(kind, row[column]) for column, kind in types.items()} for row in rows]
        except KeyError as error:
            raise self.damaged(name, f"it has no column {error}") from None
        except ValueError as error:
            raise self.damaged(name, error) from None

    @property
    def attribution_table(self) -> str:
        """The name of the table that attribute wrote, in the format that it was asked for."""
        files = self.summary.get("files")
        return next((name for name in TABLES[1:] if name in (files or ())), TABLES[0])

    def read(self, name: str) -> bytes:
        """Return the bytes of a file of the run other than a table. Raises BadInput for damage."""
        try:
            return read_file(self.path, name, self.summary.get("files"))
        except ValueError as error:
            raise self.damaged(name, error) from None

    def damaged(self, name: str, reason: object) -> BadInput:
        """Return the BadInput for damage to a file of the run."""
        return _damaged(self.path, name, reason, self.summary)

    @property
    def caution(self) -> str | None:
        """A line to print beside scores, or None: nothing was chosen, or the choice or shared images flatter them."""
        chosen, splits = self.chosen_on, self.summary["splits"]
        cautions = []
        if chosen is None:
            several = self.configurations > 1
            what = "all probes are reported" if several else "one configuration, its seeds are reported"
            cautions.append(f"nothing was chosen: {what}")
        elif set(splits["train" if chosen == FOLDS else chosen]) & set(splits[self.scored_on]):
            parity = f" (parity {self.summary['parity']})" if self.summary.get("parity") else ""
            cautions.append(
                f"chosen on the images that they are scored on, {self.scored_on}{parity}: the scores are too good"
            )
        overlaps = [Overlap(**fields) for fields in self.summary.get("overlap", [])]
        cautions += [f"{overlap}: scores on them are too good" for overlap in overlaps]
        return "; ".join(cautions) or None


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Open a finished run. Raises BadInput if there is none, it is not finished, or it is damaged.

    run = featcache.open_run("runs/voc")
    """
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


def _damaged(folder: str | os.PathLike[str], name: str, reason: object, summary: Summary) -> BadInput:
    command = "attribute" if of_attribution(name) else maker(summary)
    return BadInput(f"damaged run {folder}: {name}: {reason}; run the same {command} again, which makes it anew")


def _as(kind: type, text: str) -> Any:
    return None if kind is float and not text else kind(text)


def _read_scores(table: Iterator[dict[str, str]]) -> list[ScoreRow]:
    """Return the rows of scores.csv. There may be 100,000, so the rows of a probe share the fields that describe it."""
    rows: list[ScoreRow] = []
    probes: dict[str, dict[str, str]] = {}
    for row in table:
        own: dict[str, Any] = {column: sys.intern(row.pop(column)) for column in SCORE_COLUMNS if column != "name"}
        own |= {k: float(own[k]) if own[k] else None for k in ("value", "low", "high")}
        if own["probe"] not in probes:
            _check_fields(row)
        rows.append(ChainMap(own, probes.setdefault(own["probe"], row)))
    return rows


def _check_fields(row: Mapping[str, str]) -> None:
    """Raise KeyError or ValueError unless the fields that tables need are there, and are numbers where they must be."""
    for column in ("name", "head.type", "loss.type", "optimizer.type", "seed"):
        row[column]
    for column in ("head.layers", "head.hidden"):
        int(row[column])
    float(row["optimizer.lr"] or 0)


def store_of(run: Run, path: str | os.PathLike[str] | None = None) -> Store:
    """Open the store that a run was made from, as the run knows it: it may have grown since.

    path: where it is, if it was moved. Raises BadInput for another store.
    """
    if is_tuned(run.summary):
        raise BadInput(
            f"run {run.path} was fine-tuned on images and has no store; extract with one of its backbones, {BACKBONES}/ID"
            ".safetensors, and train probes on that"
        )
    store, id = open_store(path or _recorded_store(run)), run.summary["store_id"]
    if id not in store.ids:
        raise BadInput(
            f"store {store.path} (id {store.id[:8]}) is not the one of run {run.path} "
            f"(id {run.summary['store_id'][:8]})"
        )
    return store.known_as(id)


def _recorded_store(run: Run) -> str | os.PathLike[str]:
    """Return the place of a run's store.

    A relative path starts from the folder in which the run was made, which is often one above the run.
    """
    store: str = run.summary["store"]
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


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Return {field: short name} for fields of probes, such as `lr` for optimizer.lr and `head` for head.type.

    Fields keep their own names where two short names would be the same.
    """
    short = {
        f: SHORT.get(f) or (f.removesuffix(".type") if f.endswith(".type") else f.rpartition(".")[2]) for f in fields
    }
    counts = Counter(short.values())
    return {field: name if counts[name] == 1 else field for field, name in short.items()}


def best(run: Run, per: str = "") -> list[str]:
    """Choose probes by the run's own metric: the best one, or with `per` ("head,loss") the best for each combination.

    In a run where nothing is chosen, these are all probes that did not diverge. Returns ids, as `select` does. Raises
    BadInput.
    """
    if run.chosen_on is None:
        return list(dict.fromkeys(row["probe"] for row in _scored(run, run.scored_on)))
    return select(run, f"best {run.metric}{f' per {per}' if per else ''}")


def select(run: Run, rule: str) -> list[str]:
    """Choose probes by a rule about their scores: "best map", or "best top1 per lr,head".

    Returns probe ids, one per group, in order of first appearance; the first of equal scores wins. In a run that trains
    the chosen probes again, these are the ids of the refits. The best score is
    the lowest for nll and ece, and the highest for all others. Only scores on run.chosen_on count, which is never test
    unless the run was made under parity. Raises BadInput for a rule that cannot be read, and for a run without a split
    to choose on.
    """
    match = re.fullmatch(r"\s*best\s+(\w+)(?:\s+per\s+([\w.,\s]+?))?\s*", str(rule))
    if not match:
        raise BadInput(
            f"--select {rule!r}: expected 'best METRIC' or 'best METRIC per FIELD,...', as in 'best map per loss'"
        )
    if run.chosen_on is None and run.summary["probes"] > 1:
        only = "" if run.configurations > 1 else ", only the seeds of one configuration"
        raise BadInput(f"--select {rule!r}: run {run.path} has no split to choose on{only}; name probes with --probe")
    metric = match.group(1).lower()
    rows = _scored(run, run.chosen_on or run.scored_on)
    metrics = sorted({r["metric"] for r in run.scores})
    if metric not in metrics:
        raise BadInput(
            f"--select {rule!r}: no scores of {metric!r}{nearest(metric, metrics)} (there are {', '.join(metrics)})"
        )
    per = [name.strip() for name in (match.group(2) or "").split(",") if name.strip()]
    columns = [field_column(name, run.fields, f"--select {rule!r}") for name in per]
    if run.sources:
        return _best_refits(run, metric, columns, rule)
    return list(_best(rows, metric, columns).values())


def _best_refits(run: Run, metric: str, columns: Sequence[str], rule: str) -> list[str]:
    """Return the refits of the best probes per group, of those that were trained again."""
    rows = _scored(run, run.chosen_on or run.scored_on)
    # A refit that diverged has no scores.
    whole = {row["probe"] for row in _scored(run, run.scored_on)}
    refits = {source: refit for refit, source in run.sources.items() if refit in whole}
    best, chosen = _best(rows, metric, columns), _best([r for r in rows if r["probe"] in refits], metric, columns)
    if best.keys() != chosen.keys() or metric != run.metric:
        per = ", ".join(run.summary.get("refit", {}).get("per", ()))
        raise BadInput(
            f"--select {rule!r}: run {run.path} trained again the best {run.metric} per {per}; ask for these, say "
            "refit: {per: [...]} in the grid, or name probes with --probe"
        )
    return [refits[probe] for probe in chosen.values()]


def _best(rows: Iterable[ScoreRow], metric: str, columns: Sequence[str]) -> dict[tuple[Any, ...], str]:
    """Return {values of the columns: the probe with the best score by a metric}, in order of first appearance."""
    winners: dict[tuple[Any, ...], ScoreRow] = {}
    for row in rows:
        group = tuple(row[c] for c in columns)
        if row["metric"] == metric and (
            group not in winners or gain(metric, row["value"]) > gain(metric, winners[group]["value"])
        ):
            winners[group] = row
    return {group: row["probe"] for group, row in winners.items()}


def _scored(run: Run, role: str) -> list[ScoreRow]:
    """Return the rows of a run's scores on a role that have a value. Raises BadInput if there are none."""
    rows = [row for row in run.scores if row["split"] == role and row["value"] is not None]
    if not rows:
        raise BadInput(f"every probe of run {run.path} diverged")
    return rows


def field_column(name: str, fields: Sequence[str], where: str) -> str:
    """Return the column that a field of a rule means, by its own or its short name. Raises BadInput, which begins with where."""
    known = {field: field for field in fields} | {short: field for field, short in short_names(fields).items()}
    inside = [column for column in fields if column.endswith(f".{name}")]
    if name in known or len(inside) == 1:
        return known.get(name) or inside[0]
    hint = f"; did you mean {' or '.join(map(repr, inside))}?" if inside else nearest(name, known)
    raise BadInput(f"{where}: unknown field {name!r}{hint}")
