"""The augmented views that an extraction makes of training images, besides the images as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from featcache.datasets.augmentation import Augmentation
from featcache.datasets.record import Dataset
from featcache.errors import BadInput, shown
from featcache.store.manifest import view_name
from featcache.store.records import view_arrays


@dataclass(frozen=True)
class Views:
    """`count` views of every image of `splits`, drawn with `augmentation` from `seed`."""

    count: int
    seed: int
    splits: tuple[str, ...]
    augmentation: Augmentation

    def describe(self) -> dict[str, Any]:
        """Return what the views add to a store's identity: nothing if there are none."""
        if not self.count:
            return {}
        drawn = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.augmentation).items()}
        return {"views": {"count": self.count, "seed": self.seed, "splits": list(self.splits), **drawn}}

    def names(self) -> dict[str, tuple[str, int]]:
        """Return {name of a view in the store: (its split, its number)}; the splits themselves are not in it."""
        return {view_name(split, n): (split, n) for split in self.splits for n in range(1, self.count + 1)}

    def arrays(self, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Mapping[str, np.ndarray]]:
        """Return the small arrays of the splits, as given, and those of all views."""
        drawn = {
            name: view_arrays(arrays[split], self.augmentation.draw(arrays[split]["sizes"], self.seed, view))
            for name, (split, view) in self.names().items()
        }
        return {**arrays, **drawn}


def plan_views(data: Dataset, count: int, seed: int, crop_scale: Sequence[float] | None = None) -> Views:
    """Return the Views of a dataset's training splits.

    crop_scale: lowest and highest share of the image in a crop, by default the protocol's. Raises BadInput if there is
    nothing to augment, or a value is out of range.
    """
    if count < 0:
        raise BadInput(f"{count} views: expected 0 or more")
    if crop_scale is not None and not count:
        raise BadInput("a crop scale is for views: say how many with --views")
    if any("@" in split for split in data.splits):
        raise BadInput(f"splits {', '.join(data.splits)}: the sign @ is kept for the names of views")
    if count and not data.training:
        raise BadInput(
            f"views are for training, and of the splits {', '.join(data.splits)} none is for that (their names begin "
            "with train)"
        )
    augmentation = data.augmentation
    if crop_scale is not None:
        try:
            lowest, highest = crop_scale
        except ValueError:
            raise BadInput(
                f"crop scale {shown(crop_scale)}: expected two numbers, the lowest and the highest"
            ) from None
        augmentation = replace(augmentation, scale=(lowest, highest))
    return Views(count, seed, data.training, augmentation)
