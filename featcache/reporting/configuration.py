"""What probes are called in tables and plots: their head and loss, and the other fields in which they differ."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from featcache.probes.grids.fields import part_fields
from featcache.probes.heads import HEADS
from featcache.probes.identity import REGISTRIES
from featcache.probes.imported import ImportedSolver
from featcache.probes.runs.run import Run, short_names

# A row of scores.csv, or the part of it that says what a probe is.
Row = Mapping[str, Any]
# From a row to a text about its probe, by what the text is called.
Texts = Mapping[str, Callable[[Row], str]]

# Two names that every probe has, whether probes differ in them or not, and the fields that they are made of.
HEAD, LOSS = "head", "loss"
NO_LOSS = "-"
NAMED = ("head.type", "loss.type")


def naming(run: Run, probes: Collection[str] | None = None) -> Texts:
    """Return {short name of a field: function of a row to its text} for the fields that tell probes apart.

    probes: ids, by default all of the run. Head and loss come first, whether they differ or not, and the seed last. Where
    no head is trained there is no loss.
    A field that the type of a section does not have, such as the momentum of adam, is a dash. Fields that follow
    from the head, as the features and the optimizer often do, are left out.
    """
    rows = list({row["probe"]: row for row in run.scores if probes is None or row["probe"] in probes}.values())
    headed = [(describe_head(row), row) for row in rows]
    names = short_names(run.fields)
    # The source of a probe that was trained elsewhere is a hash, which tells people less than its name.
    others = [field for field in run.fields if field not in (*NAMED, "source", "seed", "refit_of", "stop")]
    varying = [field for field in others if _varies(field, headed) and not _told_by_head(field, headed)]
    varying += ["seed"] if _varies("seed", headed) else []
    named: dict[str, Callable[[Row], str]] = {HEAD: describe_head}
    if any(_describe_loss(row) != NO_LOSS for row in rows):
        named[LOSS] = _describe_loss
    return named | {names[field]: _text_of(field) for field in varying}


def labels(run: Run, probes: Sequence[str]) -> dict[str, str]:
    """Return {probe: its head and loss}, followed by all that tells these probes apart if two are alike in both."""
    rows = {probe: run.row(probe, run.metric, run.scored_on) for probe in probes}
    short = {probe: head_and_loss(row) for probe, row in rows.items()}
    if len(set(short.values())) == len(rows):
        return short
    texts = naming(run, probes)
    return {probe: recipe(row, texts) for probe, row in rows.items()}


def recipe(row: Row, texts: Texts) -> str:
    """Name a probe in a line, as `mlp-2 (256), bce, lr 0.1, seed 1`. texts: of naming(), or some of them."""
    named = {name: text(row) for name, text in texts.items()}
    if named.get(LOSS) == NO_LOSS:
        del named[LOSS]
    return ", ".join(text if name in (HEAD, LOSS) else f"{name} {text}" for name, text in named.items())


def head_and_loss(row: Row) -> str:
    """Name a probe by its head and loss alone, as `mlp-2 (256), bce`."""
    return recipe(row, {HEAD: describe_head, LOSS: _describe_loss})


def training(row: Row, texts: Texts) -> str:
    """Say how a probe was trained, as `lr 0.1, seed 1`; of a probe that was trained elsewhere only its name is known."""
    if row["optimizer.type"] == ImportedSolver.word():
        return f"imported ({row['name']})"
    return recipe(row, {name: text for name, text in texts.items() if name not in (HEAD, LOSS)})


def describe_head(row: Row) -> str:
    """Name a head in a word or two, as `mlp-2 (256)`."""
    kind = HEADS.get(row["head.type"])
    if kind is None:
        # The package that brought it is not installed any more.
        return row["head.type"]
    return kind.label_of(
        {field.removeprefix("head."): text for field, text in row.items() if field.startswith("head.")}
    )


def _describe_loss(row: Row) -> str:
    """Name a loss, or a dash for a head that is not trained, which reads only the labels by it."""
    kind = HEADS.get(row["head.type"])
    return NO_LOSS if kind is not None and not kind.trains else row["loss.type"]


def _text_of(field: str) -> Callable[[Row], str]:
    """Return a function from a row to a field's text, where numbers are short and a field that is missing is a dash."""

    def text(row: Row) -> str:
        value = _own(row, field)
        try:
            return f"{float(value):g}"
        except (TypeError, ValueError):
            return value or "-"

    return text


def _varies(field: str, rows: Iterable[tuple[str, Row]]) -> bool:
    """Whether probes, given as (name of the head, row), differ in a field; in one of the head, those of the same name."""
    values: dict[str | None, set] = {}
    for head, row in rows:
        value = _own(row, field)
        if value is not None:
            values.setdefault(head if field.startswith("head.") else None, set()).add(value)
    return any(len(different) > 1 for different in values.values())


def _told_by_head(field: str, rows: Sequence[tuple[str, Row]]) -> bool:
    """Whether all probes of each head agree in a field. False where heads have less than two probes on average."""
    values: dict[str, set] = {}
    for head, row in rows:
        values.setdefault(head, set()).add(_own(row, field))
    return 2 * len(values) <= len(rows) and all(len(different) == 1 for different in values.values())


def _own(row: Row, field: str) -> Any:
    """A field's text in a row, None where the type of its section has no such field."""
    section, _, part = field.partition(".")
    if section not in REGISTRIES or part == "type":
        return row[field]
    kind: Any = REGISTRIES[section].get(row[f"{section}.type"])
    return row[field] if kind and part in part_fields(kind) else None
