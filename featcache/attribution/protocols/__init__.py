"""Protocols, each in a file of its own. Other packages add theirs by the entry points of PROTOCOLS."""

from featcache.attribution.protocols.boxes import Boxes
from featcache.attribution.protocols.faithfulness import Faithfulness
from featcache.attribution.protocols.gridpg import GridPG
from featcache.attribution.protocols.masks import Masks
from featcache.attribution.protocols.protocol import Protocol
from featcache.kinds import Registry

PROTOCOLS: Registry[Protocol] = Registry(
    Protocol, "featcache.attribution_protocols", "protocol", [Boxes, Masks, GridPG, Faithfulness]
)
DEFAULT_PROTOCOL = Boxes.word()
