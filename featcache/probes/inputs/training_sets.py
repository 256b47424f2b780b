"""The images that probes train on: all rows of a union of splits, or some of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featcache.errors import BadInput
from featcache.probes.inputs.input import load_labels
from featcache.probes.sample import Sample, digest, draw_rows, fold_numbers, listed_rows
from featcache.store.reader import Store


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The images that a probe trains on.

    splits: of the store, whose rows are counted as one. rows: the sorted rows, int64 [N]; None for all. labels: of these
    images, int8 [N, C] or int64 [N], on the device of training. held_out: rows of the fold that is held out, or None.
    """

    splits: tuple[str, ...]
    rows: np.ndarray | None
    labels: Tensor
    held_out: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def count(self) -> int | None:
        """The number of its rows, or None for all rows of the splits."""
        return None if self.rows is None else len(self.rows)


class TrainingSets:
    """The TrainingSet of every Sample of a run. Each is made when it is asked for, and kept.

    splits: {role: splits of the store}. subsets: {NAME#DIGEST: path of the list}.
    """

    def __init__(
        self,
        store: Store,
        splits: Mapping[str, tuple[str, ...]],
        device: torch.device,
        subsets: Mapping[str, str] | None = None,
    ):
        self.store, self.splits, self.device = store, splits, device
        self.subsets = dict(subsets or {})
        self._listed: dict[str, str] = {}
        self._labels: dict[tuple[str, ...], Tensor] = {}
        self._rows: dict[Sample, np.ndarray | None] = {}
        self._dealt: dict[tuple[Sample, int], np.ndarray] = {}
        self._sets: dict[Sample, TrainingSet] = {}

    def __getitem__(self, sample: Sample) -> TrainingSet:
        """Raises BadInput where a class is left without an image, or a list is wrong or has changed."""
        if sample not in self._sets:
            self._sets[sample] = self._made(sample)
        return self._sets[sample]

    def listed(self, path: str) -> str:
        """Read the list of a subset, and return its NAME#DIGEST. Raises BadInput."""
        if path in self._listed:
            return self._listed[path]
        rows = listed_rows(path, self.ids(("train",)), self._of("train").numpy(), self.store.classes)
        name = f"{Path(path).name}#{self.digest(rows)}"
        self.subsets[name], self._listed[path] = path, name
        self._rows[Sample(subset=name)] = rows
        return name

    def ids(self, roles: Sequence[str]) -> list[str]:
        """Return the ids of all images of some roles."""
        return [i for role in roles for split in self.splits[role] for i in self.store[split].ids]

    def digest(self, rows: np.ndarray) -> str:
        """Return the digest of the ids of some rows of the role train."""
        ids = self.ids(("train",))
        return digest([ids[row] for row in rows.tolist()])

    def described(self, sample: Sample) -> dict[str, int | str]:
        """Return what run.json says of a sample: the number of its images, the digest of their ids, and its list."""
        rows = self[sample].rows
        assert rows is not None, "all images are not described"
        entry: dict[str, int | str] = {"images": len(rows), "ids_sha256": self.digest(rows)}
        return entry | ({"list": self.subsets[sample.subset]} if sample.subset else {})

    def places_held_out(self, sample: Sample) -> Tensor:
        """Return which images of a sample without its fold that fold holds out, int64 [n], on the device of training."""
        rows, held_out = self[replace(sample, fold=None)].rows, self[sample].held_out
        assert held_out is not None, "this sample holds no fold out"
        return torch.from_numpy(held_out if rows is None else np.searchsorted(rows, held_out)).to(self.device)

    def held_out_labels(self, sample: Sample) -> Tensor:
        """Return the labels of the fold that a sample holds out, on the CPU."""
        held_out = self[sample].held_out
        assert held_out is not None, "this sample holds no fold out"
        return self._of("train")[torch.from_numpy(held_out)]

    def _of(self, *roles: str) -> Tensor:
        """Return the labels of all images of some roles, on the CPU."""
        if roles not in self._labels:
            self._labels[roles] = load_labels(self.store, [split for role in roles for split in self.splits[role]])
        return self._labels[roles]

    def _made(self, sample: Sample) -> TrainingSet:
        roles = tuple(sample.refit.split("+")) if sample.refit else ("train",)
        splits = tuple(split for role in roles for split in self.splits[role])
        labels, held_out = self._of(*roles), None
        rows = self._partial(replace(sample, fold=None, refit=None))
        if sample.fold:
            fold, folds = map(int, sample.fold.split("/"))
            numbers = np.arange(len(labels)) if rows is None else rows
            whole = replace(sample, fold=None)
            if (whole, folds) not in self._dealt:
                known = labels.numpy()[numbers]
                self._dealt[whole, folds] = fold_numbers(known, self.store.classes, folds, sample.draw)
            dealt = self._dealt[whole, folds]
            rows, held_out = numbers[dealt != fold - 1], numbers[dealt == fold - 1]
        if rows is not None:
            labels = labels[torch.from_numpy(rows)]
        return TrainingSet(splits, rows, labels.to(self.device), held_out)

    def _partial(self, sample: Sample) -> np.ndarray | None:
        """Return the rows of a sample without folds, None for all."""
        if sample not in self._rows:
            self._rows[sample] = self._drawn(sample)
        return self._rows[sample]

    def _drawn(self, sample: Sample) -> np.ndarray | None:
        if sample.drawn:
            labels = self._of("train").numpy()
            return draw_rows(labels, self.store.classes, sample.label_fraction, sample.shots, sample.draw)
        if sample.subset is None:
            return None
        if sample.subset not in self.subsets:
            raise BadInput(f"the list of the images of subset {sample.subset} is not known; choose another --run")
        path = self.subsets[sample.subset]
        if self.listed(path) != sample.subset:
            raise BadInput(f"{path} lists other images than when it was trained on; choose another --run")
        return self._rows[sample]
