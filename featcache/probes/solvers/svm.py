"""Linear support vector machines, one for each class, with a cost of its own."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from featcache.errors import BadInput
from featcache.probes.heads.linear import Linear
from featcache.probes.losses.squared_hinge import SquaredHinge
from featcache.probes.part import CountOr0, Positive, Whole
from featcache.probes.solvers.liblinear import Liblinear
from featcache.probes.solvers.low_shot import digest_of_draw, draw_few
from featcache.probes.solvers.machines import Machines, cross_validated, excess
from featcache.probes.solvers.solver import Choice, Fit, FullBatchSolver

# Lists of costs that published code uses: VISSL's for VOC2007 as MMSelfSup and OpenMixup have it, and VISSL's default.
COSTS: dict[str, tuple[float, ...]] = {
    "voc07": (1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20))),
    "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
}
ENGINES: dict[str, Callable[[Tensor, bool], Machines]] = {"liblinear": Liblinear}
# LinearSVC's default, for a class with too few positives to hold some out.
PLAIN_COST = 1.0
# Roughly how often it goes over the images for a probe.
PASSES = 400
# Bytes for each image: features in float64, twice, and in float32; and the problems of each class.
FEATURE_BYTES, CLASS_BYTES = 20, 8 * 10


def _several(costs: tuple[float, ...]) -> tuple[float, ...]:
    if not costs or len(set(costs)) < len(costs):
        raise ValueError("is not a list of one or more costs, each once")
    return costs


class Svm(FullBatchSolver):
    """A linear support vector machine for each class, which chooses its cost by cross-validation.

    It minimises 1/2 |w|^2 + C sum max(0, 1 - y z)^2, where the bias is part of w, like LinearSVC. The folds are
    stratified and not shuffled; the cost with the highest mean average precision wins, of equal ones the first, and the
    machine is trained again on all images.
    """

    type: Literal["svm"] = "svm"
    costs: Annotated[tuple[Positive, ...], AfterValidator(_several)] | Literal["voc07", "vissl"] = Field(
        "voc07", description="C; of several each class gets the one with the best average precision in cross-validation"
    )
    folds: Annotated[int, Field(ge=2, le=100)] = Field(3, description="folds of the cross-validation")
    positives: CountOr0 = Field(
        0, description="positives that each class draws to train on, by the probe's seed; 0 trains on all images"
    )
    negatives: CountOr0 = Field(19, description="negatives that each class draws for each of its positives")
    engine: Literal["newton", "liblinear"] = Field(
        "newton", description="newton trains all machines together; liblinear is scikit-learn's, one after the other"
    )
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = Field(2000, description="most steps of a machine")

    per_probe: ClassVar[frozenset[str]] = frozenset({"costs", "positives", "negatives"})

    @property
    def cost_list(self) -> tuple[float, ...]:
        """The costs to choose from."""
        return COSTS[self.costs] if isinstance(self.costs, str) else self.costs

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if not isinstance(spec.head, Linear):
            return f"optimizer svm trains linear heads, not {spec.head.type}"
        if not isinstance(spec.loss, SquaredHinge):
            return f"optimizer svm minimises squared_hinge, not {spec.loss.type}"
        if spec.head.temperature != 1 or spec.head.offset != 0:
            return "optimizer svm trains heads without temperature and offset"
        if spec.views:
            return "optimizer svm trains on the images as they are: say views: 0"
        if spec.keep != "last" or spec.patience:
            return "optimizer svm has no epochs to choose from: leave out keep and patience"
        return None

    def unfit(self, spec: Whole, labels: Tensor, classes: Sequence[str]) -> str | None:
        """See FullBatchSolver.unfit: every class needs positives and negatives, in every fold or draw."""
        known = spec.loss.read(_matrix(labels, len(classes)))
        present, absent = (known == 1).sum(0).tolist(), (known == 0).sum(0).tolist()
        if self.positives:
            # Labels of -1 are never drawn, whatever the loss makes of them.
            absent = (_matrix(labels, len(classes)) == 0).sum(0).tolist()
            present_needed, absent_needed = self.positives, self.positives * self.negatives
            why = f"optimizer.positives {self.positives} with {self.negatives} negatives each draws"
        else:
            present_needed = absent_needed = self.folds if len(self.cost_list) > 1 else 1
            why = f"{self.folds} folds need" if len(self.cost_list) > 1 else "training needs"
        for name, has, lacks in zip(classes, present, absent, strict=True):
            if has < present_needed:
                return f"{why} {present_needed} positives of every class, and {name!r} has {has} in training"
            if lacks < max(absent_needed, 1):
                return f"{why} {max(absent_needed, 1)} negatives of every class, and {name!r} has {lacks} in training"
        return None

    def fit(self, specs: Sequence[Whole], features: Tensor, labels: Tensor, classes: int) -> list[Fit]:
        """See FullBatchSolver.fit. Raises BadInput for features that are not finite, or all alike."""
        head = specs[0].head
        rows = head.normalised(features.double())
        if len(bad := (~torch.isfinite(rows).all(1)).nonzero()[:, 0]):
            raise BadInput(
                f"feature {specs[0].features}: training image {int(bad[0]) + 1} has values that are not finite"
            )
        if bool((rows == rows[:1]).all()):
            raise BadInput(f"feature {specs[0].features} is the same for all training images: nothing can be learned")
        machines = ENGINES[self.engine](rows, head.bias)
        return [_fit(spec, machines, labels, classes) for spec in specs]

    def passes(self) -> int:
        """See FullBatchSolver.passes."""
        return PASSES

    def image_bytes(self, width: int, classes: int) -> int:
        """See FullBatchSolver.image_bytes."""
        return FEATURE_BYTES * width + CLASS_BYTES * classes * len(self.cost_list)


def _fit(spec: Whole, machines: Machines, labels: Tensor, classes: int) -> Fit:
    """Choose costs and train the machines of one probe."""
    solver, draw = spec.optimizer, None
    if solver.positives:
        drawn = draw_few(_matrix(labels, classes).cpu().numpy(), solver.positives, solver.negatives, spec.seed or 0)
        draw, known = digest_of_draw(drawn), torch.from_numpy(drawn).to(labels.device)
    else:
        known = spec.loss.read(_matrix(labels, classes))
    signs = torch.where(known < 0, 0, 2 * known - 1).to(torch.int8).t().contiguous()  # [C, N]
    costs = torch.tensor(solver.cost_list, dtype=torch.float64, device=signs.device)
    weight, most = spec.loss.positive_weight, solver.iterations
    table, folds = torch.full((classes, len(costs)), torch.nan, dtype=torch.float64), [0] * classes
    if len(costs) > 1:
        table, folds = cross_validated(machines, signs, costs, solver.folds, weight, most)
    chosen = _chosen(table.numpy(), solver.cost_list)
    own = costs[chosen]
    weights, finished = machines.solve(signs, torch.arange(classes, device=signs.device), own, weight, most)
    bounds, losses = excess(machines, signs, own, weight, weights)
    count = float((signs != 0).sum())
    at_zero = float(torch.where(signs > 0, weight, (signs < 0).double()).sum()) / count
    dim = machines.features.shape[1]
    trained = {"fc0.weight": weights[:, :dim]} | ({"fc0.bias": weights[:, dim]} if machines.bias else {})
    choice = Choice(solver.cost_list, table.tolist(), chosen, folds, bounds.tolist(), draw)
    return Fit(
        {name: w.float().cpu() for name, w in trained.items()},
        [at_zero, float(losses.sum()) / count],
        bool(finished.all()),
        choice,
    )


def _chosen(table: np.ndarray, costs: Sequence[float]) -> list[int]:
    """Return the place of each class's cost: the best, of equal ones the first; without a table the nearest to 1."""
    plain = min(range(len(costs)), key=lambda k: abs(math.log(costs[k] / PLAIN_COST)))
    return [plain if np.isnan(row).any() else int(row.argmax()) for row in table]


def _matrix(labels: Tensor, classes: int) -> Tensor:
    """Return labels as int8 [N, C], those of single-label data as one-hot."""
    return labels if labels.ndim == 2 else F.one_hot(labels, classes).to(torch.int8)
