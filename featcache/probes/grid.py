"""A grid file: YAML in which any field may be a list, and lists multiply."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from featcache.errors import BadInput, nearest
from featcache.probes.spec import (
    UNIFORM_OFFSET,
    Head,
    Loss,
    Optimizer,
    ProbeSpec,
    Schedule,
)

METRICS = ("map", "top1", "top5")


@dataclass(frozen=True)
class Grid:
    """A checked grid. splits: role (train, val, test) to the store's splits. select: (metric, split)."""

    specs: tuple[ProbeSpec, ...]
    splits: dict[str, tuple[str, ...]]
    metric: str | None
    split: str
    store: str | None
    content: dict


class Number:
    """A number in a range; text such as 1e-3, which YAML 1.1 does not read as a number, is coerced."""

    def __init__(self, low, high=math.inf, integer=False, above=False, default=None):
        self.low, self.high, self.integer, self.above, self.default = low, high, integer, above, default

    def read(self, value):
        """Return the number, or raise ValueError that says what is expected."""
        kind = "a whole number" if self.integer else "a number"
        expected = f"{kind} {'above' if self.above else 'of at least'} {self.low:g}"
        expected += f" and at most {self.high:g}" if self.high < math.inf else ""
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        inside = (number > self.low if self.above else number >= self.low) and number <= self.high
        if not inside or math.isinf(number) or (self.integer and number != int(number)):
            raise ValueError(f"{value!r} is not {expected}")
        return int(number) if self.integer else number


class Choice:
    """One of a few words, or true/false."""

    def __init__(self, *words, default=None):
        self.words, self.default = words, default

    def read(self, value):
        """Return the word, or raise ValueError with the nearest one."""
        for word in self.words:
            if value == word and isinstance(value, bool) == isinstance(word, bool):
                return word
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, self.words))}{nearest(value, self.words)}")


class Text:
    """A non-empty string."""

    default = None

    def read(self, value):
        """Return the string, or raise ValueError."""
        if not isinstance(value, str) or not value:
            raise ValueError(f"{value!r} is not a word")
        return value


class Offset(Number):
    """A number of either sign, or -ln(C-1), which becomes one when the number of classes is known."""

    def read(self, value):
        """Return the number or the word, or raise ValueError."""
        if value == UNIFORM_OFFSET:
            return value
        try:
            return super().read(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {UNIFORM_OFFSET}") from None


class Milestones:
    """A list by nature: epochs (whole numbers) or fractions of the run (below 1), rising."""

    default = None

    def read(self, value):
        """Return a tuple of floats, or raise ValueError."""
        points = tuple(Number(0, above=True).read(v) for v in value)
        if not points or list(points) != sorted(set(points)) or any(p >= 1 and p != int(p) for p in points):
            raise ValueError(f"{value!r} is not a rising list of epochs, or of fractions below 1")
        return points


class Views:
    """A whole number, or `all`, which reads as None: all that the store has."""

    default = "all"

    def read(self, value):
        """Return the number or None, or raise ValueError."""
        if value == "all":
            return None
        try:
            return Number(0, integer=True).read(value)
        except ValueError as error:
            raise ValueError(f"{error}, nor all") from None


WARMUP = {"warmup_epochs": Number(0, default=0.0)}
DECAY = {"weight_decay": Number(0, default=0.0)}


def _head(type, **fields):
    if type == "bcos":
        fields["bias"] = False
        if fields["layers"] == 1:
            # Nothing lies between layers: the widths and norms of a grid are meant for its deeper heads.
            fields |= {"hidden": 0, "norm": "none"}
    return Head(type, **fields)


OFFSET = Offset(-1e6, 1e6, default=0.0)
# Of every head.
LOGITS = {"pool": Choice("after", "before", default="after"), "offset": OFFSET}
BIAS = {"bias": Choice(True, False, default=True)}
HIDDEN = Number(1, integer=True, default=2048)
# Sections that are chosen by their `type`, with the fields of each type.
SECTIONS = {
    "head": (_head, {
        "linear": {**BIAS, **LOGITS},
        "mlp": {
            "layers": Number(2, 8, integer=True, default=2),
            "hidden": HIDDEN,
            "norm": Choice("bn", "bnu", "none", default="bn"),
            **BIAS,
            **LOGITS,
        },
        "bcos": {
            "layers": Number(1, 8, integer=True, default=1),
            "hidden": HIDDEN,
            "b": Number(1, 16, default=2.0),
            "max_out": Number(1, 64, integer=True, default=1),
            "norm": Choice("bnu", "none", default="bnu"),
            **LOGITS,
        },
    }),
    "loss": (Loss, {"bce": {}, "ce": {}}),
    "optimizer": (Optimizer, {
        "sgd": {"lr": Number(0, above=True), "momentum": Number(0, 0.9999, default=0.9), **DECAY},
        "adam": {"lr": Number(0, above=True), **DECAY},
    }),
    "schedule": (Schedule, {
        "constant": WARMUP,
        "step": {"milestones": Milestones(), "gamma": Number(0, 1, above=True, default=0.1), **WARMUP},
        "cosine": WARMUP,
    }),
}  # fmt: skip
FIELDS = {
    "features": Text(),
    "epochs": Number(1, integer=True),
    "batch_size": Number(1, integer=True, default=64),
    "seed": Number(0, 2**63 - 1, integer=True, default=0),
    "views": Views(),
}
DEFAULTS = {"schedule": "constant"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML readers otherwise settle in silence."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_grid(path):
    """Read and check a grid file. Raises BadInput that names every wrong field by its YAML path."""
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise BadInput(f"grid not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read grid {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"grid {path}{where}: {getattr(error, 'problem', None) or error}") from None
    return parse_grid(content, path)


def parse_grid(content, path="grid"):
    """Turn a grid's content (dicts and lists, as YAML gives them) into a Grid. Raises BadInput."""
    errors = []
    if not isinstance(content, dict):
        raise BadInput(f"grid {path}: expected fields store, splits, select, probes at the top")
    _unknown(content, ("store", "splits", "select", "probes"), "", errors)
    splits = _splits(content.get("splits", {}), errors)
    metric, split = _select(content.get("select", {}), splits, errors)
    store = content.get("store")
    if store is not None and not isinstance(store, str):
        errors.append(f"store: {store!r} is not a path")
    groups = content.get("probes")
    if not isinstance(groups, list) or not groups:
        errors.append("probes: expected a list of at least one group")
        groups = []
    specs, seen = [], {}
    for number, group in enumerate(groups):
        for spec in _expand(group, f"probes[{number}]", errors):
            if spec.id in seen:
                errors.append(f"probes[{number}]: repeats a probe of {seen[spec.id]}")
                break
            seen[spec.id] = f"probes[{number}]"
            specs.append(spec)
    if errors:
        head = f"grid {path}: " if len(errors) == 1 else f"grid {path} has {len(errors)} errors:\n  "
        raise BadInput(head + "\n  ".join(errors))
    return Grid(tuple(specs), splits, metric, split, store, content)


def _unknown(fields, known, path, errors):
    for key in fields:
        if key not in known:
            errors.append(f"{path}{key}: unknown field{nearest(key, known)} (known: {', '.join(known)})")


def _splits(value, errors):
    roles = {"train": ("train",), "val": ("val",), "test": ("test",)}
    if not isinstance(value, dict):
        errors.append("splits: expected train, val and test")
        return roles
    _unknown(value, roles, "splits.", errors)
    for role in roles.keys() & value.keys():
        names = value[role] if isinstance(value[role], list) else [value[role]]
        if not names or not all(isinstance(n, str) for n in names):
            errors.append(f"splits.{role}: expected the name of a split, or a list of them")
        else:
            roles[role] = tuple(names)
    for a, b in itertools.combinations(roles, 2):
        both = set(roles[a]) & set(roles[b])
        if both:
            errors.append(f"splits.{b}: {sorted(both)[0]!r} is in splits.{a} too; the roles must be kept apart")
    return roles


def _select(value, splits, errors):
    if not isinstance(value, dict):
        errors.append("select: expected metric and split")
        return None, "val"
    _unknown(value, ("metric", "split"), "select.", errors)
    metric, split = value.get("metric"), value.get("split", "val")
    if metric is not None and metric not in METRICS:
        errors.append(f"select.metric: {metric!r} is not one of {', '.join(METRICS)}{nearest(metric, METRICS)}")
    if split == "test":
        errors.append("select.split: choosing on test gives a score that is too good; choose on val")
    elif split not in splits:
        errors.append(f"select.split: {split!r} is not one of train, val{nearest(split, splits)}")
    return metric, split


def _expand(group, path, errors):
    """Yield the ProbeSpecs of one group, or none if anything in it is wrong."""
    before = len(errors)
    if not isinstance(group, dict):
        errors.append(f"{path}: expected a group of fields")
        return
    _unknown(group, ("name", *FIELDS, *SECTIONS), f"{path}.", errors)
    axes = {"name": [group.get("name", "probe")]}
    if not isinstance(axes["name"][0], str):
        errors.append(f"{path}.name: {axes['name'][0]!r} is not a word")
    for key, field in FIELDS.items():
        axes[key] = _alternatives(group.get(key, field.default), field, f"{path}.{key}", errors)
    for key, (make, types) in SECTIONS.items():
        given = group.get(key, DEFAULTS.get(key))
        values = given if isinstance(given, list) else [given]
        axes[key] = [
            make(**fields)
            for n, value in enumerate(values)
            for fields in _section(value, types, f"{path}.{key}" + (f"[{n}]" if given is values else ""), errors)
        ]
        if key == "head":
            axes[key] = list(dict.fromkeys(axes[key]))
        if not values:
            errors.append(f"{path}.{key}: an empty list leaves no probe")
    if len(errors) == before:
        for values in itertools.product(*axes.values()):
            yield ProbeSpec(**dict(zip(axes, values, strict=True)))


def _section(value, types, path, errors):
    """Yield the fields of one section, {"type": ..., ...}, for every combination of its lists."""
    if value is None:
        errors.append(f"{path}: missing (one of {', '.join(types)})")
        return
    fields = value if isinstance(value, dict) else {"type": value}
    chosen = _alternatives(fields.get("type"), Choice(*types), f"{path}.type" if fields is value else path, errors)
    for kind in chosen:
        schema = types[kind]
        _unknown(fields, ("type", *schema), f"{path}.", errors)
        axes = [_alternatives(fields.get(k, f.default), f, f"{path}.{k}", errors) for k, f in schema.items()]
        for values in itertools.product(*axes):
            yield {"type": kind, **dict(zip(schema, values, strict=True))}


def _alternatives(value, field, path, errors):
    """Return the values that a field stands for: one, a list's, or a range's."""
    if value is None:
        errors.append(f"{path}: missing")
        return []
    if isinstance(field, Milestones):
        values = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    elif isinstance(value, dict) and isinstance(field, Number):
        values = _log_range(value, path, errors)
    else:
        values = value if isinstance(value, list) else [value]
        if not values:
            errors.append(f"{path}: an empty list leaves no probe")
    result = []
    for number, item in enumerate(values):
        try:
            result.append(field.read(item))
        except (ValueError, TypeError) as error:
            where = f"{path}[{number}]" if values is value else path
            reason = error if isinstance(error, ValueError) else f"{item!r} is not a list"
            errors.append(f"{where}: {reason}")
    return result


def _log_range(value, path, errors):
    """log: [lo, hi, n] gives n values in geometric progression, ends included, to 6 digits."""
    try:
        (low, high, count) = value["log"]
        low, high = Number(0, above=True).read(low), Number(0, above=True).read(high)
        count = Number(2, 10_000, integer=True).read(count)
    except (KeyError, TypeError, ValueError):
        errors.append(
            f"{path}: expected a number, a list, or log: [lowest, highest, how many]; all above 0, at least 2"
        )
        return []
    ratio = high / low
    return [float(f"{low * ratio ** (i / (count - 1)):.6g}") for i in range(count)]
