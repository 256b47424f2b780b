"""From groups of fields to probes: lists and ranges multiply, random search draws."""

import itertools
import math
from dataclasses import replace

from featcache.errors import nearest, shown
from featcache.probes.grids.fields import DEFAULTS, FIELDS, SECTIONS, Choice, Milestones, Number
from featcache.probes.grids.ranges import RANGES, Draw, choices, drawn, draws_from, ends, is_range, spread
from featcache.probes.spec import ProbeSpec

MOST_PROBES = 100_000
# Random search gives up after so many draws in a row that were there already.
MOST_REPEATS = 1000
# In place of a draw, to look at all that a search may draw before it does.
EVERYTHING = "everything"
# Of a ProbeSpec, in the order in which they multiply.
KEYS = ("name", *FIELDS, *SECTIONS)
RANDOM = {"n": Number(1, MOST_PROBES, integer=True), "seed": Number(0, 2**63 - 1, integer=True, default=0)}


def check_known(fields, known, path, errors):
    """Add an error for every field that is not known, with the nearest that is. path: ends in a dot."""
    for key in fields:
        if key not in known:
            errors.append(f"{path}{key}: unknown field{nearest(key, known)} (known: {', '.join(known)})")


def all_specs(groups, errors):
    """Return {ProbeSpec: its Group} of all groups, each probe once."""
    specs, seen = {}, {}
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


def _group_specs(group, errors):
    """Return the ProbeSpecs of one group, or none if anything in it is wrong."""
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
    return _searched(group, random, errors) if len(errors) == before else []


def _searched(group, random, errors):
    """Return the ProbeSpecs of a random search: of draws that differ, until there are n."""
    before = len(errors)
    changing = [key for key in KEYS if draws_from(group.fields.get(key))]
    axes = _axes(group, KEYS, Draw(random["seed"], 0), errors)
    found, draws, repeats, number = {}, 0, 0, 0
    while draws < random["n"] and len(found) <= MOST_PROBES and len(errors) == before:
        new = dict.fromkeys(_multiplied(axes, group, errors))
        number += 1
        axes |= _axes(group, changing, Draw(random["seed"], number), errors)
        draws, repeats = (draws, repeats + 1) if new.keys() <= found.keys() else (draws + 1, 0)
        found |= new
        if repeats == MOST_REPEATS:
            errors.append(f"{group.where('random')}.n: {random['n']} draws asked for, and only {draws} differ")
    return list(found)


def _random(value, path, errors):
    """Return {n, seed} of a group's random search, or None and errors."""
    if not isinstance(value, dict):
        errors.append(f"{path}: expected n, how many to draw, and seed")
        return None
    check_known(value, RANDOM, f"{path}.", errors)
    read = {k: alternatives(value.get(k, f.default), f, f"{path}.{k}", k, None, errors) for k, f in RANDOM.items()}
    for key, values in read.items():
        if len(values) > 1:
            errors.append(f"{path}.{key}: expected one value, not several")
    return {key: values[0] for key, values in read.items()} if all(read.values()) else None


def _axes(group, keys, draw, errors):
    """Return {field of a ProbeSpec: its alternatives}, in the order of `keys`. draw: as for alternatives()."""
    axes = {}
    for key in keys:
        path = group.where(key)
        if key == "name":
            axes[key] = [group.fields.get(key, "probe")]
        elif key in FIELDS:
            field = FIELDS[key]
            axes[key] = alternatives(group.fields.get(key, field.default), field, path, key, draw, errors)
        else:
            make, types = SECTIONS[key]
            origins = {k[1]: where for k, where in group.origins.items() if isinstance(k, tuple) and k[0] == key}
            given = group.fields.get(key, DEFAULTS.get(key))
            axes[key] = [make(**fields) for fields in sections(given, types, path, key, origins, draw, errors)]
        if key == "head":
            axes[key] = list(dict.fromkeys(axes[key]))
    return axes


def _multiplied(axes, group, errors):
    if _too_many(axes.values(), group.path, errors):
        return []
    specs = [ProbeSpec(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    conflicts = [spec.conflict for spec in specs]
    errors.extend(f"{group.path}: {conflict}" for conflict in dict.fromkeys(conflicts) if conflict)
    return specs


def _too_many(axes, path, errors):
    count = math.prod(map(len, axes))
    if count > MOST_PROBES:
        errors.append(f"{path}: {count:,} combinations; a grid has at most {MOST_PROBES:,} probes")
    return count > MOST_PROBES


def sections(value, types, path, name, origins, draw, errors):
    """Return the fields of a section, {"type": ..., ...}, for every combination of its alternatives.

    name: of the section, for draws. origins: paths of fields that were written elsewhere.
    """
    if value is None:
        errors.append(f"{path}: missing (one of {', '.join(types)})")
        return []
    result = []
    for item, where in _items(value, path, name, draw, errors):
        fields = item if isinstance(item, dict) else {"type": item}
        place = f"{where}.type" if fields is item else where
        for kind in alternatives(fields.get("type"), Choice(*types), place, f"{name}.type", draw, errors):
            schema = types[kind]
            for key in fields:
                check_known([key], ("type", *schema), origins.get(key, f"{where}.{key}").removesuffix(str(key)), errors)
            axes = [
                alternatives(fields.get(k, f.default), f, origins.get(k, f"{where}.{k}"), f"{name}.{k}", draw, errors)
                for k, f in schema.items()
            ]
            if draw is EVERYTHING or not _too_many(axes, where, errors):
                several = itertools.islice(itertools.product(*axes), MOST_REPEATS if draw is EVERYTHING else None)
                result += [{"type": kind, **dict(zip(schema, values, strict=True))} for values in several]
    return result


def _items(value, path, name, draw, errors):
    """Return [(item, its path)] of a list or a choice; of anything else, itself."""
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


def alternatives(value, field, path, name, draw, errors):
    """Return the values that a field stands for: one, a list's, or a range's.

    draw: of a random search, or EVERYTHING that it may draw; None is no such search.
    """
    if value is None:
        errors.append(f"{path}: missing")
        return []
    if isinstance(field, Milestones) and not is_range(value):
        several = isinstance(value, list) and value and isinstance(value[0], list)
        items = [(item, path) for item in (value if several else [value])]
    elif isinstance(field, Number) and isinstance(value, dict) and not (is_range(value) and "choice" in value):
        items = [(number, path) for number in _numbers(value, field, path, name, draw, errors)]
    else:
        items = _items(value, path, name, draw, errors)
    result = []
    for item, where in items:
        try:
            result.append(field.read(item))
        except (ValueError, TypeError) as error:
            reason = error if isinstance(error, ValueError) else f"{shown(item)} is not a list"
            errors.append(f"{where}: {reason}")
    return result


def _numbers(value, field, path, name, draw, errors):
    """Return the numbers that a range of a field stands for."""
    if not is_range(value):
        meant = nearest(next(iter(value), ""), RANGES)
        errors.append(f"{path}: expected a number, a list, or one of the ranges {', '.join(RANGES)}{meant}")
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
