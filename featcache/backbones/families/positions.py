"""Position embeddings for another input size than the checkpoint's, as each published code resizes them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from featcache.errors import BadInput

# All are bicubic. DINO (Caron et al., ICCV 2021) and DINOv2 (Oquab et al., TMLR 2024) scale by (new + 0.1) / old,
# which moves every sample a little. DINOv2 with registers, timm and OpenCLIP filter against aliasing. MAE, DeiT and
# mmpretrain do neither. torchvision aligns the corners.
RULES = {
    "dino": "scale (new + 0.1) / old, as DINO's and DINOv2's code does",
    "plain": "as MAE's, DeiT's and mmpretrain's code does",
    "antialias": "anti-aliased, as DINOv2's code with registers, timm's and OpenCLIP's do",
    "corners": "corners aligned, as torchvision's code does",
}


def resize_positions(positions: torch.Tensor, side: int, rule: str) -> torch.Tensor:
    """Resize position embeddings of a square grid of patches.

    positions: float [old * old, D], row by row. side: patches along a side of the new grid. rule: one of
    RULES. Returns [side * side, D].
    """
    old = math.isqrt(len(positions))
    grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if rule == "dino":
        grid = F.interpolate(grid, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic")
    elif rule == "corners":
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=True)
    else:
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False, antialias=rule == "antialias")
    return grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(positions.dtype)


def fit_positions(module: nn.Module, name: str, size: int, patch: int, rule: str, arch: str) -> str:
    """Make a module's position embeddings fit an input of size x size pixels, if they do not yet.

    name: of the parameter, [..., P + n * n, D] with P prefix tokens. rule: one of RULES. Returns a line on what was
    done, or an empty one. Raises BadInput if the patches do not fill the input.
    """
    if size % patch:
        raise BadInput(f"--size {size}: {arch} needs a multiple of its patch, {patch} pixels")
    old, side = getattr(module, name), size // patch
    length = old.shape[-2]
    old_side = math.isqrt(length)
    prefix = length - old_side * old_side
    if old_side == side:
        return ""
    flat = old.detach().reshape(length, -1)
    new = torch.cat([flat[:prefix], resize_positions(flat[prefix:], side, rule)])
    setattr(module, name, nn.Parameter(new.reshape(*old.shape[:-2], *new.shape), requires_grad=False))
    return f"positions {old_side}x{old_side} resized to {side}x{side}, bicubic, {RULES[rule]}"
