"""Attention modules whose queries, keys and values can be got at: timm's and torch's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# From queries, keys and values [B, H, N, d] to what is attended to, [B, H, N, d].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def is_timms(module: nn.Module, *names: str) -> bool:
    """Whether a module is of one of timm's classes of these names; a network's own forward may have been changed."""
    kinds = type(module).__mro__[:2]
    return any(kind.__module__.startswith("timm.") and kind.__name__ in names for kind in kinds)


def is_attention(module: nn.Module) -> bool:
    """Whether attending() knows a module."""
    if isinstance(module, nn.MultiheadAttention):
        return module.batch_first and module.in_proj_weight is not None and module.bias_k is None
    return is_timms(module, "Attention")


def is_other_attention(module: nn.Module) -> bool:
    """Whether a module seems to attend in a way that attending() does not know."""
    return "attention" in type(module).__name__.lower() and not is_attention(module) and bool(list(module.parameters()))


def attending(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    """Return the forward function of an attention module, in which `attend` takes the place of the attention itself."""
    function = _torchs if isinstance(module, nn.MultiheadAttention) else _timms
    return partial(function, module, attend)


def _timms(module: Any, attend: Attend, tokens: torch.Tensor, attn_mask: None = None, **rest: Any) -> torch.Tensor:
    """Compute timm's Attention of tokens [B, N, D]."""
    if attn_mask is not None or rest.get("is_causal"):
        raise NotImplementedError("attention with a mask")
    parts = module.qkv(tokens).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = parts.unbind(0)
    made = attend(module.q_norm(queries), module.k_norm(keys), values).transpose(1, 2).flatten(2)
    # Networks of earlier versions of timm have no `gate`.
    made, gate = module.norm(made), getattr(module, "gate", None)
    return module.proj(made if gate is None else made * gate(tokens).sigmoid())


def _torchs(
    module: Any, attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any
) -> tuple[torch.Tensor, None]:
    """Compute torch's MultiheadAttention of [B, N, D], without a mask."""
    if rest.get("attn_mask") is not None or rest.get("key_padding_mask") is not None:
        raise NotImplementedError("attention with a mask")
    weights = module.in_proj_weight.chunk(3)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    by_head = [part.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for part in parts]
    return module.out_proj(attend(*by_head).transpose(1, 2).flatten(2)), None


def keeping(kept: list[torch.Tensor]) -> Attend:
    """Return the attention by the definition, which adds its weights [B, H, N, N] to a list."""

    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = (queries @ keys.transpose(2, 3) / queries.shape[3] ** 0.5).softmax(3)
        kept.append(weights)
        return weights @ values

    return attend
