"""DeepLIFT's rescale rule: what a non-linear module passes back is its change, as a share of its input's change.

The changes are those from a reference, which is the last image of the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from featcache.attribution.forward import Rule
from featcache.attribution.replaced import replaced

# Modules that change every number by itself, as they are in evaluation.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
# Changes of the input smaller than this have the derivative in the place of the share.
LEAST = 1e-6


class _Rescaled(torch.autograd.Function):
    """A function of single numbers, whose slope is its change over its input's."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return function(values). values: [B + 1, ...]."""
        with torch.enable_grad():
            given = values.detach().clone().requires_grad_()
            # A module that works in place must not be given a leaf.
            outputs = function(given.clone())
            (slope,) = torch.autograd.grad(outputs.sum(), given)
        outputs = outputs.detach()
        change = values - values[-1:]
        share = (outputs - outputs[-1:]) / change
        context.save_for_backward(torch.where(change.abs() < LEAST, slope, share))
        return outputs

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Multiply by the share."""
        (share,) = context.saved_tensors
        return gradients[0] * share, None


class _RescaledPool(torch.autograd.Function):
    """Max-pooling, whose change goes to the largest number of the image, of the reference, or of both.

    What lies between the reference's output and the larger of the two is the change of the image's largest number, and
    what lies between that and the image's output that of the reference's.
    """

    @staticmethod
    def forward(context: Any, values: torch.Tensor, settings: tuple) -> torch.Tensor:
        """Return the maxima of values [B + 1, C, H, W]. settings: the arguments of max_pool2d."""
        outputs, places = F.max_pool2d(values, *settings, return_indices=True)
        context.save_for_backward(values, outputs, places)
        return outputs

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the change that reaches each number, as a share of its own."""
        values, outputs, places = context.saved_tensors
        (gradient,) = gradients
        reference, larger = outputs[-1:], torch.maximum(outputs, outputs[-1:])
        reached, slopes = (values.new_zeros(values.shape).flatten(2) for _ in range(2))
        reached.scatter_add_(2, places.flatten(2), (gradient * (larger - reference)).flatten(2))
        shared_places = places[-1:].expand_as(places).flatten(2)
        reached.scatter_add_(2, shared_places, (gradient * (outputs - larger)).flatten(2))
        slopes.scatter_add_(2, places.flatten(2), gradient.flatten(2))
        change = values - values[-1:]
        share = torch.where(change.abs() < LEAST, slopes.view_as(values), reached.view_as(values) / change)
        return share, None


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    if isinstance(module, ELEMENTWISE):
        kind: Any = type(module)
        own = partial(kind.forward, module)
        return lambda values: _Rescaled.apply(values, own)
    if isinstance(module, nn.MaxPool2d):
        settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        return lambda values: _RescaledPool.apply(values, settings)
    return None


# Shrikumar et al., ICML 2017.
RESCALE = Rule("rescale", lambda network: replaced(network, _forward_of))
