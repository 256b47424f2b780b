"""Backbones: a checkpoint file in, a frozen network with named layers out.

To add an architecture, put `name -> Architecture` into ARCHITECTURES. Where tensors cannot decide
between two of them, the first one here is taken.
"""

from featcache.backbones import bcos_networks, clip, efficientnet_lite, resnet, torchvision_models, vit

ARCHITECTURES = {
    name: architecture
    for family in (resnet, torchvision_models, vit, clip, bcos_networks, efficientnet_lite)
    for name, architecture in family.architectures().items()
}
