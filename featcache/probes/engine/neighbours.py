"""The logits of kNN probes, which read the training images whenever they predict."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from featcache.errors import BadInput
from featcache.probes.engine.memory import FeatureMemory
from featcache.probes.heads.knn import Knn
from featcache.probes.inputs.input import Input, load_labels
from featcache.probes.neighbours.memory import SearchMemory
from featcache.probes.neighbours.rows import TrainingRows
from featcache.probes.neighbours.search import Draw, Search, candidates
from featcache.probes.neighbours.votes import vote
from featcache.probes.spec import ProbeSpec
from featcache.progress import Progress, say
from featcache.store.reader import Store

# Bytes of the logits, and of the labels of neighbours, that are computed at a time.
LOGITS = 16 << 20


class NeighbourPredictor:
    """kNN probes that compare images alike, as a function from splits to logits. One search serves all of them.

    rows: for each of the specs, which images of the splits `train` vote, sorted int64, or None for all. memory: bytes
    for all that is held, by default half of what is free.
    """

    def __init__(
        self,
        specs: Sequence[ProbeSpec],
        rows: Sequence[Tensor | None],
        store: Store,
        train: Sequence[str],
        device: torch.device,
        memory: float | None = None,
    ):
        self._specs, self._store, self._train, self._device = specs, store, tuple(train), device
        self._read, self._room = Input.of(specs[0]), FeatureMemory.of(device, memory).resident
        self._heads = [spec.head for spec in specs if isinstance(spec.head, Knn)]
        self._distance, self._said = self._heads[0].distance, False
        # Probes that learned from the same images share a draw.
        samples = [spec.sample for spec in specs]
        self._samples = list(dict.fromkeys(samples))
        self._draw_of = [self._samples.index(sample) for sample in samples]
        self._rows = [rows[samples.index(sample)] for sample in self._samples]

    @torch.no_grad()
    def __call__(self, splits: Sequence[str], rows: np.ndarray | None = None) -> Iterator[Tensor]:
        """Yield the logits of a union of splits in order, float32 [P, n, C].

        rows: sorted rows of the union, by default all. An image that votes is not its own neighbour. Raises BadInput for
        features that have no neighbours.
        """
        labels, classes = load_labels(self._store, self._train), len(self._store.classes)
        wanted, draws = self._draws()
        labels = (labels if wanted is None else labels[wanted]).to(self._device)
        memory = self._memory(len(labels), draws)
        training = TrainingRows(self._read, self._store, self._train, self._device, wanted, memory.held)
        self._check(training.norms, self._train, torch.arange(len(labels)) if wanted is None else wanted)
        if training.alike:
            raise self._read.constant(self._train)
        search, done = Search(training, self._distance, draws, memory), 0
        numbers = torch.arange(sum(len(self._store[name]) for name in splits))
        numbers = numbers if rows is None else numbers[torch.from_numpy(rows)]
        own = _places(self._among_training(splits)[numbers], wanted).to(self._device)
        with Progress("neighbours", len(numbers), unit="image", fleeting=True) as progress:
            for images in self._images(splits, rows, memory.images):
                part = slice(done, done + len(images))
                self._check(images.double().norm(dim=1), splits, numbers[part])
                found = search(images, own[part])
                for start, end in self._pieces(len(images), labels, max(max(d.ks) for d in draws), classes):
                    votes = [(n.similarities[start:end], labels[n.rows[start:end]]) for n in found]
                    yield torch.stack(
                        [
                            vote(head, spec.loss, *votes[draw], classes)
                            for head, spec, draw in zip(self._heads, self._specs, self._draw_of, strict=True)
                        ]
                    )
                done += len(images)
                progress.update(len(images))

    def _among_training(self, splits: Sequence[str]) -> Tensor:
        """Return the numbers of the images of some splits among those of the splits that vote, -1 for others."""
        firsts, at = {}, 0
        for name in self._train:
            firsts[name], at = at, at + len(self._store[name])
        own = []
        for name in splits:
            numbers = torch.arange(len(self._store[name]))
            own.append(numbers + firsts[name] if name in firsts else torch.full_like(numbers, -1))
        return torch.cat(own)

    def _draws(self) -> tuple[Tensor | None, list[Draw]]:
        """Return the rows that any of the probes learned from, None for all, and the draws within them."""
        partial = [rows for rows in self._rows if rows is not None]
        wanted = torch.cat(partial).unique() if len(partial) == len(self._rows) else None
        draws = []
        for number, rows in enumerate(self._rows):
            heads = [head for head, draw in zip(self._heads, self._draw_of, strict=True) if draw == number]
            places = None if rows is None else _places(rows, wanted).to(self._device)
            ks = tuple(sorted({head.k for head in heads}))
            draws.append(Draw(places, ks, any(head.needs_exact for head in heads)))
        return wanted, draws

    def _memory(self, rows: int, draws: Sequence[Draw]) -> SearchMemory:
        """Divide the memory, and say so."""
        width, kept = self._read.shape(self._store)[0], sum(candidates(max(draw.ks)) for draw in draws)
        itemsize = self._read.bytes(self._store, self._train, 1) // width
        memory = SearchMemory.of(self._room, self._device, rows, width, itemsize, kept)
        maps = [array for array in self._read.arrays(self._store[self._train[0]]) if array.ndim > 2]
        averaged = ", averaged over positions" if maps and self._read.pooled else ""
        how = "held in memory" if memory.held else f"read again for every {memory.images} images"
        if not self._said:
            self._said = True
            say(
                f"kNN: {rows} training images of {self._read.feature}{averaged} ({width} numbers), {how}; "
                f"{memory.bytes / 1e9:.2g} GB on {self._device}"
            )
        return memory

    def _images(self, splits: Sequence[str], rows: np.ndarray | None, count: int) -> Iterator[Tensor]:
        """Yield the features of a union of splits, float32 [n, D], `count` images at a time."""
        waiting: list[Tensor] = []
        for chunk in self._read.chunks(self._store, splits, self._device, rows):
            waiting.append(chunk)
            if sum(map(len, waiting)) >= count:
                joined = torch.cat(waiting)
                yield joined[:count]
                waiting = [joined[count:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting)

    def _pieces(self, images: int, labels: Tensor, k: int, classes: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of pieces of the images whose logits, and labels of neighbours, fit into LOGITS bytes."""
        one = max(4 * len(self._specs) * classes, 10 * k * classes if labels.ndim == 2 else 8 * k)
        size = max(LOGITS // one, 1)
        yield from ((start, min(start + size, images)) for start in range(0, images, size))

    def _check(self, norms: Tensor, splits: Sequence[str], numbers: Tensor) -> None:
        """Raise BadInput, which names the image, if a feature has no neighbours. norms: of the images with these numbers."""
        bad = ~norms.isfinite() | ((norms == 0) & (self._distance == "cosine"))
        if not bad.any():
            return
        row = int(bad.nonzero()[0])
        reason = "is all zero, and has no cosine" if norms[row] == 0 else "is not finite"
        ids = np.concatenate([[f"{name} {image!r}" for image in self._store[name].ids] for name in splits])
        raise BadInput(
            f"feature {self._read.feature} of {ids[int(numbers[row])]} in store {self._store.path} {reason}: it has no nearest "
            f"neighbours ({int(bad.sum())} such images); "
            + (
                "take distance euclidean, or another feature"
                if norms[row] == 0
                else "extract it again, into another store"
            )
        )


def _places(rows: Tensor, wanted: Tensor | None) -> Tensor:
    """Return the places of rows among those that are wanted, sorted, -1 for those that are not; None wants all."""
    if wanted is None:
        return rows
    places = torch.searchsorted(wanted, rows).clamp(max=len(wanted) - 1)
    return torch.where(wanted[places] == rows, places, -1)
