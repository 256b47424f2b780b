"""The fields of a grid: what each may be, as the classes of its parts say it."""

import math
from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True, eq=False)
class GridField:
    """A field of a kind, or of a probe. info: pydantic's, with type, bounds, default and description.

    words: {word: value} of words that stand for a value of another type.
    """

    name: str
    info: FieldInfo
    words: tuple[tuple[str, Any], ...] = ()

    @property
    def default(self) -> Any:
        """What it is where a grid does not say, MISSING if it must."""
        return MISSING if self.info.is_required() else self.info.get_default(call_default_factory=True)

    @cached_property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of its type, without None."""
        return tuple(kind for kind in _alternatives(self.info.annotation) if kind is not type(None))

    @property
    def numeric(self) -> bool:
        """Whether it may be a number, and so a range of numbers."""
        return any(kind in (int, float) for kind, _ in self._typed)

    @property
    def integer(self) -> bool:
        """Whether its numbers are whole."""
        return any(kind is int for kind, _ in self._typed)

    @property
    def listed(self) -> bool:
        """Whether its value is a list by nature."""
        return any(get_origin(kind) is tuple for kind, _ in self._typed)

    @cached_property
    def _typed(self) -> list[tuple[Any, list[Any]]]:
        """[(type, bounds)] of its alternatives."""
        outer = [*self.info.metadata]
        return [(*_unwrapped(kind, outer),) for kind in self.types]

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        annotation = self.info.annotation
        for bound in self.info.metadata:
            annotation = Annotated[annotation, bound]
        return TypeAdapter(annotation)

    def annotations(self) -> list[Any]:
        """Return its alternatives, each with all of its bounds, as types that pydantic understands."""
        return [Annotated[(kind, *bounds)] if bounds else kind for kind, bounds in self._typed]  # type: ignore[valid-type]

    def read(self, value: Any) -> Any:
        """Return a value as its type, or raise ValueError that says what is expected.

        Text such as 1e-3, which YAML 1.1 does not read as a number, is one.
        """
        for word, meaning in self.words:
            if value == word:
                return meaning
        if self.listed and not isinstance(value, (list, tuple)):
            raise ValueError(f"{shown(value)} is not a list")
        try:
            return self._adapter.validate_python(self._numbers(value), strict=True)
        except ValidationError as error:
            raise ValueError(self._reason(value, error)) from None

    def _numbers(self, value: Any) -> Any:
        """Return text that is a number as one, in a list, too."""
        if isinstance(value, (list, tuple)):
            return tuple(map(self._numbers, value)) if self.listed else value
        if not (self.numeric or self.listed) or isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return value
        try:
            # A whole number stays what it is: a float has 53 bits, and a seed 63.
            if isinstance(value, int) and self.integer:
                # Larger ones are no numbers to torch and numpy.
                return value if abs(value) < 2**63 else str(value)
            number = float(value)
        except (ValueError, OverflowError):
            return value
        if not math.isfinite(number):
            # No field takes what is no number.
            return str(value)
        return int(number) if self.integer and number == int(number) else number

    def _reason(self, value: Any, error: ValidationError) -> str:
        first = error.errors()[0]
        if first["type"] == "value_error":
            own = str(first["ctx"]["error"])
            return f"{shown(value)} {own}" if own.startswith("is ") else own
        if self.listed and first["loc"]:
            entry = first["loc"][0]
            return f"{shown(value[entry] if isinstance(entry, int) else value)} is not {self.expected}"
        words = [w for kind, _ in self._typed if get_origin(kind) is Literal for w in get_args(kind)]
        words += [word for word, _ in self.words]
        return f"{shown(value)} is not {self.expected}{nearest(value, words) if words else ''}"

    @cached_property
    def expected(self) -> str:
        """What it may be, in words."""
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


@cache
def part_fields(kind: type[Kind]) -> dict[str, GridField]:
    """Return the fields of a kind by name, without its type."""
    return {name: GridField(name, info) for name, info in kind.model_fields.items() if name != "type"}


@cache
def probe_fields() -> dict[str, GridField]:
    """Return the fields of a probe that are no parts, by name, in the order in which they multiply."""
    infos = ProbeSpec.__pydantic_fields__
    names = [f.name for f in fields(ProbeSpec) if f.name not in (*REGISTRIES, "name", "source")]
    words = {"views": (("all", None),)}
    return {name: GridField(name, infos[name], words.get(name, ())) for name in names}


def known_fields(kinds: Mapping[str, type[Kind]]) -> Iterable[str]:
    """Return the names of all fields that any of these kinds has."""
    return dict.fromkeys(name for kind in kinds.values() for name in part_fields(kind))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _unwrapped(annotation: Any, bounds: list[Any]) -> tuple[Any, list[Any]]:
    """Return the type in an Annotated, and the bounds that it and what is around it say."""
    if get_origin(annotation) is not Annotated:
        return annotation, bounds
    inner, *metadata = get_args(annotation)
    found = [b for m in metadata for b in (m.metadata if isinstance(m, FieldInfo) else [m])]
    return _unwrapped(inner, [*bounds, *found])


def _range_in_words(kind: str, bounds: list[Any]) -> str:
    low = next((f"above {b.gt:g}" for b in bounds if isinstance(b, Gt)), None)
    low = low or next((f"of at least {b.ge:g}" for b in bounds if isinstance(b, Ge)), None)
    high = next((f"at most {b.le:g}" for b in bounds if isinstance(b, Le)), None)
    high = high or next((f"below {b.lt:g}" for b in bounds if isinstance(b, Lt)), None)
    return " ".join(filter(None, (kind, " and ".join(filter(None, (low, high))))))
