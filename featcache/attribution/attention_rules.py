"""AttnLRP's rules (Achtibat et al., ICML 2024) as gradients: relevance is a value times its gradient under these."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from featcache.attribution.attention import attending, is_attention, is_timms
from featcache.attribution.forward import Rule
from featcache.attribution.replaced import replaced
from featcache.backbones.families.clip import QuickGELU

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, QuickGELU)


class _Share(torch.autograd.Function):
    """A value that gets a share of its gradient."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, share: float) -> torch.Tensor:
        """Return the values."""
        context.share = share
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the share."""
        return gradients[0] * context.share, None


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend; weights and values share relevance equally, and so do queries and keys what the weights get."""
    return F.scaled_dot_product_attention(
        _Share.apply(queries, 1 / 4), _Share.apply(keys, 1 / 4), _Share.apply(values, 1 / 2)
    )


def _norm(norm: nn.LayerNorm, values: torch.Tensor) -> torch.Tensor:
    """Compute a layer norm whose deviation is a constant."""
    axes = tuple(range(-len(norm.normalized_shape), 0))
    centred = values - values.mean(axes, keepdim=True)
    made = centred * (centred.square().mean(axes, keepdim=True) + norm.eps).rsqrt().detach()
    # A norm may have neither.
    made = made if norm.weight is None else made * norm.weight
    return made if norm.bias is None else made + norm.bias


def _activation(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Compute an activation as a constant factor of each number."""
    made = function(values.detach().clone())
    return values * torch.where(values == 0, 0, made / values).detach()


def _gated(mlp: Any, values: torch.Tensor) -> torch.Tensor:
    """Compute timm's GluMlp, two halves of which share relevance equally."""
    first, second = mlp.fc1(values).chunk(2, dim=mlp.chunk_dim)
    first, second = (first, mlp.act(second)) if mlp.gate_last else (mlp.act(first), second)
    return mlp.fc2(mlp.norm(_Share.apply(first, 1 / 2) * _Share.apply(second, 1 / 2)))


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    if is_attention(module):
        return attending(module, _attend)
    if isinstance(module, nn.LayerNorm):
        return partial(_norm, module)
    if isinstance(module, ACTIVATIONS):
        kind: Any = type(module)
        return partial(_activation, partial(kind.forward, module))
    return partial(_gated, module) if is_timms(module, "GluMlp") else None


ATTENTION = Rule("attention", lambda network: replaced(network, _forward_of))
