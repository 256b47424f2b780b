"""Scores of maps, each in a file of its own. Other packages add theirs by the entry points of SCORES."""

from featcache.attribution.scores.box_iou import BoxIoU
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.deletion import Deletion
from featcache.attribution.scores.epg import EPG
from featcache.attribution.scores.insertion import Insertion
from featcache.attribution.scores.mask_iou import MaskIoU
from featcache.attribution.scores.pointing_game import PointingGame
from featcache.attribution.scores.score import Score
from featcache.kinds import Registry

SCORES: Registry[Score] = Registry(
    Score,
    "featcache.localisation_scores",
    "score",
    [EPG, PointingGame, BoxIoU, MaskIoU, Compactness, Complexity, Insertion, Deletion],
)
