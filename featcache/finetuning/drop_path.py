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

    The places are those that timm and torchvision have; a network of another kind has none.
    """
    blocks = [block for block in trunk.modules() if any(_is_place(*child) for child in block.named_children())]
    for number, block in enumerate(blocks):
        own = share * number / max(len(blocks) - 1, 1)
        for name, child in list(block.named_children()):
            if _is_place(name, child):
                setattr(block, name, DropPath(own))
    return len(blocks)


def _is_place(name: str, module: Any) -> bool:
    return bool(PLACE.fullmatch(name)) or type(module).__name__ == "StochasticDepth"
