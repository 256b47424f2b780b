"""Batch norms of a frozen network, as the scale and the shift of each channel that they are."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from featcache.attribution.replaced import replaced


class _Scaled(torch.autograd.Function):
    """values [B, C, h, w] times a scale plus a shift, both [C, 1, 1], which have no gradients."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Return values * scale + shift."""
        context.save_for_backward(scale)
        return torch.addcmul(shift, values, scale)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient with respect to the values."""
        (scale,) = context.saved_tensors
        return gradients[0] * scale, None, None


def frozen_norms(network: nn.Module) -> AbstractContextManager[None]:
    """Let the batch norms of a network in eval mode be a product and a sum within the block.

    torch keeps the input of a batch norm, in case that its weights have gradients, and its backward pass takes several
    times that of a product: a quarter of the time of an EfficientNet's, an eighth of a ResNet-50's.
    """
    return replaced(network, _frozen)


def _frozen(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if type(module) is not nn.BatchNorm2d or module.training or module.running_mean is None:
        return None
    scale, shift = scale_and_shift(module)
    return partial(_scaled, scale[:, None, None], shift[:, None, None])


def _scaled(scale: torch.Tensor, shift: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = _Scaled.apply(values, scale, shift)
    return scaled


@torch.no_grad()
def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a batch norm with statistics multiplies channels by and adds to them in eval mode, both [C]."""
    assert norm.running_mean is not None and norm.running_var is not None, "a norm without statistics has neither"
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
