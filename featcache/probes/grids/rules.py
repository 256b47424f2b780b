"""Rules that pick probes of a grid: those that it excludes, and those that a profile changes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from featcache.errors import nearest
from featcache.kinds import Kind
from featcache.probes.grids.expand import alternatives, sections
from featcache.probes.grids.fields import check_known, known_fields, part_fields, probe_fields
from featcache.probes.identity import REGISTRIES
from featcache.probes.spec import ProbeSpec

# A rule that was read: [((field, its part or None), value or list of values)].
Rule = list[tuple[tuple[str, str | None], Any]]


def _parts_of(field: str) -> tuple[str, ...]:
    """Return the fields of a section of a probe, () if the field is not a section."""
    return ("type", *known_fields(REGISTRIES[field].values())) if field in REGISTRIES else ()


def without(specs: list[ProbeSpec], rules: list[tuple[str, Any]], errors: list[str]) -> list[ProbeSpec]:
    """Return the specs without those that a rule matches. It is an error if a rule drops no probe, or leaves none.

    rules: [(path, rule)]. Nothing is dropped if there are errors already.
    """
    read = [(path, _read(rule, path, errors)) for path, rule in rules]
    if errors:
        return specs
    left = specs
    for path, rule in read:
        if not any(_matches(spec, rule) for spec in specs):
            errors.append(f"{path}: drops no probe; none has these values")
        left = [spec for spec in left if not _matches(spec, rule)]
        if not left:
            errors.append(f"{path}: leaves no probe of the grid")
            break
    return left


def changed(specs: list[ProbeSpec], changes: Any, path: str, errors: list[str]) -> list[ProbeSpec]:
    """Return the specs with the changes of a profile: [{where: rule, set: fields}], one after another."""
    if not isinstance(changes, list):
        errors.append(f"{path}: expected a list of where and set")
        return specs
    for number, change in enumerate(changes):
        specs = _changed(specs, change, f"{path}[{number}]", errors)
    if not errors and len({replace(spec, name="") for spec in specs}) < len(specs):
        errors.append(f"{path}: makes two probes the same")
    return specs


def _changed(specs: list[ProbeSpec], change: Any, path: str, errors: list[str]) -> list[ProbeSpec]:
    if not isinstance(change, dict) or not isinstance(change.get("set"), dict):
        errors.append(f"{path}: expected where, which probes, and set, the fields to change")
        return specs
    check_known(change, ("where", "set"), f"{path}.", errors)
    rule = _read(change["where"], f"{path}.where", errors) if "where" in change else []
    if errors:
        return specs
    if not any(_matches(spec, rule) for spec in specs):
        errors.append(f"{path}.where: no probe has these values")
    return [_set(spec, change["set"], f"{path}.set", errors) if _matches(spec, rule) else spec for spec in specs]


def _set(spec: ProbeSpec, values: dict[Any, Any], path: str, errors: list[str]) -> ProbeSpec:
    """Return a spec with other values in some fields. A section without a type keeps its other fields."""
    fields = probe_fields()
    check_known(values, (*fields, *REGISTRIES), f"{path}.", errors)
    for key, value in values.items():
        where = f"{path}.{key}"
        if key in fields:
            chosen: Sequence[Any] = alternatives(value, fields[key], where, key, None, errors)
        elif key in REGISTRIES and isinstance(value, dict) and "type" not in value and getattr(spec, key) is not None:
            chosen = _parts(getattr(spec, key), value, where, errors)
        elif key in REGISTRIES:
            chosen = sections(value, REGISTRIES[key], where, key, {}, None, errors)
        else:
            continue
        if len(chosen) > 1:
            errors.append(f"{where}: expected one value, not several")
        elif chosen:
            spec = replace(spec, **{key: chosen[0]})
    if spec.conflict:
        errors.append(f"{path}: {spec.conflict}")
    return spec


def _parts(part: Kind, value: dict[Any, Any], path: str, errors: list[str]) -> list[Kind]:
    """Return a part with other values in some fields, once for every combination of their alternatives."""
    fields = part_fields(type(part))
    check_known(value, fields, f"{path}.", errors)
    given = [key for key in value if key in fields]
    axes = [alternatives(value[key], fields[key], f"{path}.{key}", key, None, errors) for key in given]
    return [type(part)(**dict(part) | dict(zip(given, values, strict=True))) for values in itertools.product(*axes)]


def _read(rule: Any, path: str, errors: list[str]) -> Rule:
    """Turn {head: {type: bcos}, "optimizer.lr": 30, loss: ce} into [((field, part or None), value)].

    A list of values stands for any of them. What is wrong is added to `errors`.
    """
    if not isinstance(rule, dict) or not rule:
        errors.append(f"{path}: expected some fields of the probes that are meant")
        return []
    result: Rule = []
    for key, value in rule.items():
        if key in REGISTRIES:
            parts = value if isinstance(value, dict) else {"type": value}
            check_known(parts, _parts_of(key), f"{path}.{key}.", errors)
            result += [((key, part), wanted) for part, wanted in parts.items()]
            continue
        field, _, part = str(key).partition(".")
        own = ("name", *probe_fields())
        if key in own or part in _parts_of(field):
            result.append(((field, part or None), value))
        else:
            words = [*own, *REGISTRIES, *(f"{field}.{part}" for field in REGISTRIES for part in _parts_of(field))]
            errors.append(f"{path}.{key}: unknown field{nearest(key, words)}")
    return result


def _matches(spec: ProbeSpec, rule: Rule) -> bool:
    """Return whether a probe has all values of a rule."""
    for (field, part), wanted in rule:
        value = getattr(spec, field)
        if part is not None:
            # A part has no value for the fields of other types.
            if part not in getattr(type(value), "model_fields", ()):
                return False
            value = getattr(value, part)
        # For views, a grid writes `all` where the spec has None.
        if not _is("all" if value is None and field == "views" else value, wanted):
            return False
    return True


def _is(value: Any, wanted: Any) -> bool:
    """Return whether a probe's value is the one, or one of those, that a rule names."""
    if isinstance(value, tuple):
        return isinstance(wanted, list) and len(wanted) == len(value) and all(map(_is, value, wanted))
    if isinstance(wanted, list):
        return any(_is(value, item) for item in wanted)
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, (int, float)):
        try:
            return value == float(wanted)
        except (TypeError, ValueError, OverflowError):
            return False
    return value == wanted
