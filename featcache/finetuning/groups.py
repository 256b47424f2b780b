"""Parameters by rate and decay, and their update."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featcache.finetuning.depth import depths
from featcache.finetuning.network import Network
from featcache.probes.engine.mini_batch import MiniBatchRecipe
from featcache.probes.solvers.solver import Rule

# What does not decay, besides all vectors: tokens, positions and scales, whatever their shape (timm, BEiT).
UNDECAYED = re.compile(r"(.*_)?(token|tokens|embed|embedding|positions|bias|bias_table|scale)|gamma.*")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one rate and decay. scale: of the rate. name: the part of the network, such as layer 3 or head."""

    name: str
    scale: float
    decay: float
    parameters: tuple[nn.Parameter, ...]

    @property
    def size(self) -> int:
        """How many numbers they are."""
        return sum(parameter.numel() for parameter in self.parameters)


def parameter_groups(network: Network) -> list[ParameterGroup]:
    """Return the groups of all trained parameters, from the stem to the head. Raises BadInput as depths() does."""
    tuning, decay = network.tuning, MiniBatchRecipe.of(network.spec).solver.weight_decay
    if tuning.layer_decay < 1:
        layers, head = depths(network.trunk, network.backbone.arch)
        names = {name: f"layer {layers[name]}" for name in network.layers}
        scales = {name: tuning.layer_decay ** (head - layers[name]) for name in network.layers}
    else:
        names, scales = dict.fromkeys(network.layers, "backbone"), dict.fromkeys(network.layers, 1.0)
    keyed: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in network.layers.items():
        own = decay if tuning.decay_all or decays(name, parameter) else 0.0
        keyed.setdefault((names[name], scales[name], own), []).append(parameter)
    for name, parameter in network.head.named_parameters():
        own = decay if tuning.decay_all or decays(name, parameter) else 0.0
        keyed.setdefault(("head", tuning.head_lr, own), []).append(parameter)
    return [ParameterGroup(*key, tuple(parameters)) for key, parameters in keyed.items()]


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay acts on a parameter: on matrices and kernels alone."""
    return parameter.ndim > 1 and not UNDECAYED.fullmatch(name.rpartition(".")[2])


class Update:
    """The update of all parameters by the recipe's optimizer: one of the probes' rules for each group.

    A rule changes stacks of probes; here each stack has one member, and shares its memory with the network.
    """

    def __init__(self, groups: Sequence[ParameterGroup], network: Network, device: torch.device):
        recipe = MiniBatchRecipe.of(network.spec)
        self.groups, self.clip, self.rate = groups, recipe.solver.clip, recipe.rate
        self.parameters = [p for group in groups for p in group.parameters]
        self.rules: list[Rule] = []
        for group in groups:
            solver = recipe.solver.model_copy(update={"weight_decay": group.decay, "clip": 0.0})
            self.rules.append(
                solver.rule([p.detach().unsqueeze(0) for p in group.parameters], [solver], "float32", device)
            )
        self._device = device

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Change all parameters by their gradients, which may be overwritten. factor: the schedule's."""
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group, rule in zip(self.groups, self.rules, strict=True):
            rate = torch.tensor([self.rate * group.scale * factor], device=self._device)
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group.parameters]
            rule.advance()
            rule.step([g.unsqueeze(0) for g in gradients], rate)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the rules, {name: tensor}; the tensors are those that training changes."""
        return {
            f"rule{n}.{name}.{i}": tensor
            for n, rule in enumerate(self.rules)
            for name, tensors in rule.state().items()
            for i, tensor in enumerate(tensors)
        }

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return self.rules[0].steps

    @steps.setter
    def steps(self, count: int) -> None:
        for rule in self.rules:
            rule.steps = count


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that there are."""
    return [p.grad for p in parameters if p.grad is not None]
