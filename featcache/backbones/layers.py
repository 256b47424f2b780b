"""`featcache layers`: what a network yields where, and in which ways it may be reduced."""

import math
from dataclasses import dataclass

import torch
from torch.func import functional_call

from featcache.backbones.architecture import Tokens
from featcache.backbones.reductions import MAP, SEQUENCE, TOKENS, Output
from featcache.feature import WORDS

# More than one image, so that what is no tensor of images shows.
BATCH = 2


@dataclass(frozen=True)
class Layer:
    """path: of the module. aliases: names for people. shape: of one row. reductions: as feature.WORDS has them."""

    path: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    reductions: tuple[str, ...]


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


def layers(backbone, arch=None, size=None, seed=0):
    """List the layers of a network in the order in which they finish, with their shapes at an input size.

    backbone, arch, size, seed: as in featcache.extract; a loaded Backbone will do too. Returns Layers;
    modules that yield no tensor of images are left out. Raises BadInput.
    """
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.load import load_backbone

    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, arch=arch, size=size, seed=seed)
    named = {}
    for alias, path in backbone.aliases.items():
        named.setdefault(path, []).append(alias)
    listed, known = [], set(backbone.layers)
    for path, output in outputs(backbone.trunk, backbone.architecture, backbone.preprocessing.size).items():
        if output.kind and path in known:
            # A norm leaves the shape of what it is put on.
            for name in (path, *(p for p in named if p.startswith(f"{path}+"))):
                shape = tuple(output.values.shape[1:])
                words = tuple(WORDS[word] for word in output.reductions)
                listed.append(Layer(name, tuple(named.get(name, ())), shape, words))
    return listed
