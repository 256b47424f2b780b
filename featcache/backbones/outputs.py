"""What every module of a network yields, found out by running it once."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from featcache.backbones.architecture import Architecture, Tokens
from featcache.backbones.reductions import MAP, SEQUENCE, TOKENS, Output

# More than one image, so that an output which is not a batch of images shows.
BATCH = 2


def outputs(network: nn.Module, architecture: Architecture, size: int) -> dict[str, Output]:
    """Run a network once and return {module path: Output}, in the order in which modules finish (their last call).

    Nothing is computed where the network allows it: its tensors are replaced by ones of the meta device.
    """
    modules: dict[str, Output] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            modules.pop(path, None)
            modules[path] = Output(output, module, architecture, (size, size), BATCH)

        return hook

    hooks = [module.register_forward_hook(keep(path)) for path, module in network.named_modules() if path]
    real = dict(network.named_parameters()) | dict(network.named_buffers())
    images = torch.zeros(BATCH, 6 if architecture.inverse else 3, size, size)
    try:
        with torch.inference_mode():
            try:
                shadows = {name: tensor.to("meta") for name, tensor in real.items()}
                functional_call(network, shadows, (images.to("meta"),))
            except (RuntimeError, NotImplementedError):
                # Some networks hold tensors that are no parameters, or look at values.
                modules.clear()
                network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return modules


def find_last(modules: dict[str, Output]) -> str | None:
    """Return the path of the last module that yields a map of more than one position, or tokens; None without one."""
    for path, output in reversed(modules.items()):
        if output.kind in (TOKENS, SEQUENCE) or (output.kind == MAP and output.values.shape[2:].numel() > 1):
            return path
    return None


def tokens_of(network: nn.Module, count: int, size: int) -> Tokens | None:
    """Return how the `count` tokens that a network yields for size x size pixels are laid out; None if not a square.

    timm's networks say the number of prefix tokens as num_prefix_tokens. Without this attribute a square number of
    tokens are patches, and one more begins with a class token.
    """
    prefix: Any = getattr(network, "num_prefix_tokens", None)
    if prefix is None:
        prefix = 0 if math.isqrt(count) ** 2 == count else 1
        cls = prefix == 1
    else:
        # timm's NaFlexViT holds it in its embedding.
        cls = getattr(getattr(network, "embeds", network), "cls_token", None) is not None
    side = math.isqrt(max(count - prefix, 0))
    return Tokens(prefix, cls, size // side) if side and side * side == count - prefix else None
