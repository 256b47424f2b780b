"""Localisation scores, each in a file of its own. Other packages add theirs by the entry points of LOCALISATION_SCORES."""

from featcache.attribution.scores.epg import EPG
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.kinds import Registry

LOCALISATION_SCORES: Registry[LocalisationScore] = Registry(
    LocalisationScore, "featcache.localisation_scores", "localisation score", [EPG]
)
DEFAULT_SCORES = (EPG.word(),)
