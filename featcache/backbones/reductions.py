"""What a layer yields, and what each reduction makes of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from featcache.backbones.architecture import Architecture
from featcache.errors import BadInput
from featcache.feature import Feature

VECTOR, MAP, TOKENS, SEQUENCE = "a vector [B, C]", "a map [B, C, H, W]", "tokens [B, N, D]", "a sequence [B, N, D]"
ALLOWED = {
    VECTOR: ("pooled",),
    MAP: ("pooled", "spatial", "grid"),
    TOKENS: ("pooled", "patch_mean", "cls", "spatial", "grid", "tokens"),
    SEQUENCE: ("tokens",),
}
# The data_format of a module whose maps are [B, C, H, W] in a network where those of others are [B, H, W, C].
CHANNELS_FIRST = "channels_first"


class Output:
    """The output of a layer for a batch of images, and what it is.

    output: whatever the module returned. values: the same, but a map is [B, C, H, W]. kind: one of ALLOWED, or None if
    no feature can be made of it. prefix: number of tokens before the patches. cls: whether the first of them is a class
    token. Made with images, the size (H, W) of the input in pixels, and batch, the number of images.
    """

    def __init__(
        self, output: Any, module: nn.Module, architecture: Architecture, images: Sequence[int], batch: int
    ) -> None:
        self.output = self.values = output
        self.kind: str | None = None
        self.prefix, self.cls = 0, False
        self.grid: tuple[int, ...] = ()
        usable = isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim in (2, 3, 4)
        # Not len(), which would fix the batch size of a traced program.
        if not (usable and output.shape[0] == batch):
            return
        tokens = architecture.tokens
        if output.ndim == 2:
            self.kind = VECTOR
        elif output.ndim == 4:
            convolution = isinstance(module, nn.Conv2d)
            # In a network of tokens, other layers with four axes are the heads of its attention.
            self.kind = MAP if tokens is None or convolution else None
            channels_first = convolution or getattr(module, "data_format", "") == CHANNELS_FIRST
            if architecture.nhwc and not channels_first:
                self.values = output.permute(0, 3, 1, 2)
        elif tokens is not None:
            self.grid = tuple(side // tokens.patch for side in images)
            patches = self.grid[0] * self.grid[1]
            self.kind = TOKENS if output.shape[1] in (patches, patches + tokens.prefix) else SEQUENCE
            self.prefix = output.shape[1] - patches
            self.cls = self.kind == TOKENS and self.prefix > 0 and tokens.cls
        else:
            self.kind = SEQUENCE

    @property
    def reductions(self) -> tuple[str, ...]:
        """Words of the reductions that it allows."""
        return tuple(word for word in ALLOWED.get(self.kind or "", ()) if word != "cls" or self.cls)

    def reduce(self, feature: Feature, arch: str) -> torch.Tensor:
        """Return the feature [B, ...] as a tensor of its own. Raises BadInput if it is not allowed."""
        if feature.kind not in self.reductions:
            if self.kind is None:
                raise BadInput(f"feature {feature}: layer {feature.layer} of {arch} yields no tensor of images")
            if feature.kind == "cls" and self.kind == TOKENS:
                what = f"tokens without a class token ({self.prefix} before the patches)"
            else:
                what = self.kind
            allowed = ", ".join(self.reductions)
            raise BadInput(f"feature {feature}: layer {feature.layer} of {arch} yields {what}, which allows {allowed}")
        if self.kind in (VECTOR, SEQUENCE) or feature.kind == "tokens":
            return self.values.clone()
        if feature.kind == "cls":
            return self.values[:, 0].clone()
        if self.kind == TOKENS:
            patches = self.values[:, self.prefix :]
            if feature.kind in ("pooled", "patch_mean"):
                return patches.mean(1)
            map_ = patches.transpose(1, 2).unflatten(2, self.grid)  # [B, D, h, w]
        else:
            map_ = self.values
        if feature.kind == "pooled":
            return map_.mean((2, 3))
        if feature.kind == "spatial":
            return map_.clone()
        kernel, stride, padding = feature.window
        height, width = (side + 2 * padding for side in map_.shape[2:])
        if kernel > min(height, width):
            raise BadInput(
                f"feature {feature}: a window of {kernel} is larger than the map of {map_.shape[2]} x {map_.shape[3]}"
            )
        return F.avg_pool2d(map_, kernel, stride, padding)
