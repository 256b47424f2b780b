"""ResNets (He et al., CVPR 2016; Xie et al., CVPR 2017; Zagoruyko et al., BMVC 2016): torchvision's, mmpretrain's.

mmpretrain's variants differ from torchvision's network: caffe has the stride in a block's first 1x1 convolution; V1c
has three 3x3 convolutions for a stem; V1d has these too, and average pooling in front of the 1x1 convolution of a
shortcut (both He et al., "Bag of tricks", CVPR 2019).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from featcache.backbones.architecture import Architecture, without
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.families.lookalikes import like_fixed
from featcache.backbones.families.torchvision_import import models
from featcache.backbones.families.torchvision_weights import customs, input_of

NAMES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
DEPTHS = ("50", "101", "152")
STAGES = {f"feat{i + 1}": f"layer{i}" for i in range(1, 5)} | {"last": "layer4"}
STEM_WIDTH = 64


def caffe(build: Callable[[], Any]) -> nn.Module:
    """Build a ResNet of bottlenecks in which the first 1x1 convolution of a stage has the stride."""
    network = build()
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, (1, 1)
    return network


class DeepStem(models.ResNet):  # type: ignore[misc]  # torchvision has no types
    """A ResNet with three 3x3 convolutions in `stem` in place of conv1; avg_down: average-pooled shortcuts."""

    def __init__(self, layers: Sequence[int], avg_down: bool, block: Any = models.resnet.Bottleneck) -> None:
        super().__init__(block, layers)
        self.stem = nn.Sequential()
        width = STEM_WIDTH // 2
        for fan_in, fan_out, stride in ((3, width, 2), (width, width, 1), (width, STEM_WIDTH, 1)):
            self.stem.append(nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False))
            self.stem.append(nn.BatchNorm2d(fan_out))
            self.stem.append(nn.ReLU(inplace=True))
        del self.conv1, self.bn1, self.relu
        if avg_down:
            for stage in (self.layer2, self.layer3, self.layer4):
                conv, norm = stage[0].downsample
                pool = nn.AvgPool2d(conv.stride, conv.stride, ceil_mode=True, count_include_pad=False)
                conv.stride = (1, 1)
                stage[0].downsample = nn.Sequential(pool, conv, norm)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to the classifier's logits for the pooled last map."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(self.stem(images))))))
        return self.fc(self.avgpool(maps).flatten(1))


def architectures() -> dict[str, Architecture]:
    """Return the ResNets by name. feat1 is the stem before its max-pool, feat2..feat5 the stages."""
    plain: dict[str, Callable[[], nn.Module]] = {name: partial(getattr(models, name), weights=None) for name in NAMES}
    # Tensors cannot tell the stride; where several names fit, the first in the list is taken.
    plain |= {f"resnet{depth}_caffe": partial(caffe, plain[f"resnet{depth}"]) for depth in DEPTHS}
    layers = {"50": [3, 4, 6, 3], "101": [3, 4, 23, 3], "152": [3, 8, 36, 3]}
    deep = {
        f"resnetv1{kind}{depth}": partial(DeepStem, layers[depth], avg_down=kind == "d")
        for kind in "cd"
        for depth in DEPTHS
    }
    family = partial(Architecture, trunk=without("fc"), classifier=("fc.",))
    common = {
        name: family(
            name=name, build=build, signature="layer4.0.conv1.weight", aliases={"feat1": "relu"} | STAGES,
            layouts={"7.0.conv1.weight": name_children}, alike=like_fixed(name),
            customs=partial(customs, name.removesuffix("_caffe")),
            **input_of(name.removesuffix("_caffe")),
        )
        for name, build in plain.items()
    }  # fmt: skip
    return common | {
        name: family(name=name, build=build, signature="stem.7.weight", aliases={"feat1": "stem"} | STAGES)
        for name, build in deep.items()
    }


def name_children(tensors: Tensors) -> Tensors:
    """Rename the tensors of nn.Sequential(*resnet.children()), as lightly and others save it, to the ResNet's own."""
    names = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4", "9": "fc"}
    parts = ((key.partition("."), tensor) for key, tensor in tensors.items())
    return {names.get(first, first) + dot + rest: tensor for (first, dot, rest), tensor in parts}
