"""Rules by which modules compute within a block, so that gradients mean something else than usual."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from featcache.attribution.forward import Rule
from featcache.attribution.replaced import replaced


class _GuidedReLU(torch.autograd.Function):
    """ReLU whose backward pass lets through positive gradients at positive outputs."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        """Return max(values, 0)."""
        outputs = values.clamp(min=0)
        context.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Return the positive gradients at positive outputs."""
        (outputs,) = context.saved_tensors
        return gradients[0].clamp(min=0) * (outputs > 0)


def has_explanation_mode(network: nn.Module) -> bool:
    """Return whether a network has B-cos layers, which can be explained as linear ones."""
    return any(hasattr(module, "set_explanation_mode") for module in network.modules())


@contextmanager
def _explaining(network: nn.Module) -> Iterator[None]:
    # Of the package bcos, which has no types, and of heads.
    modules: list[Any] = [module for module in network.modules() if hasattr(module, "set_explanation_mode")]
    try:
        for module in modules:
            module.set_explanation_mode(True)
        yield
    finally:
        for module in modules:
            module.set_explanation_mode(False)


# Springenberg et al., ICLR Workshop 2015.
GUIDED = Rule(
    "guided", lambda network: replaced(network, lambda each: _GuidedReLU.apply if isinstance(each, nn.ReLU) else None)
)
# Boehle et al., CVPR 2022: the factors that make a network non-linear are constants, and so its gradient is the matrix
# that the network multiplies this input by.
EXPLANATION_MODE = Rule("explanation mode", _explaining)
