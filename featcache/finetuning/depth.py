"""How deep the layers of a network lie, for rates that decay from the head downwards."""

import re
from types import SimpleNamespace
from typing import Any

from torch import nn

from featcache.errors import BadInput

# Stands for the head, which is no part of the network.
HEAD = "featcache head"
# The first numbered part of a name, with the plain numbers behind it: blocks.3, layer1.0, encoder_layer_7, block1-2.
BLOCK = re.compile(r"(?:[^.]+\.)*?[^.]*?(?:(?<![^.])|[_-]|layer)\d+(?=\.)(?:\.\d+(?=\.))*")


def depths(trunk: nn.Module, arch: str) -> tuple[dict[str, int], int]:
    """Return ({name of a parameter: its layer}, the layer of the head). The stem is 0; a final norm is of the last block.

    timm's networks say themselves what their layers are, and this is what its param_groups_layer_decay takes: every
    block is a layer, and what reduces the map belongs to the block behind it. Other networks are read by the numbers in
    their names, to the same result where timm has the same network. Raises BadInput where there are no such numbers.
    """
    if hasattr(trunk, "group_matcher"):
        from timm.models import group_parameters

        network: Any = trunk
        # What timm has no rule for, such as a norm behind the pool, is of the head's layer.
        whole: Any = SimpleNamespace(named_parameters=lambda: [*trunk.named_parameters(), (HEAD, None)])
        matched: Any = dict(group_parameters(whole, network.group_matcher(coarse=False), reverse=True))
        head = matched.pop(HEAD)
        return matched, head
    modules = dict(trunk.named_modules())
    blocks = {name: _block(name, modules) for name, _ in trunk.named_parameters()}
    most = max((block.count(".") for block in blocks.values()), default=0)
    layer, layers, opened = 0, dict[str, int](), ""
    for name, block in blocks.items():
        if block and block != opened:
            # A part between two stages, which has one number less than the blocks have, opens the next block's layer.
            begins = not (opened and opened.count(".") < most and layer)
            layer += begins and not _is_stem(block, most, layer)
            opened = block
        layers[name] = layer
    if not layer:
        raise BadInput(f"finetune.layer_decay: {arch} has no numbered blocks to tell its layers by; leave it out")
    return layers, max(layers.values()) + 1


def _is_stem(block: str, most: int, layer: int) -> bool:
    """Return whether a part is the stem: it comes first, and has one number less than the blocks have."""
    return not layer and block.count(".") < most


def _block(name: str, modules: dict[str, nn.Module]) -> str:
    """Return the path of the block that a parameter lies in, "" if it lies in none."""
    match = BLOCK.match(name)
    path = match[0] if match else ""
    # A number may be that of a single layer within a stem or a reduction.
    while path and not list(modules[path].children()):
        path = path.rpartition(".")[0]
    # The branches of an inception block are numbered too, but lie side by side.
    return path if re.search(r"\d$", path) and "branch" not in path else ""
