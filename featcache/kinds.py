"""Kinds: what a user chooses by name, such as a head or an attribution method. One class in one file each.

A kind's class holds its fields with their types, defaults and bounds, the line that documents it, and what it does.
A registry has the kinds of one sort by name: the project's own, and those that other packages bring through
entry points (docs/architecture.md, "To add a kind").
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from featcache.errors import BadInput, nearest, shown


class Kind(BaseModel):
    """Base of all kinds. A subclass says its name as `type: Literal["sgd"] = "sgd"`, and its fields as pydantic does."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: str

    # Other words that people write for it.
    aliases: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def word(cls) -> str:
        """Return the name that users choose this kind by."""
        return str(cls.model_fields["type"].default)

    @classmethod
    def summary(cls) -> str:
        """Return the line that documents this kind: the first of its docstring."""
        return (cls.__doc__ or "").partition("\n")[0]


K = TypeVar("K", bound=Kind)


class Registry(Mapping[str, type[K]]):
    """The kinds of one sort by name, in order: the project's own, then those of installed packages.

    base: the class that all of them are subclasses of. group: of the entry points, such as "featcache.heads".
    noun: what one of them is called in messages, such as "head".
    """

    def __init__(self, base: type[K], group: str, noun: str, own: list[type[K]]):
        self.base, self.group, self.noun, self.own = base, group, noun, own

    @cached_property
    def _kinds(self) -> dict[str, type[K]]:
        kinds = {kind.word(): kind for kind in self.own}
        sources = dict.fromkeys(kinds, "featcache")
        for point in entry_points(group=self.group):
            package = f"package {point.dist.name}" if point.dist else "an installed package"
            if point.name in kinds:
                raise BadInput(
                    f"two {self.noun}s are called {point.name!r}: one of {sources[point.name]} and {point.value} of "
                    f"{package}; rename or uninstall one"
                )
            kinds[point.name], sources[point.name] = self._load(point, package), package
        return kinds

    def _load(self, point: EntryPoint, package: str) -> type[K]:
        try:
            kind = point.load()
        except Exception as error:
            raise BadInput(
                f"{self.noun} {point.name!r}: {point.value} of {package} cannot be imported: "
                f"{type(error).__name__}: {error}; mend or uninstall it"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise BadInput(f"{self.noun} {point.name!r}: {point.value} of {package} is no {self.base.__name__}")
        if kind.word() != point.name:
            raise BadInput(f"{self.noun} {point.name!r}: {point.value} of {package} calls itself {kind.word()!r}")
        return kind

    def __getitem__(self, name: str) -> type[K]:
        return self._kinds[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def meant(self, word: object) -> str:
        """Return the name that a word means: in any case, or one of a kind's aliases. Raises ValueError."""
        if isinstance(word, str):
            plain = word.lower().replace("-", "_")
            for name, kind in self.items():
                if plain == name or plain in kind.aliases:
                    return name
        raise ValueError(f"{shown(word)} is not one of {', '.join(self)}{nearest(word, self)}")

    def named(self, name: str, where: str) -> type[K]:
        """Return the kind of a name. where: what a message begins with. Raises BadInput for an unknown one."""
        if name not in self:
            known = ", ".join(self._kinds)
            raise BadInput(f"{where}: unknown {self.noun} {name!r}{nearest(name, self._kinds)} (known: {known})")
        return self._kinds[name]
