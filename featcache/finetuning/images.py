"""Training images: a crop and a flip as in extraction's views, then changes of the pixels by torchvision's transforms."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from featcache.backbones.input.preprocessing import Preprocessing
from featcache.datasets.record import Dataset
from featcache.errors import BadInput
from featcache.extraction.images import Images, Item, read_input
from featcache.probes.tuning import Full

# What decides a training image: its split, its row there, its crop and flip, and the seed of its other changes.
Key = tuple[str, int, tuple[int, ...], int]


class TrainingImages(Images):
    """Augmented training images by Key. The crop takes the place of the resize rule."""

    def __init__(self, dataset: Dataset, preprocessing: Preprocessing, tuning: Full) -> None:
        super().__init__(dataset, for_training(preprocessing, tuning))
        self.changes = _changes(tuning, preprocessing)

    def __getitem__(self, key: Any) -> Item:
        split, row, crop, seed = key
        try:
            pixels, digest = read_input(self.splits[split][row], self.preprocessing, self.decoder, crop)
        except BadInput as error:
            return error.message
        if self.changes:
            # Whichever process does this, the image depends on the seed alone, and the process's own numbers go on.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for change in self.changes:
                    pixels = change(pixels)
        return pixels, digest


def for_training(preprocessing: Preprocessing, tuning: Full) -> Preprocessing:
    """Return the preprocessing of training images, which are crops and so know no resize rule."""
    return replace(preprocessing, size=tuning.train_size or preprocessing.size, resize="squash", short_side=None)


def _changes(tuning: Full, preprocessing: Preprocessing) -> Sequence[Callable[[Tensor], Tensor]]:
    """Return torchvision's transforms of uint8 [3, S, S] that a recipe asks for, in order."""
    if not (tuning.color_jitter or tuning.randaugment or tuning.erasing):
        return ()
    # Imported only where it is needed: it takes half a second.
    from torchvision.transforms import v2

    changes: list[Callable[[Tensor], Tensor]] = []
    if tuning.randaugment:
        fill = [round(255 * value) for value in preprocessing.mean]
        if tuning.randaugment_p < 1:
            one = v2.RandomApply([v2.RandAugment(1, tuning.randaugment, fill=fill)], tuning.randaugment_p)
            changes += [one] * tuning.randaugment_ops
        else:
            changes.append(v2.RandAugment(tuning.randaugment_ops, tuning.randaugment, fill=fill))
    if tuning.color_jitter:
        strength = tuning.color_jitter
        changes.append(v2.ColorJitter(strength, strength, strength))
    if tuning.erasing:
        # With the mean, which normalisation makes 0.
        changes.append(v2.RandomErasing(tuning.erasing, value=[round(255 * value) for value in preprocessing.mean]))
    return changes


def mix(images: Tensor, tuning: Full) -> tuple[Tensor, float]:
    """Mix each image with its predecessor in the batch (torchvision's MixUp or CutMix), by torch's global generator.

    images: normalised [B, C, H, W]. Returns (images, share): the share of its own label; the label of the predecessor,
    labels.roll(1, 0), has the rest. Without mixing it is 1.
    """
    if not (tuning.mixup or tuning.cutmix) or len(images) < 2:
        return images, 1.0
    from torchvision.transforms import v2

    # The labels stand for themselves: what they become says the share.
    numbers = torch.arange(len(images), device=images.device)
    kinds = [(v2.MixUp, tuning.mixup), (v2.CutMix, tuning.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=len(images)) for kind, alpha in kinds if alpha]
    mixed, shares = chosen[int(torch.randint(len(chosen), ()))](images, numbers)
    return mixed, float(shares[0, 0])
