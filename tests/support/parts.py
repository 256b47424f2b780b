"""Parts of probes as tests write them: a type and the fields that matter, all others at what does not."""

from types import SimpleNamespace

from featcache.probes.identity import ALWAYS, ELSE, part_from_dict


def _part(section, type, values, fields):
    names = [*ALWAYS[section], *ELSE[section]]
    return part_from_dict(section, {"type": type} | dict(zip(names, values, strict=False)) | fields)


def Head(type, *values, **fields):
    return _part("head", type, values, fields)


def Loss(type, *values, **fields):
    return _part("loss", type, values, fields)


def Optimizer(type, *values, **fields):
    return _part("optimizer", type, values, fields)


def Schedule(type="constant", *values, **fields):
    return _part("schedule", type, values, fields)


def every_field(section, part):
    """All fields that any part of a section has, of those that there were first: a namespace."""
    idle = {**ALWAYS[section], **ELSE[section]}
    return SimpleNamespace(type=part.type, **{name: getattr(part, name, value) for name, value in idle.items()})


def changed(part, **fields):
    """A part with other values of some of its fields; those that it does not have are left out."""
    return part.model_copy(update={name: value for name, value in fields.items() if name in type(part).model_fields})
