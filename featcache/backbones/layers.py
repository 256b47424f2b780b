"""`featcache layers`: what each layer of a network yields, and in which ways it may be reduced."""

from dataclasses import dataclass
from os import PathLike

from torch import nn

from featcache.arguments import BACKBONE, MOST_SIDE, NAME, takes, whole
from featcache.backbones.backbone import Backbone
from featcache.backbones.load import load_backbone
from featcache.backbones.outputs import outputs
from featcache.feature import WORDS


@dataclass(frozen=True)
class Layer:
    """One layer: the path of its module, its aliases, the shape of one row, and its reductions as users write them."""

    path: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    reductions: tuple[str, ...]


# A Backbone is a module too.
@takes(backbone=BACKBONE, arch=NAME, size=whole(1, MOST_SIDE), seed=whole(), weights_key=NAME)
def layers(
    backbone: str | PathLike[str] | nn.Module,
    arch: str | None = None,
    size: int | None = None,
    seed: int = 0,
    weights_key: str | None = None,
) -> list[Layer]:
    """List the layers of a network in the order in which they finish, with their shapes at an input size.

    backbone: a checkpoint, a module in memory, or a Backbone that is loaded already. arch, size, seed, weights_key: as in
    featcache.extract. Modules that yield no tensor of images are left out. Raises BadInput.

        for layer in featcache.layers("resnet50-0676ba61.pth"):
            print(layer.path, layer.aliases, layer.shape, layer.reductions)
    """
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, arch=arch, size=size, seed=seed, weights_key=weights_key)
    named: dict[str, list[str]] = {}
    for alias, path in backbone.aliases.items():
        named.setdefault(path, []).append(alias)
    listed, known = [], set(backbone.layers)
    for path, output in outputs(backbone.trunk, backbone.architecture, backbone.preprocessing.size).items():
        if output.kind and path in known:
            # A norm does not change the shape of what it is put on.
            for name in (path, *(p for p in named if p.startswith(f"{path}+"))):
                shape = tuple(output.values.shape[1:])
                words = tuple(WORDS[word] for word in output.reductions)
                listed.append(Layer(name, tuple(named.get(name, ())), shape, words))
    return listed
