"""Solvers: what changes a probe's weights so that its loss falls. One kind in one file."""

from featcache.kinds import Registry
from featcache.probes.solvers.adam import Adam
from featcache.probes.solvers.adamw import AdamW
from featcache.probes.solvers.lamb import Lamb
from featcache.probes.solvers.lars import Lars
from featcache.probes.solvers.lbfgs import Lbfgs
from featcache.probes.solvers.none import NoTraining
from featcache.probes.solvers.sgd import Sgd
from featcache.probes.solvers.solver import Solver
from featcache.probes.solvers.svm import Svm

SOLVERS = Registry(Solver, "featcache.solvers", "optimizer", [Sgd, Adam, AdamW, Lars, Lamb, Lbfgs, Svm, NoTraining])
