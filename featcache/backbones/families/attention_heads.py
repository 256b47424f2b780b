"""How many attention heads a vision transformer has: named by --arch, or guessed, since its tensors do not say."""

import math
from collections.abc import Mapping

import torch

from featcache.backbones.architecture import Hints
from featcache.errors import BadInput

# Widths at which the published networks have heads that are not 64 wide: SigLIP's so400m; ViT-H, -g, -G and -e.
PUBLISHED = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
MOST_HEADS = 1024
# Widths at which some methods' networks have twelve heads, 16 or 32 wide, where all others of the same shapes have heads
# that are 64 wide. MoCo v3 (Chen et al., ICCV 2021) in its own code and mmpretrain's has width 384, solo-learn's both.
TWELVE = {384: "MoCo v3's and SLIP's", 192: "solo-learn's MoCo v3's"}
# Words that occur together in the names of these methods' tensors.
TWELVE_WORDS = {"MoCo v3": {"base_encoder", "momentum_encoder", "predictor"}, "SLIP": {"visual", "image_mlp"}}


def usual_heads(width: int) -> int:
    """Return the attention heads that a name without _headsN stands for: 64 wide, but 16 of them at three widths."""
    return 16 if width in (1280, 1408, 1664) else max(width // 64, 1)


def choose_heads(width: int, hints: Hints, published: Mapping[int, int] = PUBLISHED) -> tuple[int, str]:
    """Return (heads, why): those that --arch names, else those of the published networks of this width.

    A width that nobody has published gets the number of heads that divides it and makes them nearest to 64 wide.
    Raises BadInput if the number that --arch names does not divide the width.
    """
    asked = hints.get("heads")
    if asked and width % asked:
        raise BadInput(f"--arch ..._heads{asked}: {asked} does not divide {width}, the width of the tokens")
    if "heads" in hints and width % (asked or usual_heads(width)) == 0:
        return asked or usual_heads(width), "as --arch says"
    divisors = (n for n in range(1, min(width, MOST_HEADS) + 1) if width % n == 0)
    heads = published.get(width) or min(divisors, key=lambda n: abs(math.log(width / n / 64)))
    return heads, "a guess from the width"


def twelve_by_names(words: set[str]) -> str:
    """Return the method with twelve heads whose tensors have names with these words; empty if none has."""
    return next((method for method, own in TWELVE_WORDS.items() if own <= words), "")


def has_moco_v3_positions(positions: torch.Tensor) -> bool:
    """Return whether position embeddings are the fixed ones of MoCo v3's code, a transposition of MAE's.

    positions: float [n * n, D], row by row. They may have been trained a little further, so that they are compared by
    their correlation.
    """
    side, quarter = math.isqrt(len(positions)), positions.shape[1] // 4
    if positions.is_meta or positions.shape != (side * side, 4 * quarter) or side < 2:
        return False
    angles = torch.outer(torch.arange(side), 10000.0 ** -(torch.arange(quarter) / quarter))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    expected, given = (grid - grid.mean(0) for grid in (torch.cat([rows, columns], 1), positions.float()))
    return bool(torch.cosine_similarity(expected.flatten(), given.flatten(), 0) > 0.9)
