"""Turn groups of fields into probes: lists and ranges multiply, and random search draws."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import Field
from pydantic.fields import FieldInfo

from featcache.errors import nearest, shown
from featcache.kinds import K, Registry
from featcache.probes.grids.fields import MISSING, GridField, check_known, part_fields, probe_fields, spec_field
from featcache.probes.grids.grid_file import Group
from featcache.probes.grids.ranges import RANGES, Draw, choices, drawn, draws_from, ends, is_range, spread
from featcache.probes.identity import OPTIONAL, REGISTRIES
from featcache.probes.spec import ProbeSpec

V = TypeVar("V")

MOST_PROBES = 100_000
# Random search gives up after this many draws in a row that repeat earlier ones.
MOST_REPEATS = 1000
# Stands for all draws at once, so that everything a search may draw is checked before it starts.
EVERYTHING = Draw(0, -1)
# The fields of a ProbeSpec, in the order in which they multiply.
KEYS = ("name", *probe_fields(), *REGISTRIES)
# The fields of `random`.
RANDOM = {
    "n": GridField("n", FieldInfo.from_annotated_attribute(int, Field(ge=1, le=MOST_PROBES))),
    "seed": GridField("seed", FieldInfo.from_annotated_attribute(int, Field(0, ge=0, lt=2**63))),
}


def all_specs(groups: Iterable[Group], errors: list[str]) -> dict[ProbeSpec, Group]:
    """Return {ProbeSpec: its Group} of all groups, each probe once."""
    specs: dict[ProbeSpec, Group] = {}
    seen: dict[ProbeSpec, str] = {}
    for group in groups:
        for spec in _group_specs(group, errors):
            same = replace(spec, name="")
            if same in seen:
                errors.append(f"{group.path}: repeats a probe of {seen[same]}")
                break
            seen[same] = group.path
            specs[spec] = group
        if len(specs) > MOST_PROBES:
            errors.append(f"{group.path}: more than {MOST_PROBES:,} probes; make several grids of them")
            break
    return specs


def _group_specs(group: Group, errors: list[str]) -> Iterable[ProbeSpec]:
    """Return the ProbeSpecs of one group, or none if anything in the group is wrong."""
    before = len(errors)
    if not isinstance(group.fields, dict):
        errors.append(f"{group.path}: expected a group of fields")
        return []
    for key in group.fields:
        check_known([key], ("from", "random", *KEYS), group.where(key).removesuffix(str(key)), errors)
    if not isinstance(group.fields.get("name", "probe"), str):
        errors.append(f"{group.where('name')}: {shown(group.fields['name'])} is not a word")
    if "random" not in group.fields:
        axes = _axes(group, KEYS, None, errors)
        return _multiplied(axes, group, errors) if len(errors) == before else []
    random = _random(group.fields["random"], group.where("random"), errors)
    _axes(group, KEYS, EVERYTHING, errors)
    return _searched(group, random, errors) if random and len(errors) == before else []


def _searched(group: Group, random: dict[str, int], errors: list[str]) -> list[ProbeSpec]:
    """Return the ProbeSpecs of a random search, which makes draws until n of them differ."""
    before = len(errors)
    changing = [key for key in KEYS if draws_from(group.fields.get(key))]
    axes = _axes(group, KEYS, Draw(random["seed"], 0), errors)
    specs: dict[ProbeSpec, None] = {}
    draws, repeats, number = 0, 0, 0
    while draws < random["n"] and len(specs) <= MOST_PROBES and len(errors) == before:
        new = dict.fromkeys(_multiplied(axes, group, errors))
        number += 1
        axes |= _axes(group, changing, Draw(random["seed"], number), errors)
        draws, repeats = (draws, repeats + 1) if new.keys() <= specs.keys() else (draws + 1, 0)
        specs |= new
        if repeats == MOST_REPEATS:
            errors.append(f"{group.where('random')}.n: {random['n']} draws asked for, and only {draws} differ")
    return list(specs)


def _random(value: Any, path: str, errors: list[str]) -> dict[str, int] | None:
    """Return {n, seed} of a group's random search, or None where they have errors."""
    if not isinstance(value, dict):
        errors.append(f"{path}: expected n, how many to draw, and seed")
        return None
    check_known(value, RANDOM, f"{path}.", errors)
    read = {k: _axis(value, f, f"{path}.{k}", k, None, errors) for k, f in RANDOM.items()}
    for key, values in read.items():
        if len(values) > 1:
            errors.append(f"{path}.{key}: expected one value, not several")
    return {key: values[0] for key, values in read.items()} if all(read.values()) else None


def _axes(group: Group, keys: Iterable[str], draw: Draw | None, errors: list[str]) -> dict[str, list[Any]]:
    """Return {field of a ProbeSpec: its alternatives}, in the order of `keys`. draw: as for alternatives()."""
    axes: dict[str, list[Any]] = {}
    for key in keys:
        path = group.where(key)
        if key == "name":
            axes[key] = [group.fields.get(key, "probe")]
        elif key in REGISTRIES:
            origins = {k[1]: where for k, where in group.origins.items() if isinstance(k, tuple) and k[0] == key}
            if key in OPTIONAL and key not in group.fields:
                axes[key] = [None]
                continue
            given = group.fields.get(key, _default(key))
            axes[key] = list(dict.fromkeys(sections(given, REGISTRIES[key], path, key, origins, draw, errors)))
        else:
            axes[key] = _axis(group.fields, probe_fields()[key], path, key, draw, errors)
    if axes.get("epochs") == [None] and not any(solver.full_batch for solver in axes.get("optimizer", ())):
        errors.append(f"{group.where('epochs')}: missing")
    return axes


def _default(section: str) -> str | None:
    """Return the type of a section where a grid gives none, or None where it must give one."""
    default = spec_field(section).default
    return None if default is MISSING or default is None else default.type


def _axis(
    given: Mapping[Any, Any], field: GridField, path: str, name: str, draw: Draw | None, errors: list[str]
) -> list[Any]:
    """Return the alternatives of a field among the given fields, or else its default."""
    if field.name in given:
        return alternatives(given[field.name], field, path, name, draw, errors)
    if field.default is MISSING:
        errors.append(f"{path}: missing")
        return []
    return [field.default]


def _multiplied(axes: dict[str, list[Any]], group: Group, errors: list[str]) -> list[ProbeSpec]:
    """Return a ProbeSpec for every combination of the alternatives."""
    if _too_many(axes.values(), group.path, errors):
        return []
    specs = [ProbeSpec(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    if any(spec.epochs is None and not spec.optimizer.full_batch for spec in specs):
        errors.append(f"{group.where('epochs')}: missing")
    conflicts = [spec.conflict for spec in specs]
    errors.extend(f"{group.path}: {conflict}" for conflict in dict.fromkeys(conflicts) if conflict)
    return specs


def _too_many(axes: Iterable[Sequence[Any]], path: str, errors: list[str]) -> bool:
    """Return whether alternatives have more combinations than a grid may have probes, and add an error if so."""
    count = math.prod(map(len, axes))
    if count > MOST_PROBES:
        errors.append(f"{path}: {count:,} combinations; a grid has at most {MOST_PROBES:,} probes")
    return count > MOST_PROBES


def sections(
    value: Any,
    registry: Registry[K],
    path: str,
    name: str,
    origins: Mapping[str, str],
    draw: Draw | None,
    errors: list[str],
) -> list[K]:
    """Return the kinds that a section stands for, one for every combination of its alternatives.

    name: the section's, which decides draws. origins: {field: path} of fields that come from another group.
    """
    if value is None:
        errors.append(f"{path}: missing (one of {', '.join(registry)})")
        return []
    result = []
    for item, where in _items(value, path, name, draw, errors):
        fields = item if isinstance(item, dict) else {"type": item}
        place = f"{where}.type" if fields is item else where
        for word in _words(fields.get("type"), registry, place, f"{name}.type", draw, errors):
            kind = registry[word]
            known = part_fields(kind)
            for key in fields:
                check_known([key], ("type", *known), origins.get(key, f"{where}.{key}").removesuffix(str(key)), errors)
            axes = [
                _axis(fields, field, origins.get(k, f"{where}.{k}"), f"{name}.{k}", draw, errors)
                for k, field in known.items()
            ]
            if draw is EVERYTHING or not _too_many(axes, where, errors):
                several = itertools.islice(itertools.product(*axes), MOST_REPEATS if draw is EVERYTHING else None)
                result += [kind(**dict(zip(known, values, strict=True))) for values in several]
    return result


def _words(
    value: Any, registry: Registry[Any], path: str, name: str, draw: Draw | None, errors: list[str]
) -> list[str]:
    """Return the names of the kinds that a type stands for: a word, a list of words, or a choice of them."""
    if value is None:
        errors.append(f"{path}: missing")
        return []
    return _read_all(_items(value, path, name, draw, errors), registry.meant, errors)


def _read_all(items: Iterable[tuple[Any, str]], read: Callable[[Any], V], errors: list[str]) -> list[V]:
    """Return what items [(item, path)] are read as, and add an error for each that is refused with a ValueError."""
    values = []
    for item, where in items:
        try:
            values.append(read(item))
        except ValueError as error:
            errors.append(f"{where}: {error}")
    return values


def _items(value: Any, path: str, name: str, draw: Draw | None, errors: list[str]) -> list[tuple[Any, str]]:
    """Return [(item, path)] of the items of a list or a choice. Anything else is a single item."""
    if isinstance(value, list):
        if not value:
            errors.append(f"{path}: an empty list leaves no probe")
        return [(item, f"{path}[{n}]") for n, item in enumerate(value)]
    if is_range(value) and "choice" in value:
        try:
            chosen = choices(value, name, None if draw is EVERYTHING else draw)
            return [(item, f"{path}.choice[{n}]") for n, item in chosen]
        except ValueError as error:
            errors.append(f"{path}.{error}")
            return []
    return [(value, path)]


def alternatives(value: Any, field: GridField, path: str, name: str, draw: Draw | None, errors: list[str]) -> list[Any]:
    """Return the values that a field stands for: a single one, those of a list, or those of a range.

    name: the field's, which decides draws. draw: the one of a random search that is made, EVERYTHING to check all that
    it may draw, or None without such a search.
    """
    if value is None:
        errors.append(f"{path}: missing")
        return []
    if field.listed and not is_range(value):
        several = isinstance(value, list) and value and isinstance(value[0], list)
        items = [(item, path) for item in (value if several else [value])]
    elif field.numeric and isinstance(value, dict) and not (is_range(value) and "choice" in value):
        items = [(number, path) for number in _numbers(value, field, path, name, draw, errors)]
    else:
        items = _items(value, path, name, draw, errors)
    return _read_all(items, field.read, errors)


def _numbers(
    value: dict[Any, Any], field: GridField, path: str, name: str, draw: Draw | None, errors: list[str]
) -> Sequence[float]:
    """Return the numbers that a range of a field stands for."""
    if not is_range(value):
        hint = nearest(next(iter(value), ""), RANGES)
        errors.append(f"{path}: expected a number, a list, or one of the ranges {', '.join(RANGES)}{hint}")
        return []
    try:
        if "log" in value or "linspace" in value:
            return spread(value, field.integer)
        if draw is None:
            raise ValueError(f"{next(iter(value))}: is drawn from; say how often, with random: {{n: 50}} in the group")
        return ends(value) if draw is EVERYTHING else [drawn(value, name, field.integer, draw)]
    except ValueError as error:
        errors.append(f"{path}.{error}")
        return []
