"""The fields of a grid, read from the classes of its parts: what values each may have, and how they are read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from featcache.errors import nearest, shown
from featcache.kinds import Kind
from featcache.probes.identity import REGISTRIES
from featcache.probes.spec import ProbeSpec

MISSING = object()
# Fields of a probe that a group does not give as fields of its own.
NOT_IN_GROUPS = ("name", "source", "fold", "refit", "stop")


@dataclass(frozen=True, eq=False)
class GridField:
    """A field of a kind, or of a probe.

    info: pydantic's, with type, bounds, default and description. words: [(word, value)] for words that stand for a
    value of another type.
    """

    name: str
    info: FieldInfo
    words: tuple[tuple[str, Any], ...] = ()

    @property
    def default(self) -> Any:
        """The value of the field where a grid gives none, MISSING where it must give one."""
        return MISSING if self.info.is_required() else self.info.get_default(call_default_factory=True)

    @property
    def numeric(self) -> bool:
        """Whether the field may be a number, and so a range of numbers."""
        return any(kind in (int, float) for kind, _ in self._typed)

    @property
    def integer(self) -> bool:
        """Whether its numbers are whole."""
        return any(kind is int for kind, _ in self._typed)

    @property
    def listed(self) -> bool:
        """Whether a single value of the field is a list."""
        return any(get_origin(kind) is tuple for kind, _ in self._typed)

    @cached_property
    def _typed(self) -> list[tuple[Any, list[Any]]]:
        """[(type, bounds)] of its alternatives, without None."""
        annotation = self.info.annotation
        kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        return [_unwrapped(kind, self.info.metadata) for kind in kinds if kind is not type(None)]

    @property
    def _choices(self) -> list[Any]:
        """The words, or other values, that it may have beside those of a type."""
        return [word for kind, _ in self._typed if get_origin(kind) is Literal for word in get_args(kind)]

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(_bounded(self.info.annotation, self.info.metadata))

    def annotations(self) -> list[Any]:
        """Return its alternatives, each with its bounds, as types that pydantic understands."""
        return [_bounded(kind, bounds) for kind, bounds in self._typed]

    def read(self, value: Any) -> Any:
        """Return a value as the type of the field. Raises ValueError, which says what is expected.

        Text such as 1e-3, which YAML 1.1 does not read as a number, is taken as one.
        """
        for word, meaning in self.words:
            if value == word:
                return meaning
        if self.listed and not isinstance(value, (list, tuple)) and value not in self._choices:
            words = "".join(f", or {word}" for word in self._choices)
            raise ValueError(f"{shown(value)} is not a list{words}{nearest(value, self._choices)}")
        try:
            return self._adapter.validate_python(self._numbers(value), strict=True)
        except ValidationError as error:
            raise ValueError(self._reason(value, error)) from None

    def _numbers(self, value: Any) -> Any:
        """Turn text that means a number into one, also within a list."""
        if isinstance(value, (list, tuple)):
            return tuple(map(self._numbers, value)) if self.listed else value
        if not (self.numeric or self.listed) or isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return value
        try:
            # A whole number is not made a float, which has 53 bits where a seed has 63.
            if isinstance(value, int) and self.integer:
                # torch and numpy take no larger ones. As text it is refused below.
                return value if abs(value) < 2**63 else str(value)
            number = float(value)
        except (ValueError, OverflowError):
            return value
        if not math.isfinite(number):
            # No field takes nan or inf. As text they are refused.
            return str(value)
        return int(number) if self.integer and number == int(number) else number

    def _reason(self, value: Any, error: ValidationError) -> str:
        """Say why pydantic refused a value."""
        first = error.errors()[0]
        if first["type"] == "value_error":
            own = str(first["ctx"]["error"])
            return f"{shown(value)} {own}" if own.startswith("is ") else own
        if self.listed and first["loc"]:
            entry = first["loc"][0]
            return f"{shown(value[entry] if isinstance(entry, int) else value)} is not {self.expected}"
        words = self._choices + [word for word, _ in self.words]
        return f"{shown(value)} is not {self.expected}{nearest(value, words) if words else ''}"

    @cached_property
    def expected(self) -> str:
        """The values that the field may have, in words."""
        choices = [get_args(kind) for kind, _ in self._typed if get_origin(kind) is Literal]
        choices += [(True, False) for kind, _ in self._typed if kind is bool]
        if choices and len(self._typed) == 1:
            return f"one of {', '.join(map(str, choices[0]))}"
        parts = []
        for kind, bounds in self._typed:
            if get_origin(kind) is tuple:
                kind, bounds = _unwrapped(get_args(kind)[0], [])
            if kind in (int, float):
                parts.append(_range_in_words("a whole number" if kind is int else "a number", bounds))
            elif kind is str:
                parts.append("a word")
        parts += [str(word) for group in choices for word in group]
        parts += [word for word, _ in self.words]
        return ", or ".join(parts)


def part_fields(kind: type[Kind]) -> dict[str, GridField]:
    """Return {name: field} of a kind, without its type."""
    return _part_fields(kind)


@cache
def _part_fields(kind: type[Kind]) -> dict[str, GridField]:
    return {name: GridField(name, info) for name, info in kind.model_fields.items() if name != "type"}


@cache
def spec_field(name: str) -> GridField:
    """Return a field of ProbeSpec, which may be a section."""
    words: dict[str, Any] = {"all": None} if name == "views" else {}
    return GridField(name, vars(ProbeSpec)["__pydantic_fields__"][name], tuple(words.items()))


@cache
def probe_fields() -> dict[str, GridField]:
    """Return {name: field} of the fields of a probe other than sections, in the order in which they multiply."""
    names = [f.name for f in fields(ProbeSpec) if f.name not in (*REGISTRIES, *NOT_IN_GROUPS)]
    return {name: spec_field(name) for name in names}


def known_fields(kinds: Iterable[type[Kind]]) -> tuple[str, ...]:
    """Return the names of all fields that any of these kinds has."""
    return tuple(dict.fromkeys(name for kind in kinds for name in part_fields(kind)))


def check_known(fields: Iterable[Any], known: Iterable[str], path: str, errors: list[str]) -> None:
    """Add an error for every field that is not known, with the nearest that is. path: ends in a dot."""
    known = list(known)
    for key in fields:
        if key not in known:
            errors.append(f"{path}{key}: unknown field{_hint(key, known)} (known: {', '.join(known)})")


def _hint(key: Any, known: Sequence[str]) -> str:
    """Return a hint at the field that an unknown one may mean: one of a section, or the nearest."""
    section = _section_of().get(key) if isinstance(key, str) else None
    if section in known:
        return f"; did you mean '{section}.{key}', {key} in the section {section}?"
    return nearest(key, known)


@cache
def _section_of() -> dict[str, str]:
    """Return {field: section} for the fields that people write outside their section."""
    sections = ("finetune", "schedule", "loss", "optimizer", "head")
    return {name: section for section in sections for name in known_fields(REGISTRIES[section].own)}


def _bounded(annotation: Any, bounds: Iterable[Any]) -> Any:
    """Return a type with bounds, as pydantic understands it."""
    for bound in bounds:
        annotation = Annotated[annotation, bound]
    return annotation


def _unwrapped(annotation: Any, bounds: list[Any]) -> tuple[Any, list[Any]]:
    """Return the type within an Annotated, and its bounds after those that are given."""
    if get_origin(annotation) is not Annotated:
        return annotation, bounds
    inner, *metadata = get_args(annotation)
    inner_bounds = [b for m in metadata for b in (m.metadata if isinstance(m, FieldInfo) else [m])]
    return _unwrapped(inner, [*bounds, *inner_bounds])


def _range_in_words(kind: str, bounds: list[Any]) -> str:
    low = next((f"above {b.gt:g}" for b in bounds if isinstance(b, Gt)), None)
    low = low or next((f"of at least {b.ge:g}" for b in bounds if isinstance(b, Ge)), None)
    high = next((f"at most {b.le:g}" for b in bounds if isinstance(b, Le)), None)
    high = high or next((f"below {b.lt:g}" for b in bounds if isinstance(b, Lt)), None)
    return " ".join(filter(None, (kind, " and ".join(filter(None, (low, high))))))
