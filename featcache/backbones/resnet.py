"""torchvision's ResNets (He et al., CVPR 2016; Xie et al., CVPR 2017; Zagoruyko et al., BMVC 2016)."""

from functools import partial

from torch import nn
from torchvision.models import resnet

from featcache.backbones.architecture import Architecture

NAMES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


def _without_classifier(network):
    network.fc = nn.Identity()
    return network


def architectures():
    """Return the ResNets by name. feat1 is the stem before its max-pool, feat2..feat5 the stages."""
    stages = {"feat1": "relu", **{f"feat{i + 1}": f"layer{i}" for i in range(1, 5)}, "last": "layer4"}
    return {
        name: Architecture(
            name=name,
            build=partial(getattr(resnet, name), weights=None),
            trunk=_without_classifier,
            signature="layer4.0.conv1.weight",
            classifier=("fc.",),
            aliases=stages,
        )
        for name in NAMES
    }


def name_children(tensors):
    """Rename the tensors of nn.Sequential(*resnet.children()), as lightly and others save it, to the ResNet's own."""
    names = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4", "9": "fc"}
    parts = ((key.partition("."), tensor) for key, tensor in tensors.items())
    return {names.get(first, first) + dot + rest: tensor for (first, dot, rest), tensor in parts}
