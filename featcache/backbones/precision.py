"""The arithmetic in which a backbone runs, and what that does to its features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.device import multiplying, why_not
from featcache.errors import BadInput, nearest
from featcache.feature import Feature

# The dtype of matrix products and convolutions; tf32 is a mode of float32.
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise BadInput for an unknown precision, and for one that the device cannot do."""
    if precision not in PRECISIONS:
        raise BadInput(
            f"--precision {precision}: unknown{nearest(precision, PRECISIONS)} (known: {', '.join(PRECISIONS)})"
        )
    if reason := why_not(precision, device):
        raise BadInput(f"--precision {precision} {reason}")


@contextmanager
def running(precision: str, device: torch.device) -> Iterator[None]:
    """Run inference in a precision within the block.

    bf16 and fp16 are torch's autocast: weights stay as they are, and operations that need it stay in float32.
    """
    dtype = PRECISIONS[precision]
    with multiplying(precision), torch.inference_mode():
        if dtype is torch.float32:
            yield
        else:
            with torch.autocast(device.type, dtype):
                yield


def cosine_to_float32(backbone: Backbone, images: torch.Tensor, features: Sequence[Feature], precision: str) -> float:
    """Return the cosine of features in a precision to those in float32, the minimum over features and images.

    images: normalised float32 [B, C, H, W], on the backbone's device. Raises BadInput if a value overflows.
    """
    with running("float32", images.device):
        exact = backbone(images, features)
    with running(precision, images.device):
        values = backbone(images, features)
    for name in values:
        if exact[name].isfinite().all() and not values[name].isfinite().all():
            raise BadInput(f"--precision {precision}: feature {name} overflows; use bf16 or float32")
    return round(min(float(_cosine(values[name], exact[name]).min()) for name in values), 6)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine in float64 of [B, ...] and [B, ...], row by row: [B], 1 where both are zero."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    both_zero = (a == 0).all(1) & (b == 0).all(1)
    return torch.where(both_zero, 1, nn.functional.cosine_similarity(a, b, eps=1e-300))
