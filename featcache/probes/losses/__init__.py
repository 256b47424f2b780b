"""Losses: what a probe minimises. One kind in one file."""

from featcache.kinds import Registry
from featcache.probes.losses.asymmetric import Asymmetric
from featcache.probes.losses.bce import Bce
from featcache.probes.losses.ce import Ce
from featcache.probes.losses.focal import Focal
from featcache.probes.losses.loss import Loss
from featcache.probes.losses.squared_hinge import SquaredHinge

LOSSES = Registry(Loss, "featcache.losses", "loss", [Bce, Ce, Focal, Asymmetric, SquaredHinge])
