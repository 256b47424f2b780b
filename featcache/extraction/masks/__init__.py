"""Ways to mask images, each in a file of its own. Other packages add theirs by the entry points of MASKS."""

from featcache.extraction.masks.coalitions import Coalitions
from featcache.extraction.masks.masking import Masking
from featcache.extraction.masks.random_cells import RandomCells
from featcache.extraction.masks.superpixels import RandomSuperpixels
from featcache.extraction.masks.windows import Windows
from featcache.kinds import Registry
from featcache.words import parse_kind

MASKS: Registry[Masking] = Registry(
    Masking, "featcache.masks", "masks", [RandomCells, RandomSuperpixels, Coalitions, Windows]
)


def parse_masks(text: str) -> Masking:
    """Read what --masks says: a kind, how many, and fields, as in rise:2000:cells=7. Raises BadInput.

    parse_masks("rise:500") == RandomCells(masks=500)
    """
    name, *settings = text.split(":")
    kind = MASKS.named(name, "--masks")
    if kind.counted and settings and "=" not in settings[0]:
        settings[0] = f"{kind.counted}={settings[0]}"
    return parse_kind(MASKS, ":".join([name, *settings]), "--masks")
