"""The logits of a network on images as they are, not augmented."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from featcache.datasets.record import Dataset
from featcache.extraction.images import Images, image_batches
from featcache.finetuning.network import Network
from featcache.ranks import Alone


@torch.no_grad()
def logits_of(
    network: Network,
    weights: Mapping[str, Tensor],
    data: Dataset,
    splits: Sequence[str],
    batch_size: int,
    workers: int,
    device: torch.device,
    ranks: Alone,
) -> Tensor:
    """Return the logits float32 [N, C], on the CPU, of a union of splits.

    weights: tensors that take the place of the network's, such as their moving average. The processes share the images,
    and each gets all logits.
    """
    network.eval()
    keys = [(split, row) for split in splits for row in range(len(data.splits[split]))]
    rows = [part for part in np.array_split(np.arange(len(keys)), -(-len(keys) // batch_size)) if len(part)]
    mine = rows[ranks.rank :: ranks.size]
    logits = torch.zeros(len(keys), network.classes, device=device)
    preprocessing = network.backbone.preprocessing
    batches = [[keys[row] for row in part] for part in mine]
    images = Images(data, preprocessing)
    loaded = image_batches(images, batches, min(workers, len(mine)), pin_memory=device.type == "cuda")
    for part, (pixels, _) in zip(mine, loaded, strict=True):
        normalised = preprocessing.normalise(pixels.to(device, non_blocking=True))
        logits[part] = _called(network, weights, normalised)
    if ranks.size > 1:
        # Every image is zero in all processes but one.
        torch.distributed.all_reduce(logits)
    return logits.cpu()


def _called(network: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    logits: Tensor = torch.func.functional_call(network, dict(weights), (images,))
    return logits
