"""The features of masked images that `featcache extract --masks` wrote, as heads read them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from featcache.attribution.reading import Reading
from featcache.errors import BadInput
from featcache.extraction.masks.masking import Masking
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule
from featcache.store.manifest import remedy
from featcache.store.reader import Split

# Bytes of a number, and how often those of a product are held: logits, and what becomes of them.
FLOAT, COPIES = 4, 3
# Bytes of a block of heads at most. In larger ones, mapping the memory costs more than reading the features less often gains.
BLOCK = 2e8


@dataclass(frozen=True, eq=False)
class MaskedFeatures:
    """A split of a store of masked images. rows: from a row of the split that is explained to a row of this one."""

    split: Split
    rows: Mapping[int, int]
    device: torch.device

    def serves(self, head: HeadModule, reading: Reading) -> bool:
        """Return whether a head finds here what it reads."""
        return self._name(head, reading) is not None

    def blocks(
        self, heads: Sequence[HeadModule], reading: Reading, variants: int, pixels: int, memory: float
    ) -> Iterator["Block"]:
        """Yield heads in blocks whose maps and products fit into BLOCK and half of `memory` bytes. pixels: of all maps of a head.

        Heads of a block read the same feature; they are in order.
        """
        classes, at = len(self.split.store.classes), 0
        while at < len(heads):
            name = self._name(heads[at], reading)
            assert name is not None, "these heads are served"
            width = self.split[name].shape[2]
            most = max(1, int(min(memory / 2, BLOCK) / FLOAT / (pixels + classes * (COPIES * variants + width))))
            end = at + 1
            while end < min(len(heads), at + most) and self._name(heads[end], reading) == name:
                end += 1
            yield Block(self, name, heads[at:end], variants)
            at = end

    def note(self, row: int, masking: Masking) -> torch.Tensor | None:
        """Read what a masking noted of an image, [1, S, S]."""
        if masking.noted is None:
            return None
        return torch.from_numpy(self.split[str(masking.noted)].take([self.rows[row]], check=True))[0].float()

    def read(self, name: str, row: int, variants: int) -> torch.Tensor:
        """Read the features of an image's variants: float32 [N, D] or [N, D, h, w]. Raises BadInput for damage."""
        rows = self.split[name].take([self.rows[row]], check=True)[0, :variants]
        return torch.from_numpy(rows).to(self.device).float()

    def damaged(self, row: int, reason: object) -> BadInput:
        """Return the error about an image whose note is not one."""
        folder = self.split.store.folder
        return BadInput(f"store {folder}, image {self.split.ids[self.rows[row]]}: {reason}; {remedy(folder)}")

    def _name(self, head: HeadModule, reading: Reading) -> str | None:
        """Return the name of the feature that a head reads here; None if there is none, or it reads several.

        Of a map, heads that average it first need the mean alone.
        """
        if len(reading.features) > 1:
            return None
        layer, kind = reading.features[0].layer, reading.features[0].kind
        if kind not in ("spatial", "cls"):
            return None
        kinds = ("pooled", "patch_mean", "spatial") if reading.is_map and head.head.pools_first else (kind,)
        names = (str(Feature(layer, kind)) for kind in kinds)
        return next((name for name in names if name in self.split.store.manifest.features), None)


class Block:
    """Heads that read one feature of masked images. Those that are affine do so in one product."""

    def __init__(self, store: MaskedFeatures, name: str, heads: Sequence[HeadModule], variants: int) -> None:
        self._store, self._name, self._heads, self._variants = store, name, heads, variants
        width = store.split[name].shape[2]
        # By link, which of the heads are affine, with their weights [P, C, D] and biases [P, C].
        self._affine: dict[str, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
        for link in ("softmax", "sigmoid"):
            own = [n for n, head in enumerate(heads) if head.head.commutes and head.link == link]
            if own:
                blank = torch.zeros(1, width, 1, 1, device=store.device)
                biases = torch.stack([heads[n](blank)[0] for n in own])
                self._affine[link] = own, torch.stack([heads[n].slopes(width) for n in own]), biases

    def __len__(self) -> int:
        return len(self._heads)

    def probabilities(self, row: int, classes: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of K classes for all variants of an image: float32 [heads, K, N]."""
        features = self._store.read(self._name, row, self._variants)
        maps = features if features.ndim == 4 else features[:, :, None, None]
        means = features.mean((2, 3)) if features.ndim == 4 else features
        scores = features.new_empty(len(self), len(classes), len(features))
        rest = set(range(len(self)))
        for link, (own, weights, biases) in self._affine.items():
            if link == "sigmoid":
                weights, biases = weights[:, classes], biases[:, classes]
            logits = torch.addmm(biases.view(-1, 1), weights.flatten(0, 1), means.t())
            logits = logits.unflatten(0, biases.shape)  # [P, K or C, N]
            scores[own] = logits.sigmoid_() if link == "sigmoid" else logits.softmax(1)[:, classes]
            rest -= set(own)
        for number in rest:
            scores[number] = self._heads[number].probabilities(maps)[:, classes].t()
        return scores
