"""Rules over the probes of a grid: which ones it excludes, and what a parity profile changes."""

import itertools
from dataclasses import replace

from featcache.errors import nearest
from featcache.probes.grids.expand import alternatives, check_known, sections
from featcache.probes.grids.fields import FIELDS, SECTIONS
from featcache.probes.spec import PER

# All fields of a probe, as rules name them: {field: names of its parts}.
PARTS = {key: () for key in ("name", *FIELDS)} | {
    key: ("type", *dict.fromkeys(part for schema in types.values() for part in schema))
    for key, (_, types) in SECTIONS.items()
}


def without(specs, rules, errors):
    """Drop the probes that a rule matches. A rule that drops none is an error, and so is one that leaves none.

    rules: [(path, rule)]. Nothing is dropped where there are errors already.
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


def changed(specs, changes, path, errors):
    """Return the specs with the changes of a profile: [{where: rule, set: fields}], one after another."""
    if not isinstance(changes, list):
        errors.append(f"{path}: expected a list of where and set")
        return specs
    for number, change in enumerate(changes):
        specs = _changed(specs, change, f"{path}[{number}]", errors)
    if not errors and len({replace(spec, name="") for spec in specs}) < len(specs):
        errors.append(f"{path}: makes two probes the same")
    return specs


def _changed(specs, change, path, errors):
    if not isinstance(change, dict) or not isinstance(change.get("set"), dict):
        errors.append(f"{path}: expected where, which probes, and set, the fields to change")
        return specs
    check_known(change, ("where", "set"), f"{path}.", errors)
    rule = _read(change["where"], f"{path}.where", errors) if "where" in change else []
    if errors:
        return specs
    meant = [_matches(spec, rule) for spec in specs]
    if not any(meant):
        errors.append(f"{path}.where: no probe has these values")
    return [_set(s, change["set"], f"{path}.set", errors) if m else s for s, m in zip(specs, meant, strict=True)]


def _set(spec, values, path, errors):
    """Return a spec with some fields set; a section without a type keeps its other fields."""
    check_known(values, (*FIELDS, *SECTIONS), f"{path}.", errors)
    for key, value in values.items():
        where = f"{path}.{key}"
        if key in FIELDS:
            found = alternatives(value, FIELDS[key], where, key, None, errors)
        elif key in SECTIONS:
            make, types = SECTIONS[key]
            if isinstance(value, dict) and "type" not in value:
                found = _parts(getattr(spec, key), value, types, where, errors)
            else:
                found = sections(value, types, where, key, {}, None, errors)
            found = [make(**fields) for fields in found]
        else:
            continue
        if len(found) > 1:
            errors.append(f"{where}: expected one value, not several")
        elif found:
            spec = replace(spec, **{key: found[0]})
    if spec.conflict:
        errors.append(f"{path}: {spec.conflict}")
    return spec


def _parts(section, value, types, path, errors):
    """Return the fields of a section with some of them set, as `sections` does."""
    schema = types[section.type]
    check_known(value, schema, f"{path}.", errors)
    kept = {"type": section.type} | {key: getattr(section, key) for key in schema}
    given = [key for key in value if key in schema]
    read = [alternatives(value[key], schema[key], f"{path}.{key}", key, None, errors) for key in given]
    return [kept | dict(zip(given, values, strict=True)) for values in itertools.product(*read)]


def _read(rule, path, errors):
    """Turn {head: {type: bcos}, "optimizer.lr": 30, loss: ce} into [((field, part or None), value)].

    A list of values stands for any of them. Returns None, and adds to `errors`, if anything is wrong.
    """
    if not isinstance(rule, dict) or not rule:
        errors.append(f"{path}: expected some fields of the probes that are meant")
        return None
    before, result = len(errors), []
    for key, value in rule.items():
        if PARTS.get(key):
            parts = value if isinstance(value, dict) else {"type": value}
            check_known(parts, PARTS[key], f"{path}.{key}.", errors)
            result += [((key, part), wanted) for part, wanted in parts.items()]
            continue
        field, _, part = str(key).partition(".")
        if key in PARTS or part in PARTS.get(field, ()):
            result.append(((field, part or None), value))
        else:
            words = [*PARTS, *(f"{field}.{part}" for field, parts in PARTS.items() for part in parts)]
            errors.append(f"{path}.{key}: unknown field{nearest(key, words)}")
    return result if len(errors) == before else None


def _matches(spec, rule):
    for (field, part), wanted in rule:
        value = getattr(spec, field)
        if part is not None:
            # A type's own parts: what stands in for the others is no value that anybody gave.
            if part != "type" and part not in SECTIONS[field][1].get(value.type, ()):
                return False
            value = getattr(value, part)
        if not _is(_written(value, field, part, spec), wanted):
            return False
    return True


def _written(value, field, part, spec):
    """A value as a grid writes it, where None stands for a word."""
    if value is not None:
        return value
    return {("views", None): "all", ("schedule", "per"): PER.get(spec.schedule.type)}.get((field, part))


def _is(value, wanted):
    """Whether a probe's value is the one that a rule names, or one of them."""
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
