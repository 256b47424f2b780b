"""GradCAM (Selvaraju et al., ICCV 2017) on cached maps: the backbone is not needed."""

import torch
from torch.nn import functional as F


def gradcam(head, maps, classes):
    """Explain logits of a head from the maps that it sees.

    head: a Head on the layer. maps: float32 [N, D, h, w]. classes: int64 [N], one for each map.
    Returns float32 [N, h, w]: sum over channels of map times its mean gradient, negatives kept.
    """
    maps = maps.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(maps).gather(1, classes[:, None])
        (gradient,) = torch.autograd.grad(logits.sum(), maps)
    return (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1)


def upsample(maps, size):
    """Enlarge maps [N, h, w] to [N, size, size], bilinear as captum does."""
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
