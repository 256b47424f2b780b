"""The plan of a recipe: what is trained at which rate, and how long it takes, without training anything."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from featcache.arguments import FLAG, takes
from featcache.device import choose_device, multiplying
from featcache.finetuning.draws import Draws, batches, parts, steps_of
from featcache.finetuning.groups import parameter_groups
from featcache.finetuning.network import Network
from featcache.finetuning.recipe import Task, prepare
from featcache.finetuning.settings import EXPECTED, Settings
from featcache.finetuning.tuner import Tuner
from featcache.probes.engine.mini_batch import MiniBatchRecipe
from featcache.probes.spec import ProbeSpec
from featcache.probes.tuning import Full
from featcache.ranks import Alone


@dataclass(frozen=True)
class PlannedGroup:
    """Parameters of one rate and decay. lr: before the schedule."""

    name: str
    tensors: int
    parameters: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class PlannedConfiguration:
    """One configuration. steps: of all epochs. seconds: about how long its steps take, None if that was not measured."""

    spec: ProbeSpec
    groups: tuple[PlannedGroup, ...]
    steps: int
    seconds: float | None


@dataclass(frozen=True)
class TuningPlan:
    """The configurations of a recipe on `rows` training images."""

    configurations: list[PlannedConfiguration]
    rows: int
    device: str
    arch: str


@takes(measure=FLAG, **EXPECTED)
def plan_finetune(
    backbone: str | os.PathLike[str],
    dataset: str,
    recipe: str | os.PathLike[str] | dict[str, Any],
    root: str | os.PathLike[str] | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    head_from: str | os.PathLike[str] | None = None,
    select: str | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    seed: int = 0,
    parity: str | None = None,
    measure: bool = False,
) -> TuningPlan:
    """Return what featcache.finetune would train with these arguments. Nothing is written.

    measure: run one part of a mini-batch of noise, forward and backward, for an estimate of the time without decoding.
    Raises BadInput as finetune does.

        plan = featcache.plan_finetune("ckpt.pth", "voc", "recipe.yaml", root="/data")
        plan.configurations[0].groups[0].lr
    """
    place = choose_device(device)
    settings = Settings(
        backbone=backbone, dataset=dataset, recipe=recipe, root=root, arch=arch, weights_key=weights_key,
        head_from=head_from, select=select, device=device, workers=workers, seed=seed, parity=parity,
    )  # fmt: skip
    task = prepare(settings)
    planned = [_planned(task, spec, place, measure) for spec in task.resolved.specs]
    rows = sum(len(task.data.splits[name]) for name in task.resolved.splits["train"])
    return TuningPlan(planned, rows, str(place), task.backbone.arch)


def _planned(task: Task, spec: ProbeSpec, device: torch.device, measure: bool) -> PlannedConfiguration:
    tuning, recipe = spec.finetune, MiniBatchRecipe.of(spec)
    assert isinstance(tuning, Full), "prepare() takes no other"
    network = Network(*task.source.load(task.data, tuning), spec, len(task.data.classes))
    groups = tuple(
        PlannedGroup(g.name, len(g.parameters), g.size, recipe.rate * g.scale, g.decay)
        for g in parameter_groups(network)
    )
    steps = recipe.epochs * steps_of(len(task.resolved.sets[spec.sample]), recipe.batch_size, tuning.repeats)
    seconds = _step_seconds(task, network, device) * steps if measure else None
    return PlannedConfiguration(spec, groups, steps, seconds)


def _step_seconds(task: Task, network: Network, device: torch.device) -> float:
    """Measure a step on one part of a mini-batch of noise, and return the seconds that a whole one takes."""
    draws, recipe = Draws(0, 0), MiniBatchRecipe.of(network.spec)
    labels = task.resolved.sets[network.spec.sample].labels.to(device)
    tuner = Tuner(network, labels, draws, device, Alone())
    batch = batches(draws.order(0, len(labels)), recipe.batch_size)[0]
    several: Sequence[Any] = parts(batch, network.tuning.micro_batch, 1)
    side = network.tuning.train_size or network.backbone.preprocessing.size
    part = torch.from_numpy(several[0])
    pixels = torch.zeros(len(part), 3, side, side, dtype=torch.uint8)
    seconds = []
    with multiplying(network.spec.precision):
        for _ in range(2):
            began = time.monotonic()
            tuner.train_step(part, [(0, pixels, part)], 0.0)
            seconds.append(time.monotonic() - began)
    # The first step also sets things up.
    return seconds[1] * len(several)
