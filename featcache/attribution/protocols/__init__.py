"""Protocols, each in a file of its own. Other packages add theirs by the entry points of PROTOCOLS."""

import numpy as np

from featcache.attribution.protocols.boxes import Boxes
from featcache.attribution.protocols.faithfulness import Faithfulness
from featcache.attribution.protocols.gridpg import GridPG
from featcache.attribution.protocols.masks import Masks
from featcache.attribution.protocols.protocol import Protocol
from featcache.errors import BadInput
from featcache.kinds import Registry
from featcache.progress import say
from featcache.ranks import first_to_say
from featcache.store.reader import Split
from featcache.words import written

PROTOCOLS: Registry[Protocol] = Registry(
    Protocol, "featcache.attribution_protocols", "protocol", [Boxes, Masks, GridPG, Faithfulness]
)


def default_protocol(split: Split, runs_backbone: bool) -> Protocol:
    """Return the protocol that a split can be explained by: boxes where it has any, else grids if it is single-label.

    Grids are 2 x 2 where there are fewer than nine classes. A line says so. Raises BadInput where grids need the
    backbone, and it was not named.
    """
    if split.labels.ndim != 1 or any(not difficult.all() for _, _, difficult in split.boxes):
        return Boxes()
    what = f"split {split.name} of store {split.store.path} has no boxes, so grids of its images are explained"
    if not runs_backbone:
        raise BadInput(f"{what} (--protocol gridpg), which runs the backbone: give --backbone, --dataset and --root")
    chosen = GridPG() if len(np.unique(split.labels)) >= 9 else GridPG(side=2)
    if first_to_say(what):
        say(f"{what}: --protocol {written(chosen)}")
    return chosen
