"""The fields of a grid as a JSON schema, with which editors complete and check it."""

from typing import Any

from pydantic import TypeAdapter

from featcache.kinds import Kind, Registry
from featcache.probes.grids.expand import RANDOM
from featcache.probes.grids.fields import MISSING, GridField, known_fields, part_fields, probe_fields, spec_field
from featcache.probes.grids.grid import ROLES
from featcache.probes.grids.search import SEARCHES
from featcache.probes.grids.selection import MOST_FOLDS, NOTHING, REFIT_ON
from featcache.probes.identity import REGISTRIES
from featcache.probes.scores.metrics import METRICS

Schema = dict[str, Any]

# YAML 1.1 reads 1e-3 as text, which featcache takes for the number that it means.
NUMBER_AS_TEXT: Schema = {"type": "string", "pattern": r"^[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"}


def schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of a grid, with the kinds of installed packages.

    json.dump(featcache.schema(), open("grid.schema.json", "w"))
    """
    on = {"type": "array", "items": {"enum": list(REFIT_ON)}, "minItems": 2}
    splits = {role: {"$ref": "#/$defs/names"} for role in ROLES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "featcache grid",
        "description": "A grid of probes; docs/grid.md explains it.",
        "type": "object",
        "properties": {
            "store": {"type": "string", "description": "path of the store"},
            "splits": _object(splits, "the store's splits in the roles train, val and test"),
            "select": _object(
                {
                    "metric": {"enum": list(METRICS)},
                    "split": {"enum": ["train", "val", NOTHING]},
                    "folds": {"type": "integer", "minimum": 2, "maximum": MOST_FOLDS},
                },
                "how the best probe is chosen",
            ),
            "refit": {
                "description": "the roles that chosen probes are trained on again",
                "anyOf": [on, _object({"on": on, "per": {"$ref": "#/$defs/names"}})],
            },
            "intervals": _one_or_more({"enum": list(ROLES)}, "roles whose scores get an interval"),
            "search": _section("search", SEARCHES),
            "include": {"$ref": "#/$defs/names", "description": "other grid files, whose fields this one takes over"},
            "probes": {"type": "array", "items": {"$ref": "#/$defs/group"}},
            "exclude": {"type": "array", "items": {"type": "object"}, "description": "probes to leave out"},
            "parity": {"type": "string", "description": "name of the profile to apply"},
            "allow_overlap": {"type": "boolean", "description": "whether two roles may share images"},
            "profiles": {"type": "object", "additionalProperties": {"type": "object"}},
        },
        "additionalProperties": False,
        "$defs": {"names": _one_or_more({"type": "string"}), "group": _group()}
        | {name: _section(name, kinds) for name, kinds in REGISTRIES.items()}
        | {f"one {name}": _one_of(kinds) for name, kinds in [*REGISTRIES.items(), ("search", SEARCHES)]},
    }


def _group() -> Schema:
    properties: Schema = {
        "name": {"type": "string", "description": "what tables call the group"},
        "from": {"type": "string", "description": "name of the group that this one starts from"},
        "random": _object({name: _value(field) for name, field in RANDOM.items()}, "random search"),
    }
    properties |= {name: _field(field) for name, field in probe_fields().items()}
    properties |= {name: {"$ref": f"#/$defs/{name}"} for name in REGISTRIES}
    required = [name for name in (*probe_fields(), *REGISTRIES) if spec_field(name).default is MISSING]
    needed = [{"required": required}, {"required": ["from"]}]
    return {"type": "object", "properties": properties, "additionalProperties": False, "anyOf": needed}


def _section(name: str, kinds: Registry[Any]) -> Schema:
    """Return the schema of a section: one of its kinds, or a list of these."""
    one: Schema = {"$ref": f"#/$defs/one {name}"}
    words = ", ".join(kinds)
    return {"description": f"the {name}: {words}", "anyOf": [one, {"type": "array", "items": one}, _choice(one)]}


def _one_of(kinds: Registry[Any]) -> Schema:
    """Return the schema of one kind: a word, or an object with its fields."""
    words: Schema = {"enum": [word for kind in kinds.values() for word in (kind.word(), *kind.aliases)]}
    fields: Schema = {name: {} for name in known_fields(kinds.values())}
    # A section of a group that starts from another may leave out its type, and a type may be a list.
    loose = {
        "type": "object",
        "properties": {"type": _one_or_more(words)} | fields,
        "additionalProperties": False,
        "not": {"properties": {"type": {"type": "string"}}, "required": ["type"]},
    }
    return {"anyOf": [words, *map(_kind, kinds.values()), loose]}


def _kind(kind: type[Kind]) -> Schema:
    word: Schema = {"enum": [kind.word(), *kind.aliases]}
    properties = {"type": word} | {name: _field(field) for name, field in part_fields(kind).items()}
    required = [name for name, field in part_fields(kind).items() if field.default is MISSING]
    return _object(properties, kind.summary()) | {"required": ["type", *required]}


def _field(field: GridField) -> Schema:
    """Return the schema of a field: a value, a list of values, or a range."""
    value = _value(field)
    options = [value, {"type": "array", "items": value}, _choice(value)]
    if field.numeric:
        number = {"anyOf": [{"type": "number"}, NUMBER_AS_TEXT]}
        spread = {"type": "array", "items": number, "minItems": 3, "maxItems": 3}
        drawn = spread | {"minItems": 2, "maxItems": 2}
        options += [_object({name: spread}) | {"required": [name]} for name in ("log", "linspace")]
        options += [_object({name: drawn}) | {"required": [name]} for name in ("uniform", "loguniform")]
    result: Schema = {"anyOf": options}
    if field.info.description:
        result["description"] = field.info.description
    if field.default is not MISSING and field.default is not None:
        result["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return result


def _value(field: GridField) -> Schema:
    options = [TypeAdapter(kind).json_schema() for kind in field.annotations()]
    if field.numeric:
        options.append(NUMBER_AS_TEXT)
    options += [{"const": word} for word, _ in field.words]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _object(properties: Schema, description: str = "") -> Schema:
    result: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return result | {"description": description} if description else result


def _one_or_more(value: Schema, description: str = "") -> Schema:
    result: Schema = {"anyOf": [value, {"type": "array", "items": value}]}
    return result | {"description": description} if description else result


def _choice(value: Schema) -> Schema:
    return _object({"choice": {"type": "array", "items": value}}) | {"required": ["choice"]}
