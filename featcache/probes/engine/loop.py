"""The training loop: one epoch of blocks that read the same input."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from featcache.device import sent
from featcache.probes.engine.training import Training
from featcache.probes.inputs.batches import MiniBatches, Piece


def train_epoch(
    trainings: Sequence[Training],
    pieces: Iterable[Piece],
    labels: Tensor,
    device: torch.device,
    tick: Callable[[int], None] = lambda steps: None,
) -> None:
    """Train blocks for one epoch on one pass over the data.

    pieces: of the epoch. labels: of all training images, on the device. tick: called after every step with the number of
    probes that took it.
    """
    by_size: dict[int, tuple[MiniBatches, list[Training]]] = {}
    for training in trainings:
        training.begin_epoch()
        by_size.setdefault(training.batch_size, (MiniBatches(training.batch_size), []))[1].append(training)
    for piece in pieces:
        for batches, members in by_size.values():
            for values, rows in batches.cut(piece):
                features = sent(values, device).float()
                targets = labels[sent(rows, device)]
                for training in members:
                    training.feed(features, targets)
                    tick(len(training.specs))
    for training in trainings:
        training.end_epoch()
