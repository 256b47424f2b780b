"""Heads: what a probe puts on the features. One kind in one file."""

from featcache.kinds import Registry
from featcache.probes.heads.attentive import Attentive
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.efficient import Efficient
from featcache.probes.heads.head import Head
from featcache.probes.heads.knn import Knn
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp

HEADS = Registry(Head, "featcache.heads", "head", [Linear, BnLinear, Mlp, Bcos, Attentive, Efficient, Knn])
