"""Families of networks, one file each, and what they share.

To add a family, write a file with a function `architectures() -> {name: Architecture}` and put its module into
FAMILIES. Where tensors cannot decide between two architectures, the first one here is taken.
"""

from featcache.backbones.architecture import Architecture
from featcache.backbones.families import bcos_networks, clip, efficientnet_lite, resnet, torchvision_models, vit

FAMILIES = (resnet, torchvision_models, vit, clip, bcos_networks, efficientnet_lite)
ARCHITECTURES: dict[str, Architecture] = {
    name: architecture for family in FAMILIES for name, architecture in family.architectures().items()
}
