"""A grid: fields of its groups may be lists or ranges, which multiply; rules then drop or change some probes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from featcache.arguments import is_path
from featcache.errors import BadInput, nearest, shown
from featcache.probes.grids.expand import all_specs, sections
from featcache.probes.grids.fields import check_known
from featcache.probes.grids.grid_file import Group, assemble, check_size, items, read_content
from featcache.probes.grids.rules import changed, without
from featcache.probes.grids.search import SEARCHES, Halving
from featcache.probes.grids.selection import NOTHING, Refit, Selection, read_refit, read_selection
from featcache.probes.sample import FOLDS
from featcache.probes.spec import ProbeSpec

PathOrStr = str | PathLike[str]
ROLES = ("train", "val", "test")
TOP = (
    "store", "splits", "select", "refit", "intervals", "search", "include", "probes", "exclude", "parity", "allow_overlap",
    "profiles",
)  # fmt: skip
# What a profile may have.
PROFILE = ("splits", "select", "exclude", "change")
# The roles that get intervals by default. Scores on the training images say little about other images.
INTERVALS = ("val", "test")


@dataclass(frozen=True, repr=False)
class Grid:
    """A grid that was read and checked.

    title: what messages call it. groups: for each of the specs, the group that it comes from. splits: {role: splits of the store},
    for the roles train, val and test; without val where the grid names none and gives the split `val` another role.
    selection: how probes are chosen. refit: which of the chosen are trained again, or None. content: the grid with
    included files, groups that start from others, and the profile's splits and selection filled in; it reads as the same grid. parity: name of the profile that was applied. intervals: roles whose scores get an interval.
    """

    title: str
    specs: tuple[ProbeSpec, ...]
    groups: tuple[Group, ...]
    splits: dict[str, tuple[str, ...]]
    selection: Selection
    store: str | None
    content: dict[str, Any]
    search: Halving | None = None
    parity: str | None = None
    intervals: tuple[str, ...] = INTERVALS
    refit: Refit | None = None

    def __repr__(self) -> str:
        return f"Grid({self.title!r}, {len(self.specs)} probes)"

    @property
    def metric(self) -> str | None:
        """The metric by which probes are chosen, None where the grid does not say."""
        return self.selection.metric

    @property
    def chosen_on(self) -> str | None:
        """The role on which probes are chosen, or FOLDS; None where the grid does not say."""
        return FOLDS if self.selection.folds else self.selection.role

    @property
    def allow_overlap(self) -> bool:
        """Whether the grid lets two roles share images."""
        return self.content.get("allow_overlap", False)

    @property
    def reports_all(self) -> bool:
        """Whether the grid chooses nothing, however many configurations it has: select: {split: none}."""
        return self.content.get("select", {}).get("split") == NOTHING

    @property
    def rules(self) -> dict[str, Any]:
        """The fields of the content, other than groups, that decide what a run holds: {} if there are none."""
        keys = ("intervals", "refit", "exclude", "search", "parity", "profiles")
        return {key: self.content[key] for key in keys if key in self.content}


def load_grid(grid: PathOrStr | dict[str, Any], parity: str | None = None) -> Grid:
    """Read and check a grid, given as the path of a YAML file or as its content. Raises BadInput.

    parity: as for parse_grid.
    """
    if isinstance(grid, dict):
        return parse_grid(grid, parity=parity)
    if not is_path(grid):
        raise BadInput(f"grid: expected the path of a YAML file, or its content as a dict, not {shown(grid)}")
    return read_grid(grid, parity)


def read_grid(path: PathOrStr, parity: str | None = None) -> Grid:
    """Read and check a grid file; see parse_grid. Raises BadInput that names every wrong field by its YAML path."""
    return parse_grid(read_content(path), path, parity)


def parse_grid(content: Any, path: PathOrStr = "", parity: str | None = None, title: str | None = None) -> Grid:
    """Turn the content of a grid (dicts and lists, as YAML has them) into a Grid. Raises BadInput.

    path: of the file, to which `include` is relative. parity: name of the profile to apply, by default the grid's own.
    title: what messages call the grid, by default `grid`, with the path if there is one.
    """
    title = title or f"grid {path}".rstrip()
    if not isinstance(content, dict):
        raise BadInput(f"{title}: expected fields such as store, splits, select and probes at the top")
    check_size(content, title)
    errors: list[str] = []
    written = assemble(content, path, TOP, errors)
    content = written.content
    at = {key: f"{written.origins.get(key, '')}{key}" for key in TOP}
    parity = parity or content.get("parity")
    written_splits = (content.get("splits", {}), at["splits"])
    splits = _splits([written_splits], parity is not None, errors)
    selection = read_selection(content.get("select", {}), splits, at["select"], errors)
    refit = read_refit(content.get("refit"), at["refit"], errors)
    intervals = _intervals(content.get("intervals", list(INTERVALS)), at["intervals"], errors)
    search = _search(content.get("search"), at["search"], errors)
    store = content.get("store")
    if store is not None and not isinstance(store, str):
        errors.append(f"{at['store']}: {shown(store)} is not a path")
    if not isinstance(content.get("allow_overlap", False), bool):
        errors.append(f"{at['allow_overlap']}: expected true or false, not {shown(content['allow_overlap'])}")
    if not content["probes"] and not errors:
        errors.append("probes: expected a list of at least one group")
    group_of = all_specs(written.groups, errors)
    specs = without(list(group_of), written.exclude, errors)
    groups = tuple(group_of[spec] for spec in specs)
    for name, profile in _profiles(content.get("profiles", {}), parity, at["profiles"], errors).items():
        where = f"{at['profiles']}.{name}"
        roles = _splits([written_splits, (profile.get("splits", {}), f"{where}.splits")], True, errors)
        choice = read_selection(profile["select"], roles, f"{where}.select", errors) if "select" in profile else None
        kept = without(specs, items(profile, "exclude", "rule", f"{where}.", errors), errors)
        others = changed(kept, profile.get("change", []), f"{where}.change", errors)
        if name == parity:
            profiled = others, tuple(group_of[spec] for spec in kept), roles, choice or selection
    refuse(title, errors)
    if parity is not None:
        own = content["profiles"][parity]
        content |= {"parity": parity, "splits": content.get("splits", {}) | own.get("splits", {})}
        content |= {"select": own["select"]} if "select" in own else {}
        specs, groups, splits, selection = profiled
    return Grid(title, tuple(specs), groups, splits, selection, store, content, search, parity, intervals, refit)


def refuse(title: str, errors: list[str]) -> None:
    """Raise BadInput that lists the errors of a grid, each once, if there are any."""
    errors = list(dict.fromkeys(errors))
    if len(errors) == 1:
        raise BadInput(f"{title}: {errors[0]}")
    if errors:
        raise BadInput(f"{title} has {len(errors)} errors:", *errors)


def _profiles(value: Any, parity: Any, path: str, errors: list[str]) -> dict[str, dict[str, Any]]:
    """Return {name: profile} of the profiles that are dicts, and add errors for the others."""
    if not isinstance(value, dict):
        errors.append(f"{path}: expected names of profiles, each with {', '.join(PROFILE)}")
        return {}
    if parity is not None and parity not in list(value):
        known = f"it has {', '.join(map(str, value))}" if value else "it has none"
        errors.append(f"parity: the grid has no profile {shown(parity)}{nearest(parity, value)} ({known})")
    for name, profile in value.items():
        if not isinstance(profile, dict) or not isinstance(name, str):
            errors.append(f"{path}.{name}: expected the name of a profile, with {', '.join(PROFILE)}")
        else:
            check_known(profile, PROFILE, f"{path}.{name}.", errors)
    return {n: profile for n, profile in value.items() if isinstance(profile, dict)}


def _splits(levels: Sequence[tuple[Any, str]], shared: bool, errors: list[str]) -> dict[str, tuple[str, ...]]:
    """Return {role: splits}. levels: [(`splits` of the grid, then of a profile, its path)], of which the last wins.

    shared: whether val and test may be the same split, as in published protocols.
    """
    roles: dict[str, tuple[str, ...]] = {role: (role,) for role in ROLES}
    where: dict[str, str] = {}
    for value, path in levels:
        if not isinstance(value, dict):
            errors.append(f"{path}: expected train, val and test")
            continue
        check_known(value, ROLES, f"{path}.", errors)
        for role in roles.keys() & value.keys():
            where[role] = path
            names = value[role] if isinstance(value[role], list) else [value[role]]
            if not names or not all(isinstance(n, str) and n for n in names):
                errors.append(f"{path}.{role}: expected the name of a split, or a list of them")
            elif len(set(names)) < len(names):
                errors.append(f"{path}.{role}: names a split twice, whose images would count twice")
            else:
                roles[role] = tuple(names)
    if "val" not in where and any("val" in roles[role] for role in where):
        # The split named val has another role, so that there is none to choose on.
        del roles["val"]
    for a, b in itertools.combinations(roles, 2):
        both = set(roles[a]) & set(roles[b])
        if both and not (shared and a == "val"):
            path = where.get(b, levels[-1][1])
            errors.append(f"{path}.{b}: {sorted(both)[0]!r} is in splits.{a} too; the roles must be kept apart")
    return roles


def _intervals(value: Any, path: str, errors: list[str]) -> tuple[str, ...]:
    """Return the roles whose scores get an interval."""
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in list(ROLES):
            errors.append(f"{path}: {shown(name)} is not one of {', '.join(ROLES)}{nearest(name, ROLES)}")
    return tuple(names)


def _search(value: Any, path: str, errors: list[str]) -> Halving | None:
    """Return the search of a grid, None if it has none."""
    if value is None:
        return None
    searches = sections(value, SEARCHES, path, "search", {}, None, errors)
    if len(searches) > 1:
        errors.append(f"{path}: expected one value for each field, not several")
    return searches[0] if searches else None
