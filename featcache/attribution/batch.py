"""What attribution methods are given: pairs of an image and a class, and what their maps are computed from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import torch

from featcache.attribution.targets import Target
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.errors import BadInput
from featcache.extraction.images import DECODERS, load_input
from featcache.feature import Feature
from featcache.store.manifest import difference
from featcache.store.reader import Split

# Images that are explained at a time.
BATCH = 16


@dataclass(frozen=True, eq=False)
class Network:
    """A backbone and the images that it made a split of. picture: from a row of the split to uint8 [3, S, S]."""

    backbone: Backbone
    picture: Callable[[int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """What maps are computed from: a split of a store, and the network where it was named."""

    split: Split
    preprocessing: Preprocessing
    device: torch.device
    network: Network | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs of an image and a class to explain, and what is known of these images.

    targets: the T pairs, in order of their images.
    """

    targets: Sequence[Target]
    source: Source

    @cached_property
    def rows(self) -> list[int]:
        """The B images, each once, as rows of the split."""
        return list(dict.fromkeys(target.row for target in self.targets))

    @cached_property
    def images(self) -> torch.Tensor:
        """int64 [T]: which of the B images a pair is of."""
        number = {row: n for n, row in enumerate(self.rows)}
        return torch.tensor([number[target.row] for target in self.targets], device=self.source.device)

    @cached_property
    def classes(self) -> torch.Tensor:
        """int64 [T]: the class of each pair."""
        return torch.tensor([target.label for target in self.targets], device=self.source.device)

    @cached_property
    def masks(self) -> torch.Tensor:
        """bool [T, S, S]: the pixels of the boxes of each pair's class, on the CPU."""
        return torch.stack([target.mask for target in self.targets])

    @property
    def size(self) -> int:
        """Side of the backbone's input, and so of a map, in pixels."""
        return self.source.preprocessing.size

    def cached(self, feature: Feature) -> torch.Tensor:
        """Read the images' maps from the store: float32 [B, D, h, w]. Raises BadInput if the store is damaged."""
        rows = self.source.split[str(feature)].take(self.rows, check=True)
        return torch.from_numpy(rows).float().to(self.source.device)

    @cached_property
    def inputs(self) -> torch.Tensor:
        """float32 [B, 3, S, S], or six channels for B-cos networks: the images as the backbone takes them."""
        pictures = torch.stack([self._network.picture(row) for row in self.rows])
        return self.source.preprocessing.normalise(pictures.to(self.source.device))

    @property
    def backbone(self) -> Backbone:
        """The backbone, on the device of the maps."""
        return self._network.backbone

    @property
    def _network(self) -> Network:
        if self.source.network is None:
            raise BadInput("no backbone was named: a method that runs it has to say runs_backbone")
        return self.source.network


def in_batches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield targets, which are in order of their rows, by BATCH images."""
    rows = sorted({target.row for target in targets})
    for start in range(0, len(rows), BATCH):
        chosen = set(rows[start : start + BATCH])
        yield [target for target in targets if target.row in chosen]


def open_network(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    backbone: str | PathLike,
    arch: str | None,
    weights_key: str | None,
    dataset: str | None,
    root: str | PathLike | None,
    seed: int,
) -> Network:
    """Load the backbone and the images of a split, and prepare images as the store says.

    Arguments from `backbone` on as attribute's. Raises BadInput unless both are those that the store was made of.
    """
    if dataset is None:
        raise BadInput("--backbone needs --dataset and --root too, for the images")
    store = split.store
    identity = store.manifest.identity
    model = load_backbone(backbone, arch=arch, seed=seed, weights_key=weights_key, size=preprocessing.size)
    data = read_dataset(dataset, root, [split.name])
    named = f"dataset {split.name}"
    given = {"arch": model.arch, "weights_sha256": model.weights_sha256, named: data.fingerprint(split.name)}
    stored = {key: identity[key] for key in ("arch", "weights_sha256")}
    stored[named] = identity["dataset"]["splits"].get(split.name)
    fields = difference(stored, given)
    if fields:
        raise BadInput(f"store {store.path} was made of something else: {'; '.join(fields)}")
    model.preprocessing = preprocessing
    decoder = identity.get("decoder", DECODERS["exact"])
    records = data.splits[split.name]
    return Network(model.to(device), lambda row: load_input(records[row], preprocessing, decoder))
