"""Methods and scores as users write them: a name, and values of fields behind it, as in rise:masks=500."""

from typing import Any

import yaml
from pydantic import ValidationError

from featcache.errors import BadInput, nearest
from featcache.kinds import K, Kind, Registry


def written(kind: Kind) -> str:
    """Write a kind as users do, with the fields that are not at their defaults."""
    given = {name: value for name, value in kind if value != type(kind).model_fields[name].default}
    return ":".join([kind.type, *(f"{name}={value}" for name, value in given.items())])


def parse_kind(registry: Registry[K], text: str, option: str) -> K:
    """Read a kind. option: of the command line, which messages begin with. Raises BadInput."""
    name, *settings = text.split(":")
    kind = registry.named(name, option)
    values: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        known = [known for known in kind.model_fields if known != "type"]
        if not equals or field not in known:
            raise BadInput(
                f"{option} {text}: {setting!r} is no field=value of {name}{nearest(field, known)} "
                f"(fields: {', '.join(known) or 'none'})"
            )
        values[field] = _value(value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{option} {text}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
