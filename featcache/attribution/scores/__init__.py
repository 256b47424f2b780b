"""Localisation scores, each in a file of its own. Other packages add theirs by the entry points of LOCALISATION_SCORES."""

from featcache.attribution.scores.box_iou import BoxIoU
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.epg import EPG
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.attribution.scores.pointing_game import PointingGame
from featcache.kinds import Registry

LOCALISATION_SCORES: Registry[LocalisationScore] = Registry(
    LocalisationScore,
    "featcache.localisation_scores",
    "localisation score",
    [EPG, PointingGame, BoxIoU, Compactness, Complexity],
)
DEFAULT_SCORES = (EPG.word(),)
