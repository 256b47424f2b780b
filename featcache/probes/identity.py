"""How a ProbeSpec is written: as a dict in files, as columns of tables, and as the hash that is its id.

An id is a hash of the dict, so the dict of a spec must never change. This is how it is kept stable:

- In the first versions a section such as `head` had the fields of all its types. Fields that a type did not use held
  a fixed value, here called idle. ALWAYS lists the fields that were always written, and ELSE those that were left out
  where they were idle. Both list the idle values.
- Today each type is a class that has only its own fields. The dict is still written in the old form: fields in ALWAYS
  that the class lacks are filled in with their idle value, and fields in ELSE are left out where they are idle.
- A field in neither list came later, here or in another package. It is written whenever the class has it. To add a
  field to a class that has probes already, list it in ELSE with a default that is idle: then their ids stay.
- ELSE_OF_SPEC does the same for the fields of the spec itself.
"""

from typing import Any

from featcache.kinds import Registry
from featcache.probes.heads import HEADS
from featcache.probes.imported import ImportedSchedule, ImportedSolver
from featcache.probes.losses import LOSSES
from featcache.probes.part import Part
from featcache.probes.schedules import SCHEDULES
from featcache.probes.solvers import SOLVERS
from featcache.probes.tuning import TUNINGS

REGISTRIES: dict[str, Registry[Any]] = {
    "head": HEADS, "loss": LOSSES, "optimizer": SOLVERS, "schedule": SCHEDULES, "finetune": TUNINGS,
}  # fmt: skip
# Sections that a probe may lack.
OPTIONAL = ("finetune",)
# Parts that a grid cannot name.
IMPORTED: dict[str, type[Part]] = {"optimizer": ImportedSolver, "schedule": ImportedSchedule}
# As an idle value: the default of the class, whatever that is.
ITS_DEFAULT = object()
# {section: {field: idle value}} of the fields that are always written.
ALWAYS: dict[str, dict[str, Any]] = {
    "head": {"layers": 1, "hidden": 0, "norm": "none", "bias": True, "pool": "after"},
    "loss": {},
    "optimizer": {"lr": None, "momentum": 0.0, "weight_decay": 0.0},
    "schedule": {"milestones": (), "gamma": 0.1, "warmup_epochs": 0.0},
    "finetune": {},
}
# {section: {field: idle value}} of the fields that are left out where they are idle.
ELSE: dict[str, dict[str, Any]] = {
    "head": {
        "b": 1.0, "max_out": 1, "offset": 0.0, "activation": "relu", "temperature": 1.0, "heads": 0, "norm_batch": 0,
        "init_std": 0.0, "queries": 1,
    },
    "loss": {
        "off_label": 0.0, "label_smoothing": 0.0, "class_weights": "none", "gamma": 0.0, "alpha": 0.0, "gamma_pos": 0.0,
        "gamma_neg": 0.0, "clip": 0.0, "difficult": "ignored",
    },
    "optimizer": {
        "nesterov": False, "trust": 0.0, "clip": 0.0, "lr_base": 0, "iterations": 0,
        "undecayed": "none", "beta2": 0.999, "form": "paper",
    },
    "schedule": {"every": 0, "final": 0.0, "warmup_start": 0.0, "per": ITS_DEFAULT},
    "finetune": {"randaugment_p": 1.0, "repeats": 1, "interpolation": "own"},
}  # fmt: skip
# {field: value} of the fields of the spec itself that are left out where they have this value.
ELSE_OF_SPEC: dict[str, Any] = {
    "views": 0, "source": None, "keep": "last", "patience": 0, "precision": "float32", "label_fraction": None,
    "shots": None, "subset": None, "draw": 0, "fold": None, "refit": None, "stop": None,
}  # fmt: skip


def part_from_dict(section: str, content: dict[str, Any]) -> Part:
    """Rebuild the part of a section from its dict. Fields that the dict lacks get their idle value.

    Raises ValueError for a field that the class does not have, unless the field is idle.
    """
    word = content["type"]
    imported = word == "imported" and section in IMPORTED
    kind = IMPORTED[section] if imported else REGISTRIES[section].named(word, section)
    idle = {**ALWAYS[section], **ELSE[section]}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    values = {name: given.pop(name, idle.get(name, ITS_DEFAULT)) for name in kind.model_fields}
    odd = [name for name, value in given.items() if name not in idle or not _is_idle(kind, name, value, idle[name])]
    if odd:
        raise ValueError(f"{section} {word} has no {odd[0]}")
    # Where the default of the class is idle, None stands for it.
    return kind(
        **{n: v for n, v in values.items() if v is not ITS_DEFAULT and not (v is None and idle.get(n) is ITS_DEFAULT)}
    )


def part_to_dict(section: str, part: Part) -> dict[str, Any]:
    """Return a part as a dict of JSON values: see above."""
    always, others = ALWAYS[section], ELSE[section]
    content = {"type": part.type} | {name: getattr(part, name, value) for name, value in always.items()}
    for name, value in part:
        if name not in content and not (name in others and _is_idle(type(part), name, value, others[name])):
            content[name] = value
    return content


def complete_part(section: str, part: Part) -> dict[str, Any]:
    """Return the fields that any type of the section has, for people, and those that the part alone has."""
    idle = {**ALWAYS[section], **ELSE[section]}
    content = {"type": part.type} | {name: _written(part, name, value) for name, value in idle.items()}
    return content | {name: value for name, value in part if name not in content}


def _written(part: Part, name: str, idle: Any) -> Any:
    """Return a field as tables show it: None where it has the default of its class and that is idle."""
    value = getattr(part, name, None if idle is ITS_DEFAULT else idle)
    return None if idle is ITS_DEFAULT and _is_idle(type(part), name, value, idle) else value


def _is_idle(kind: type[Part], name: str, value: Any, idle: Any) -> bool:
    """Return whether a field that is written for a class may be left out. idle: from ALWAYS or ELSE."""
    if idle is not ITS_DEFAULT:
        # A class without the field may fix it for all its parts, as a class attribute: then that is its idle value.
        own = idle if name in kind.model_fields else getattr(kind, name, idle)
        return bool(value == own)
    return value is None or (name in kind.model_fields and value == kind.model_fields[name].default)
