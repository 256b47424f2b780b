"""What probes are called in tables and plots: by the fields in which they differ."""

from featcache.probes.grids.fields import part_fields
from featcache.probes.identity import REGISTRIES
from featcache.probes.runs.run import short_names

# Of every name, whether probes differ in them or not; and what they are made of.
HEAD, LOSS = "head", "loss"
NAMED = ("head.type", "head.layers", "head.hidden", "loss.type")


def naming(run, probes=None):
    """Return {short name of a field: function of a row of scores.csv to its text}, for what tells probes apart.

    Head and loss, whatever else differs between these probes (by default all of the run), and the seed last.
    A field that the type of a section does not have, such as the momentum of adam, is a dash. What the head tells,
    as its group's features and optimizer often are, is left out.
    """
    rows = {row["probe"]: row for row in run.scores if probes is None or row["probe"] in probes}.values()
    names = short_names(run.fields)
    # A probe that was trained elsewhere has nothing but its name; its source is a hash.
    others = [field for field in run.fields if field not in (*NAMED, "source", "seed")]
    varying = [field for field in others if _varies(field, rows) and not _told_by_head(field, rows)]
    varying += ["seed"] if _varies("seed", rows) else []
    texts = {HEAD: describe_head, LOSS: lambda row: row["loss.type"]}
    return texts | {names[field]: lambda row, field=field: _shortened(_own(row, field)) for field in varying}


def labels(run, probes):
    """Return {probe: its head and loss, and if some are alike in both all that tells these probes apart}."""
    texts = naming(run, probes)
    rows = {probe: run.value(probe, run.metric, run.judge) for probe in probes}
    short = {probe: recipe(row, {name: texts[name] for name in (HEAD, LOSS)}) for probe, row in rows.items()}
    return short if len(set(short.values())) == len(rows) else {p: recipe(row, texts) for p, row in rows.items()}


def recipe(row, texts):
    """Name a probe in a line, as `mlp-2 (256), bce, lr 0.1, seed 1`. texts: of naming(), or some of it."""
    return ", ".join(text(row) if name in (HEAD, LOSS) else f"{name} {text(row)}" for name, text in texts.items())


def describe_head(row):
    """Name a head in a word or two, as `mlp-2 (256)`. row: of scores.csv, or a ProbeSpec.flat()."""
    if int(row["head.layers"]) == 1 and row["head.type"] != "bcos":
        return row["head.type"]
    width = f" ({row['head.hidden']})" if int(row["head.hidden"]) else ""
    return f"{row['head.type']}-{row['head.layers']}{width}"


def _shortened(text):
    """Shorten a number of scores.csv; what is not there is a dash."""
    try:
        return f"{float(text):g}"
    except (TypeError, ValueError):
        return text or "-"


def _varies(field, rows):
    """Whether probes differ in a field; of heads, those that are called the same."""
    seen = {}
    for row in rows:
        value = _own(row, field)
        if value is not None:
            seen.setdefault(describe_head(row) if field.startswith("head.") else None, set()).add(value)
    return any(len(values) > 1 for values in seen.values())


def _told_by_head(field, rows):
    """Whether all probes of a head agree in a field. Only said of heads that have several probes."""
    seen = {}
    for row in rows:
        seen.setdefault(describe_head(row), set()).add(_own(row, field))
    return 2 * len(seen) <= len(rows) and all(len(values) == 1 for values in seen.values())


def _own(row, field):
    """A field's text in a row of scores, None where the type of its section has no such field."""
    section, _, part = field.partition(".")
    if section not in REGISTRIES or part == "type":
        return row[field]
    kind = REGISTRIES[section].get(row[f"{section}.type"])
    return row[field] if kind and part in part_fields(kind) else None
