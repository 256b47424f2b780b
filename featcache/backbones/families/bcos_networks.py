"""B-cos networks (Boehle et al., CVPR 2022, TPAMI 2024) through the package bcos, with BNU norms without bias.

B-cos v2's release and How-to-Probe have these norms. The input is [x, 1 - x] of pixels x in 0..1.
"""

from functools import partial

from torch import nn

from featcache.backbones.architecture import Architecture, without
from featcache.errors import BadInput

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
DENSENETS = ("densenet121", "densenet161", "densenet169", "densenet201")


def _build(name: str) -> nn.Module:
    try:
        from bcos import models
        from bcos.modules import norms
    except ImportError:
        raise BadInput("B-cos networks need the package bcos: pip install 'featcache[bcos]'") from None
    return getattr(models, name)(norm_layer=norms.NoBias(norms.BatchNormUncentered2d))


def _architecture(name: str, signature: str, classifier: str, aliases: dict[str, str]) -> Architecture:
    return Architecture(
        name=f"bcos_{name}",
        build=partial(_build, name),
        # The classifier is a convolution on the last map. What follows it goes too, or it would pool that map.
        trunk=without(classifier, "logit_layer"),
        signature=signature,
        classifier=(f"{classifier}.", "logit_layer."),
        aliases=aliases,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        inverse=True,
    )


def architectures() -> dict[str, Architecture]:
    """Return the B-cos networks by name. feat1 is the stem before its pool, feat2..feat5 the stages."""
    stages = {"feat1": "bn1", **{f"feat{i + 1}": f"layer{i}" for i in range(1, 5)}, "last": "layer4"}
    blocks = {"feat1": "features.norm0", **{f"feat{i + 1}": f"features.denseblock{i}" for i in range(1, 4)}}
    blocks |= {"feat5": "features", "last": "features"}
    resnets = [_architecture(name, "layer4.0.conv1.linear.weight", "fc", stages) for name in RESNETS]
    densenets = [_architecture(name, "features.conv0.linear.weight", "classifier", blocks) for name in DENSENETS]
    return {a.name: a for a in (*resnets, *densenets)}
