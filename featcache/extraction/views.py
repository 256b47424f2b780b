"""Which augmented views an extraction makes beside the images as they are."""

from dataclasses import asdict, dataclass, replace

from featcache.datasets.augmentation import Augmentation
from featcache.errors import BadInput
from featcache.store.manifest import view_group
from featcache.store.records import view_arrays


@dataclass(frozen=True)
class Views:
    """count: views of every image of the splits `splits`, drawn with `augmentation` from `seed`."""

    count: int
    seed: int
    splits: tuple[str, ...]
    augmentation: Augmentation

    def describe(self):
        """What the views add to a store's identity: nothing where there are none."""
        if not self.count:
            return {}
        drawn = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.augmentation).items()}
        return {"views": {"count": self.count, "seed": self.seed, "splits": list(self.splits), **drawn}}

    def groups(self):
        """Return {group of the store: (its split, number of the view)}; the splits themselves are not in it."""
        return {view_group(split, n): (split, n) for split in self.splits for n in range(1, self.count + 1)}

    def arrays(self, arrays):
        """The small arrays of all groups, from those of the splits."""
        drawn = {
            group: view_arrays(arrays[split], self.augmentation.draw(arrays[split]["sizes"], self.seed, view))
            for group, (split, view) in self.groups().items()
        }
        return arrays | drawn


def plan_views(data, count, seed, crop_scale=None):
    """Return the Views of a dataset's training splits. crop_scale: (lowest, highest), by default the protocol's.

    Raises BadInput if there is nothing to augment, or a value is out of range.
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
    augmentation = data.augmentation if crop_scale is None else replace(data.augmentation, scale=tuple(crop_scale))
    return Views(count, seed, data.training, augmentation)
