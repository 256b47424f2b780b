"""The full specification of a probe: its head, and how it is trained. docs/grid.md has the formulas of the fields."""

import hashlib
import json
from dataclasses import fields, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from featcache.errors import BadInput
from featcache.feature import parse_feature, split_beside
from featcache.names import unwritable
from featcache.probes.heads.head import Head
from featcache.probes.identity import ELSE_OF_SPEC, OPTIONAL, REGISTRIES, complete_part, part_from_dict, part_to_dict
from featcache.probes.imported import ImportedSchedule, ImportedSolver
from featcache.probes.losses.loss import Loss
from featcache.probes.part import Count, CountOr0
from featcache.probes.sample import Sample
from featcache.probes.schedules.constant import Constant
from featcache.probes.schedules.schedule import Schedule
from featcache.probes.solvers.solver import Solver
from featcache.probes.tuning import Tuning

# Fields that tables have only for the probes that have them.
OF_SAMPLES = ("label_fraction", "shots", "subset", "fold", "refit", "stop")


def _feature(name: str) -> str:
    try:
        for part in split_beside(name):
            parse_feature(part, {})
    except BadInput as error:
        raise ValueError(error.message) from None
    return name


def _path(name: str) -> str:
    if unwritable(name):
        raise ValueError("is not the path of a file")
    return name


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class ProbeSpec:
    """Everything that decides a probe's weights, given a store and the seed for the order of the mini-batches.

    epochs: None where the optimizer takes none. views: None stands for all that the store has. source: the sha256 of
    an imported probe's weights, which takes the place of how it was trained: epochs, batch_size, seed and views are
    None; of a fine-tuned probe, that of the weights which its head started from, None for random ones. fold, refit,
    stop: of probes that a grid asks for as a whole, not in its groups: the fold that is held out (see Sample), the roles
    that a chosen probe is trained on again, and the epoch at which that ends, None for the last. finetune: how the
    backbone is trained too, None where it is frozen.
    """

    name: str
    features: Annotated[
        str,
        Field(
            min_length=1,
            description="a reduction of the last layer, or LAYER:REDUCTION; several side by side with + between them",
        ),
        AfterValidator(_feature),
    ]
    head: Head
    loss: Loss
    optimizer: Solver
    schedule: Schedule = Constant()
    epochs: Annotated[
        Count | None, Field(description="epochs; an optimizer that sees all images at once takes none")
    ] = None
    batch_size: Annotated[Count | None, Field(description="images of a mini-batch")] = 64
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, Field(description="draws the initial weights")] = 0
    views: Annotated[
        CountOr0 | None,
        Field(
            description="augmented views over which the epochs rotate; 0 is the images as they are, all is what the "
            "store has"
        ),
    ] = None
    source: str | None = None
    keep: Annotated[
        Literal["last", "best"],
        Field(description="which epoch's weights: the last, or the best by the selection metric"),
    ] = "last"
    patience: Annotated[
        CountOr0,
        Field(description="epochs without a better selection metric after which training ends; 0 is never"),
    ] = 0
    precision: Annotated[
        Literal["float32", "tf32", "bf16"],
        Field(description="of the matrix products; weights and all else are float32"),
    ] = "float32"
    label_fraction: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="share of each class's training images to train on"),
    ] = None
    shots: Annotated[Count | None, Field(description="images of each class to train on")] = None
    subset: Annotated[
        Annotated[str, Field(min_length=1), AfterValidator(_path)] | None,
        Field(description="file that lists the training images to train on"),
    ] = None
    draw: Annotated[
        Annotated[int, Field(ge=0, lt=2**63)],
        Field(description="seed that draws the images of label_fraction or shots"),
    ] = 0
    fold: str | None = None
    refit: str | None = None
    stop: int | None = None
    finetune: Tuning | None = None

    @cached_property
    def id(self) -> str:
        """10 hex digits of the sha256 over spec_to_dict() without the name; see identity.py."""
        hashed = spec_to_dict(self)
        del hashed["name"]
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def configuration(self) -> "ProbeSpec":
        """The spec without its name, seed and draw: equal for probes that differ in nothing else."""
        return replace(self, name="", seed=None, draw=0, stop=None)

    @property
    def sample(self) -> Sample:
        """Which images it trains on."""
        return Sample(self.label_fraction, self.shots, self.subset, self.draw, self.fold, self.refit)

    def with_folds(self, folds: int) -> "list[ProbeSpec]":
        """Return the spec once for each of so many folds, each of which holds one out."""
        return [replace(self, fold=f"{number}/{folds}") for number in range(1, folds + 1)]

    @property
    def refit_of(self) -> str | None:
        """The id of the probe that was chosen and is trained again here, None for any other probe."""
        return replace(self, refit=None, stop=None).id if self.refit else None

    @property
    def conflict(self) -> str | None:
        """A line for the user about parts that do not go together, or None."""
        parts = (self.optimizer, self.head, self.loss, self.schedule, *((self.finetune,) if self.finetune else ()))
        reasons = [part.conflict(self) for part in parts]
        given = [name for name in ("label_fraction", "shots", "subset") if getattr(self, name) is not None]
        if len(given) > 1:
            reasons.append(f"{given[0]} and {given[1]} both say which images to train on: give one")
        elif self.draw and not self.sample.drawn:
            reasons.append("draw is the seed of label_fraction or shots: without them there is nothing to draw")
        for part in (self.optimizer, self.head):
            if self.precision not in part.precisions:
                what = part.type if part is self.optimizer else f"{part.type} heads"
                reasons.insert(1, f"precision {self.precision} is not for {what}")
        return next((reason for reason in reasons if reason), None)

    def flat(self) -> dict[str, Any]:
        """Return complete() as {"optimizer.lr": 0.1, ...}, for tables."""
        row: dict[str, Any] = {}
        for name, value in complete(self).items():
            parts = {f"{name}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
            row |= {key: " ".join(map(str, v)) if isinstance(v, tuple) else v for key, v in parts.items()}
        return row | ({"refit_of": self.refit_of} if self.refit else {})


def spec_to_dict(spec: ProbeSpec) -> dict[str, Any]:
    """Return the fields of a ProbeSpec as nested dicts of JSON values, for files and ids."""
    content: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in OPTIONAL and value is None:
            continue
        if field.name in REGISTRIES:
            content[field.name] = part_to_dict(field.name, value)
        elif field.name not in ELSE_OF_SPEC or value != ELSE_OF_SPEC[field.name]:
            content[field.name] = value
    return content


def spec_from_dict(content: dict[str, Any]) -> ProbeSpec:
    """Rebuild a ProbeSpec from what spec_to_dict() returned, read back from JSON.

    Raises LookupError, TypeError or ValueError for anything else, and BadInput for a kind that is not installed.
    """
    parts = {
        section: part_from_dict(section, content[section])
        for section in REGISTRIES
        if section in content or section not in OPTIONAL
    }
    return ProbeSpec(**(ELSE_OF_SPEC | content | parts))


def complete(spec: ProbeSpec) -> dict[str, Any]:
    """Return the fields as nested dicts, for people: each section has the fields of all its types."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    # What most probes do not have would only fill their tables with empty columns.
    rare = {*OPTIONAL, *OF_SAMPLES}
    values = {name: value for name, value in values.items() if name not in rare or value is not None}
    if not spec.sample.drawn:
        del values["draw"]
    return {name: complete_part(name, value) if name in REGISTRIES else value for name, value in values.items()}


def imported_spec(name: str, features: str, head: Head, loss: Loss, source: str) -> ProbeSpec:
    """Return the spec of a probe that was trained elsewhere. Fields that nobody knows are None."""
    solver, schedule = ImportedSolver(), ImportedSchedule()
    return ProbeSpec(
        name, features, head, loss, solver, schedule, epochs=None, batch_size=None, seed=None, views=None, source=source
    )
