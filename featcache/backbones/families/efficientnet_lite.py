"""EfficientNet-Lite 0 to 4, as the package efficientnet-lite-pytorch builds and names them."""

from functools import partial
from typing import Any

import torch
from torch import nn

from featcache.backbones.architecture import Architecture
from featcache.errors import BadInput

# Input sizes of the published TensorFlow models; their mean is 127 and their std 128, for pixels in 0..255.
SIZES = (224, 240, 260, 280, 300)
# Pixels that TensorFlow's evaluation cuts off the short side: 256 to 224.
CROP_PADDING = 32
MEAN = (127 / 255, 127 / 255, 127 / 255)
STD = (128 / 255, 128 / 255, 128 / 255)


def _build(version: int) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise BadInput(
            "EfficientNet-Lite needs the package efficientnet-lite-pytorch: pip install 'featcache[demo]'"
        ) from None
    return EfficientNet.from_name(f"efficientnet-lite{version}")


class Trunk(nn.Module):
    """The network without its classifier: `stem`, `blocks`, `head` (the last map, 1280 channels)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*network._blocks)
        self.head = nn.Sequential(network._conv_head, network._bn1, nn.ReLU6())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to the last map [B, 1280, H/32, W/32]."""
        return self.head(self.blocks(self.stem(images)))


def architectures() -> dict[str, Architecture]:
    """Return the five EfficientNet-Lites by name. `last` is the map that the classifier pools."""
    return {
        f"efficientnet_lite{version}": Architecture(
            name=f"efficientnet_lite{version}",
            build=partial(_build, version),
            trunk=Trunk,
            signature="_conv_head.weight",
            classifier=("_fc.",),
            aliases={"last": "head"},
            size=size,
            short_side=size + CROP_PADDING,
            mean=MEAN,
            std=STD,
        )
        for version, size in enumerate(SIZES)
    }
