"""The logits of kNN probes, which read the training images whenever they predict."""

from collections.abc import Iterator, Sequence

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from featcache.errors import BadInput
from featcache.probes.engine.memory import FeatureMemory
from featcache.probes.inputs.input import Input, load_labels
from featcache.probes.neighbours.memory import SearchMemory
from featcache.probes.neighbours.rows import TrainingRows
from featcache.probes.neighbours.search import Draw, Search, candidates
from featcache.probes.neighbours.votes import vote
from featcache.probes.spec import ProbeSpec
from featcache.store.reader import Store

# Bytes of the logits, and of the labels of neighbours, that are computed at a time.
LOGITS = 64 << 20


class NeighbourPredictor:
    """Probes of one block of kNN probes, as a function from splits to logits. One search serves all of them.

    train: the splits whose images vote. memory: bytes for all that is held, by default half of what is free.
    """

    def __init__(
        self,
        specs: Sequence[ProbeSpec],
        store: Store,
        train: Sequence[str],
        device: torch.device,
        memory: float | None = None,
    ):
        self._specs, self._store, self._train, self._device = specs, store, tuple(train), device
        self._read, self._room = Input.of(specs[0]), FeatureMemory.of(device, memory).resident
        self._cosine = specs[0].head.distance == "cosine"

    @torch.no_grad()
    def __call__(self, splits: Sequence[str]) -> Iterator[Tensor]:
        """Yield the logits of a union of splits in order, float32 [P, n, C].

        The training images are not neighbours of themselves. Raises BadInput for features that have no neighbours.
        """
        labels = load_labels(self._store, self._train).to(self._device)
        draw = Draw(None, tuple(sorted({s.head.k for s in self._specs})), any(s.head.needs_exact for s in self._specs))
        memory = self._memory(len(labels), [draw])
        training = TrainingRows(self._read, self._store, self._train, self._device, held=memory.held)
        self._check(training.norms, self._train, 0)
        search, classes = Search(training, self._specs[0].head.distance, [draw], memory), len(self._store.classes)
        own, done = tuple(splits) == self._train, 0
        total = sum(len(self._store[name]) for name in splits)
        with tqdm(total=total, unit="image", desc="neighbours", leave=False) as progress:
            for images in self._images(splits, memory.images):
                self._check(images.double().norm(dim=1), splits, done)
                found = search(images, done if own else None)
                for start, end in self._pieces(len(images), labels, max(draw.ks), classes):
                    parts = [(n.similarities[start:end], labels[n.rows[start:end]]) for n in found]
                    yield torch.stack([vote(s.head, s.loss, *parts[0], classes) for s in self._specs])
                done += len(images)
                progress.update(len(images))

    def _memory(self, rows: int, draws: Sequence[Draw]) -> SearchMemory:
        """Divide the memory, and say so."""
        width, kept = self._read.shape(self._store)[0], sum(candidates(max(draw.ks)) for draw in draws)
        itemsize = 4 if self._read.pooled else self._store[self._train[0]][self._read.feature].dtype.itemsize
        memory = SearchMemory.of(self._room, self._device, rows, width, itemsize, kept)
        how = "stay in memory" if memory.held else "are read again for every group"
        click.echo(
            f"neighbours among {rows} images of {self._read.name} ({width} numbers) on {self._device}, for groups of "
            f"{memory.images} images: {memory.bytes / 1e9:.2g} GB; the {rows} {how}",
            err=True,
        )
        return memory

    def _images(self, splits: Sequence[str], rows: int) -> Iterator[Tensor]:
        """Yield the features of a union of splits, float32 [n, D], `rows` images at a time."""
        waiting: list[Tensor] = []
        for chunk in self._read.chunks(self._store, splits, self._device):
            waiting.append(chunk)
            if sum(map(len, waiting)) >= rows:
                joined = torch.cat(waiting)
                yield joined[:rows]
                waiting = [joined[rows:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting)

    def _pieces(self, images: int, labels: Tensor, k: int, classes: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of pieces of the images whose logits, and labels of neighbours, fit into LOGITS bytes."""
        one = max(4 * len(self._specs) * classes, 10 * k * classes if labels.ndim == 2 else 8 * k)
        size = max(LOGITS // one, 1)
        yield from ((start, min(start + size, images)) for start in range(0, images, size))

    def _check(self, norms: Tensor, splits: Sequence[str], first: int) -> None:
        """Raise BadInput, which names the image, if a feature has no neighbours. norms: of the images from `first` on."""
        bad = ~norms.isfinite() | (norms == 0 if self._cosine else False)
        if not bad.any():
            return
        row = int(bad.nonzero()[0])
        reason = "is all zero, and has no cosine" if norms[row] == 0 else "is not finite"
        ids = np.concatenate([[f"{name} {image!r}" for image in self._store[name].ids] for name in splits])
        raise BadInput(
            f"feature {self._read.name} of {ids[first + row]} in store {self._store.path} {reason}: it has no nearest "
            f"neighbours ({int(bad.sum())} such images); "
            + ("take distance euclidean, or another feature" if norms[row] == 0 else "extract with --dtype float32")
        )
