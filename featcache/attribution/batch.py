"""What attribution methods are given: pairs of an image and a class, and what their maps are computed from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.attribution.forward import PLAIN, Forward, Rule, bytes_kept
from featcache.attribution.masked_features import MaskedFeatures
from featcache.attribution.passes import Passes
from featcache.attribution.reading import Reading, read_images
from featcache.attribution.targets import Target
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import RANDOM, draw_like, load_backbone
from featcache.datasets import Record, read_dataset
from featcache.errors import BadInput
from featcache.extraction.images import DECODERS, read_input
from featcache.extraction.masks.masking import Masking
from featcache.probes.heads.module import HeadModule
from featcache.store.manifest import difference
from featcache.store.reader import Split, Store

# Bytes that a forward pass keeps, as a share of what is taken in all: gradients and copies come on top.
KEPT = 2 / 3
# Bytes of a head's maps where no backbone runs, so that many images need not be together: the system then hands out the
# same memory for one head after another.
FEW = 8e6


@dataclass(frozen=True, eq=False)
class Network:
    """A backbone and the images that it made a split of.

    picture: from a row of the split to uint8 [3, S, S]. prepared: the same for another Preprocessing, where there is
    a file behind each row. at_size: loads the backbone for images of another side.
    """

    backbone: Backbone
    picture: Callable[[int], torch.Tensor]
    prepared: Callable[[Preprocessing], Callable[[int], torch.Tensor]] | None = None
    at_size: Callable[[int], Backbone] | None = None

    def backbone_for(self, size: int) -> Backbone:
        """Return the backbone for images of a side: loaded anew if it has positions to fit. Raises BadInput if they cannot."""
        fits = self.backbone.architecture.fit is None or size == self.backbone.preprocessing.size
        return self.backbone if fits or self.at_size is None else self.at_size(size)


class Boxed(NamedTuple):
    """The boxes of an image in pixels of its maps, float [M, 4]; their classes, int [M]; which are difficult, bool [M]."""

    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True, eq=False)
class Source:
    """What maps are computed from: a split of a store, and the network where it was named.

    features: what the explained probes read. memory: bytes that may be taken for forward passes. passes: counts what
    goes through the backbone. records: the split as its data set has it, where that was named. stored: whether the store
    has the features of these images. note: stands behind the split in tables. masked: the features of masked variants of
    the images, where a store has them.
    """

    split: Split
    preprocessing: Preprocessing
    device: torch.device
    network: Network | None
    features: tuple[Reading, ...]
    memory: float
    passes: Passes = field(default_factory=Passes)
    records: Sequence[Record] | None = None
    stored: bool = True
    note: str = ""
    masked: Mapping[Masking, MaskedFeatures] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, int]:
        """What is to be known of how the images were chosen, besides the words of the protocol."""
        return {}

    @property
    def name(self) -> str:
        """What the images are called in tables."""
        return f"{self.split.name}, {self.note}" if self.note else self.split.name

    def id_of(self, row: int) -> str:
        """Return the id of an image."""
        return self.split.ids[row]

    def boxes_of(self, row: int) -> Boxed:
        """Return the boxes of an image that lie in what the backbone sees of it."""
        boxes, classes, difficult = self.split.boxes[row]
        boxes, inside = self.preprocessing.map_boxes(boxes, *self.split.sizes[row].tolist())
        return Boxed(boxes[inside], classes[inside], difficult[inside])

    def picture(self, row: int) -> torch.Tensor | None:
        """Return an image as the backbone sees it, uint8 [3, S, S], or None where the data set was not named."""
        if self.network is not None:
            return self.network.picture(row)
        if self.records is None:
            return None
        return _pictures(self.split, self.records, self.preprocessing)(row)

    @property
    def backbone(self) -> Backbone:
        """The backbone, on the device of the maps."""
        return self._network.backbone

    def blank(self) -> torch.Tensor:
        """Return a black image as the backbone takes it: [1, C, S, S]."""
        size = self.preprocessing.size
        return self.preprocessing.normalise(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device))

    def inputs(self, rows: Sequence[int]) -> torch.Tensor:
        """Read images as the backbone takes them: float32 [B, 3, S, S], or six channels for B-cos networks."""
        pictures = torch.stack([self._network.picture(row) for row in rows])
        return self.preprocessing.normalise(pictures.to(self.device))

    def channels(self, feature: Reading) -> int:
        """Return how many channels the map that a head reads has."""
        return feature.width(self.split.store)

    @cached_property
    def at_once(self) -> int:
        """How many images go through the backbone at a time, with what backward passes need, by `memory`."""
        return max(1, int(KEPT * self.memory / bytes_kept(self.backbone, self.features, self.blank())))

    @property
    def _network(self) -> Network:
        if self.network is None:
            raise BadInput("no backbone was named: a method that runs it has to say runs_backbone")
        return self.network


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs of an image and a class to explain, and what is known of these images.

    targets: the T pairs, in order of their images. Where the backbone runs, all images have equally many.
    """

    targets: Sequence[Target]
    source: Source
    _forwards: dict[Rule, Forward] = field(default_factory=dict)
    _cached: dict[Reading, torch.Tensor] = field(default_factory=dict)

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
    def pairs_of(self) -> list[slice]:
        """The pairs of each of the B images."""
        ends = self.images.bincount().cumsum(0).tolist()
        return [slice(first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True)]

    @cached_property
    def classes(self) -> torch.Tensor:
        """int64 [T]: the class of each pair."""
        return torch.tensor([target.label for target in self.targets], device=self.source.device)

    @property
    def by_image(self) -> torch.Tensor:
        """int64 [B, K]: the K classes of each image. Raises ValueError if images have different numbers of them."""
        counts = self.images.bincount()
        if (counts != counts[0]).any():
            raise ValueError("the images of this batch have different numbers of classes to explain")
        return self.classes.view(len(self.rows), -1)

    @cached_property
    def masks(self) -> torch.Tensor:
        """bool [T, S, S]: the pixels of the objects of each pair's class, on the CPU; none where they are not known."""
        none = torch.zeros(self.size, self.size, dtype=torch.bool)
        return torch.stack([none if (mask := target.mask) is None else mask for target in self.targets])

    @cached_property
    def void(self) -> torch.Tensor | None:
        """bool [T, S, S]: the pixels that do not count, on the CPU. None where all of every pair do."""
        given = [target.void for target in self.targets]
        if all(void is None for void in given):
            return None
        none = torch.zeros(self.size, self.size, dtype=torch.bool)
        return torch.stack([none if void is None else void for void in given])

    @cached_property
    def pictured(self) -> list[int]:
        """The numbers of the pairs whose maps are kept for pictures."""
        return [number for number, target in enumerate(self.targets) if target.pictured]

    @property
    def size(self) -> int:
        """Side of the backbone's input, and so of a map, in pixels."""
        return self.source.preprocessing.size

    def cached(self, feature: Reading) -> torch.Tensor:
        """Read what heads read of the images from the store, once: float32 [B, D, h, w].

        What is in no store is computed, once for all heads. Raises BadInput if the store is damaged.
        """
        if feature not in self._cached and not self.source.stored:
            with torch.no_grad():
                self._cached.update(read_images(self.backbone, self.inputs, self.source.features))
            self.source.passes.forward += len(self.inputs)
        elif feature not in self._cached:
            arrays = {str(each): self.source.split[str(each)] for each in feature.features}
            rows = {name: torch.from_numpy(array.take(self.rows, check=True)) for name, array in arrays.items()}
            self._cached[feature] = feature.join(rows).float().to(self.source.device)
        return self._cached[feature]

    def at_hand(self, reading: Reading) -> torch.Tensor | None:
        """Return what heads read of the images, [B, D, h, w], if that takes no pass through the backbone, else None."""
        if reading not in self._cached:
            for forward in self._forwards.values():
                return forward.maps[reading].detach()
            held = self.source.split.store.manifest.features
            if not self.source.stored or any(str(feature) not in held for feature in reading.features):
                return None
        return self.cached(reading)

    @cached_property
    def inputs(self) -> torch.Tensor:
        """float32 [B, 3, S, S], or six channels for B-cos networks: the images as the backbone takes them."""
        return self.source.inputs(self.rows)

    @property
    def backbone(self) -> Backbone:
        """The backbone, on the device of the maps."""
        return self.source.backbone

    def blocks(self, heads: Sequence[HeadModule], maps: int | None = None) -> Iterator[Sequence[HeadModule]]:
        """Yield heads, in order, in blocks whose maps take half of the memory at most; a block has at least one head.

        maps: how many float32 [S, S] are held for each head, by default one for each pair of the batch.
        """
        each = 4 * self.size**2 * (maps or len(self.targets))
        most = max(1, int(self.source.memory / 2 / each))
        for first in range(0, len(heads), most):
            yield heads[first : first + most]

    def release(self) -> None:
        """Let go of the forward pass that is held, before one that needs the memory."""
        self._forwards.clear()

    def forward(self, rule: Rule = PLAIN) -> Forward:
        """Run the images through the backbone, once for everybody who asks for the same rule one after another."""
        if rule not in self._forwards:
            self.release()
            self._forwards[rule] = Forward(self.backbone, self.source.features, self.inputs, self.source.passes, rule)
        return self._forwards[rule]


def batches_of(targets: Sequence[Target], source: Source, probes: int) -> Iterator[Batch]:
    """Yield the targets, which are in order of their images, as Batches that fit into memory.

    Where the backbone runs, the images of a batch have equally many targets: then every backward pass explains one of
    each image, and none is in vain. probes: how many are explained.
    """
    rows: dict[int, list[Target]] = {}
    for target in targets:
        rows.setdefault(target.row, []).append(target)
    pixels = 4 * source.preprocessing.size**2
    if source.network is None:
        most = int(min(source.memory / 2, FEW) / pixels)
        yield from (Batch(own, source) for own in _filled(list(rows.values()), most))
        return
    alike: dict[int, list[list[Target]]] = {}
    for own in rows.values():
        alike.setdefault(len(own), []).append(own)
    for count, images in sorted(alike.items()):
        at_once = max(1, min(source.at_once, int(source.memory / 2 / (probes * count * pixels))))
        for start in range(0, len(images), at_once):
            yield Batch([target for own in images[start : start + at_once] for target in own], source)


def _filled(images: Sequence[Sequence[Target]], most: int) -> Iterator[list[Target]]:
    """Yield the targets of images together, at most `most` or those of one image."""
    together: list[Target] = []
    for own in images:
        if together and len(together) + len(own) > most:
            yield together
            together = []
        together += own
    yield together


def open_records(split: Split, dataset: str, root: str | PathLike | None) -> Sequence[Record]:
    """Read the data set that a split of a store was made of. Raises BadInput if it is another one now."""
    store, named = split.store, f"dataset {split.name}"
    data = read_dataset(dataset, root, [split.name])
    stored = {named: store.manifest.identity["dataset"]["splits"].get(split.name)}
    _check_made_of(store, stored, {named: data.fingerprint(split.name)})
    return data.splits[split.name]


def open_network(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    records: Sequence[Record],
    backbone: str | PathLike,
    arch: str | None,
    weights_key: str | None,
    seed: int,
) -> Network:
    """Load the backbone that a split's features were made by, to prepare images as the store says.

    records: the split's images. Other arguments as attribute's. Raises BadInput for another backbone.
    """
    identity = split.store.manifest.identity

    def at_size(size: int) -> Backbone:
        return load_backbone(backbone, arch=arch, seed=seed, weights_key=weights_key, size=size).to(device)

    model = at_size(preprocessing.size)
    stored = {key: identity[key] for key in ("arch", "weights_sha256")}
    _check_made_of(split.store, stored, {"arch": model.arch, "weights_sha256": model.weights_sha256})
    return _network(model, at_size, split, preprocessing, records)


def open_random_network(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    records: Sequence[Record],
    seed: int,
    like: Backbone | None,
) -> Network:
    """Draw a backbone like the one that a split's features were made by, with other weights.

    like: that backbone, if it is at hand. Raises BadInput if it is not, and its architecture is known from the tensors of
    its checkpoint alone.
    """
    identity = split.store.manifest.identity

    def drawn(seed: int, size: int) -> Backbone:
        if like is not None:
            return draw_like(like, seed, size).to(device)
        try:
            return load_backbone(RANDOM, arch=identity["arch"], seed=seed, size=size).to(device)
        except BadInput as error:
            raise BadInput(
                f"--sanity draws a backbone like the store's: give --backbone too ({error.message})"
            ) from None

    model = drawn(seed, preprocessing.size)
    # The store's own backbone may be random, and of this seed.
    if model.weights_sha256 == identity["weights_sha256"]:
        seed += 1
        model = drawn(seed, preprocessing.size)
    return _network(model, partial(drawn, seed), split, preprocessing, records)


def _network(
    model: Backbone,
    at_size: Callable[[int], Backbone],
    split: Split,
    preprocessing: Preprocessing,
    records: Sequence[Record],
) -> Network:
    model.preprocessing = preprocessing
    prepared = partial(_pictures, split, records)
    return Network(model, prepared(preprocessing), prepared, at_size)


def _pictures(split: Split, records: Sequence[Record], preprocessing: Preprocessing) -> Callable[[int], torch.Tensor]:
    """Return a function from a row of the split to its image, uint8 [3, S, S]. It raises BadInput for a changed file.

    The fingerprint of a data set has the sizes of its files, and the store the digests of what is in them.
    """
    decoder, digests = split.store.manifest.identity.get("decoder", DECODERS["exact"]), split.digests

    def picture(row: int) -> torch.Tensor:
        pixels, digest = read_input(records[row], preprocessing, decoder, None)
        if digests is not None and digest != digests[row].tobytes():
            raise BadInput(
                f"image {records[row].image} is not the file that store {split.store.path} was made of: bring that back, or "
                "extract into a new store"
            )
        return pixels

    return picture


def _check_made_of(store: Store, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise BadInput unless a store was made of what is given."""
    fields = difference(stored, given)
    if fields:
        raise BadInput(f"store {store.path} was made of something else: {'; '.join(fields)}")
