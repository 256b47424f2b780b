"""The weights of probes of one shape: initial ones, and those of many probes side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featcache.probes.spec import ProbeSpec


def initial_weights(spec: ProbeSpec, dim: int, classes: int) -> dict[str, Tensor]:
    """Draw a probe's weights from its own seed, so that they do not depend on neighbours: {name: float32 tensor}."""
    # An imported probe has no seed: its weights exist already, and only their names and shapes matter here.
    generator = torch.Generator().manual_seed(spec.seed or 0)
    return spec.head.initial_weights(dim, classes, generator)


def stacked_weights(specs: Sequence[ProbeSpec], dim: int, classes: int, device: torch.device) -> dict[str, Tensor]:
    """Return the initial weights of probes of one shape side by side: {name: [P, ...]}."""
    return side_by_side([initial_weights(spec, dim, classes) for spec in specs], device)


def side_by_side(weights: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Stack the weights of probes of one shape, one {name: tensor} each: {name: [P, ...]} on a device."""
    return {name: torch.stack([w[name] for w in weights]).to(device) for name in weights[0]}


def all_finite(weights: dict[str, Tensor]) -> bool:
    """Return whether all weights are finite."""
    # The smallest and the largest tell it in a fraction of the time that a look at each takes.
    return all(bool(torch.isfinite(torch.stack(w.aminmax())).all()) for w in weights.values())
