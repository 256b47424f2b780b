"""What every module of a network yields, found out by running it once."""

import math

import torch
from torch.func import functional_call

from featcache.backbones.architecture import Tokens
from featcache.backbones.reductions import MAP, SEQUENCE, TOKENS, Output

# More than one image, so that what is no tensor of images shows.
BATCH = 2


def outputs(network, architecture, size):
    """Run a network once and return {module path: Output}, in the order in which modules finish (their last call).

    Nothing is computed where the network allows it: its tensors are replaced by ones of the meta device.
    """
    found = {}

    def keep(path):
        def hook(module, inputs, output):
            found.pop(path, None)
            found[path] = Output(output, module, architecture, (size, size), BATCH)

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
                found.clear()
                network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def find_last(found):
    """Path of the last module that yields a map of more than one position, or tokens; None if there is none."""
    for path, output in reversed(found.items()):
        if output.kind in (TOKENS, SEQUENCE) or (output.kind == MAP and output.values.shape[2:].numel() > 1):
            return path
    return None


def tokens_of(network, count, size):
    """Layout of the `count` tokens that a network yields for size x size pixels; None if they are no square.

    Prefix tokens are as its attribute num_prefix_tokens says (timm's networks have it); without it a
    square number of tokens are patches, and one more begins with a class token.
    """
    prefix = getattr(network, "num_prefix_tokens", None)
    if prefix is None:
        prefix = 0 if math.isqrt(count) ** 2 == count else 1
        cls = prefix == 1
    else:
        cls = getattr(network, "cls_token", None) is not None
    side = math.isqrt(max(count - prefix, 0))
    return Tokens(prefix, cls, size // side) if side and side * side == count - prefix else None
