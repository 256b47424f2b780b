"""Exact full-batch training of linear probes: L2-regularised convex losses, solved to a certified distance.

Eigenbasis   the images, prepared once for any number of problems
Columns      one-vs-rest problems for classes, folds and decays, and what they minimise
solve        solves Columns, and returns Solutions
fit_convex   solves the problems of a grid's probes, of any loss
"""

from featcache.probes.solvers.convex.basis import Eigenbasis
from featcache.probes.solvers.convex.columns import Columns, Solutions, solve
from featcache.probes.solvers.convex.fits import Problem, fit_convex

__all__ = ["Columns", "Eigenbasis", "Problem", "Solutions", "fit_convex", "solve"]
