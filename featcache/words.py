"""Methods and scores as users write them: a name, and values of fields behind it, as in rise:masks=500."""

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
    known = [known for known in kind.model_fields if known != "type"]
    values: dict[str, str] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if field not in known:
            raise BadInput(
                f"{option} {text}: {setting!r} is no field=value of {name}{nearest(field, known)} "
                f"(fields: {', '.join(known) or 'none'})"
            )
        if not equals:
            raise BadInput(f"{option} {text}: {field} has no value; write {field}=VALUE")
        if field in values:
            raise BadInput(f"{option} {text}: {field} stands there twice")
        values[field] = value
    try:
        # Fields read numbers from text as they are written; YAML would make 8 of 010 and a date of 2001-01-01.
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{option} {text}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
