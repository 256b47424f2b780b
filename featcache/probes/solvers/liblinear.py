"""Support vector machines by liblinear, class by class: the reference that the stacked solver is compared with."""

import itertools
import warnings

import numpy as np
import torch
from torch import Tensor

from featcache.errors import BadInput

# What OpenMixup, MMSelfSup and VISSL give LinearSVC, but for the seed, which they do not set.
TOLERANCE, SEED = 1e-4, 0


class Liblinear:
    """scikit-learn's LinearSVC, on one training set. See Machines.

    features: float64 [N, D]. bias: whether there is one; it is penalised like a weight. tolerance: liblinear's.
    """

    def __init__(self, features: Tensor, bias: bool, tolerance: float = TOLERANCE):
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.svm import LinearSVC
        except ImportError:
            raise BadInput(
                "optimizer svm with engine liblinear needs scikit-learn: pip install 'featcache[svm]'"
            ) from None
        self._machine, self._warning = LinearSVC, ConvergenceWarning
        self.features, self.bias, self.tolerance = features, bias, tolerance
        self._rows = features.cpu().numpy()

    def solve(
        self, signs: Tensor, costs: Tensor, parts: Tensor, positive_weight: float, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """See Machines.solve."""
        problems = signs.unsqueeze(1).mul(parts).cpu().numpy()  # [C, F, N]
        weights, finished = [], []
        for columns, own in zip(problems, costs.tolist(), strict=True):
            for column, cost in itertools.product(columns, own):
                used = column != 0
                machine = self._machine(
                    C=cost, class_weight={1: positive_weight, -1: 1.0}, loss="squared_hinge", dual=True,
                    tol=self.tolerance, max_iter=iterations, fit_intercept=self.bias, random_state=SEED,
                )  # fmt: skip
                with warnings.catch_warnings():
                    # Whether it has converged is in the result.
                    warnings.simplefilter("ignore", self._warning)
                    machine.fit(self._rows[used], column[used])
                weights.append(np.append(machine.coef_[0], machine.intercept_ if self.bias else []))
                finished.append(machine.n_iter_ < iterations)
        shape = (*problems.shape[:2], costs.shape[1])
        return torch.from_numpy(np.stack(weights)).to(self.features).unflatten(0, shape), torch.tensor(finished).view(
            shape
        )
