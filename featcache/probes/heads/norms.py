"""The norm between two layers of a stack."""

from collections.abc import Callable

from torch import Tensor

from featcache.probes.heads.layered import NORMS, Layout
from featcache.probes.heads.stacked_layers import BatchNorm, GhostNorm, Layer, Norm, UncentredBatchNorm

NORM_LAYERS: dict[str, Callable[..., Norm]] = {"bn": BatchNorm, "bnu": UncentredBatchNorm}


def norm_layers(layout: Layout, weights: dict[str, Tensor], layer: int) -> list[Layer]:
    """Return the stacked norm behind a layer as a list, empty if there is none. weights: {name: [P, ...]}."""
    if layout.norm == "none":
        return []
    norm, tensors = NORM_LAYERS[layout.norm], [weights[f"bn{layer}.{name}"] for name in NORMS[layout.norm]]
    return [GhostNorm(norm, tensors, layout.norm_batch) if layout.norm_batch else norm(*tensors)]
