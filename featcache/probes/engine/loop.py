"""The training loop: one epoch of blocks that train on the same pass over the data."""

from collections.abc import Callable, Hashable, Iterable, Sequence

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
    """Train blocks for one epoch on one pass over the data, each on its own columns of the features.

    pieces: of the epoch. labels: of all training images, on the device. tick: called after every step with the number of
    probes that took it.
    """
    alike: dict[Hashable, tuple[MiniBatches, list[Training]]] = {}
    for training in trainings:
        training.begin_epoch()
        size, columns = training.batch_size, training.columns
        alike.setdefault((size, columns), (MiniBatches(size, columns), []))[1].append(training)
    for piece in pieces:
        for batches, members in alike.values():
            for values, rows in batches.cut(piece):
                features = sent(values, device).float()
                targets = labels[sent(rows, device)]
                for training in members:
                    training.feed(features, targets)
                    tick(len(training.specs))
    for training in trainings:
        training.end_epoch()
