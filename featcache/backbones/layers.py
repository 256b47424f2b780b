"""`featcache layers`: what a network yields where, and in which ways it may be reduced."""

from dataclasses import dataclass, replace

from featcache.arguments import CHECKPOINT, MOST_SIDE, NAME, is_path, takes, whole
from featcache.backbones.backbone import Backbone
from featcache.backbones.load import load_backbone
from featcache.backbones.outputs import outputs
from featcache.feature import WORDS

OR_LOADED = replace(CHECKPOINT, fits=lambda value: is_path(value) or isinstance(value, Backbone))


@dataclass(frozen=True)
class Layer:
    """path: of the module. aliases: names for people. shape: of one row. reductions: as feature.WORDS has them."""

    path: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    reductions: tuple[str, ...]


@takes(backbone=OR_LOADED, arch=NAME, size=whole(1, MOST_SIDE), seed=whole(), weights_key=NAME)
def layers(backbone, arch=None, size=None, seed=0, weights_key=None):
    """List the layers of a network in the order in which they finish, with their shapes at an input size.

    backbone, arch, size, seed, weights_key: as in featcache.extract; a loaded Backbone will do too. Returns Layers;
    modules that yield no tensor of images are left out. Raises BadInput.
    """
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, arch=arch, size=size, seed=seed, weights_key=weights_key)
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
