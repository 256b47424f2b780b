"""Stochastic depth (Huang et al., ECCV 2016): residual branches that are dropped at random in training."""

import re
from typing import Any

from torch import Tensor, nn

# timm leaves a place for it in every block, which is an identity where the network was built without.
PLACE = re.compile(r"drop_path\d*")


class DropPath(nn.Module):
    """Drops the branch for a share of the images in training, and scales it for the others, so that its mean stays."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, branch: Tensor) -> Tensor:
        """Map [B, ...] to the same."""
        if not self.training or not self.share:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - self.share)
        return branch * kept / (1 - self.share)


def set_drop_path(trunk: nn.Module, share: float) -> int:
    """Set the shares of a network's blocks to rise linearly from 0 to `share`, as timm does. Returns how many it has.

    The places are those that timm and torchvision have, and the ends of the branches of torchvision's ResNets, which
    have no place for it; a network of another kind has none.
    """
    blocks = [block for block in trunk.modules() if _places(block) or _is_residual(block)]
    for number, block in enumerate(blocks):
        own = share * number / max(len(blocks) - 1, 1)
        for name in _places(block):
            setattr(block, name, DropPath(own))
        if _is_residual(block):
            _drop_residual(block, DropPath(own))
    return len(blocks)


def _places(block: nn.Module) -> list[str]:
    """Return the names under which a block keeps its drop path. In timm's ResNets that is None at first."""
    named = [name for name, child in block.named_children() if _is_place(name, child)]
    return [*named, *(name for name in vars(block) if PLACE.fullmatch(name) and vars(block)[name] is None)]


def _is_place(name: str, module: Any) -> bool:
    return bool(PLACE.fullmatch(name)) or type(module).__name__ == "StochasticDepth"


def _is_residual(block: nn.Module) -> bool:
    return type(block).__module__ == "torchvision.models.resnet" and hasattr(block, "downsample")


def _drop_residual(block: Any, drop: DropPath) -> None:
    """Drop what a block of torchvision's ResNets adds to its input: the output of its last norm."""
    # As a module of the block, so that it is told of train and eval mode; it has no weights.
    block.drop_path = drop
    last = block.bn3 if hasattr(block, "bn3") else block.bn2
    last.register_forward_hook(lambda _module, _inputs, output: drop(output))
