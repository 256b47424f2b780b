"""Linear support vector machines, one for each class, with a cost of its own."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from featcache.errors import BadInput
from featcache.probes.heads.linear import Linear
from featcache.probes.losses.squared_hinge import SquaredHinge
from featcache.probes.part import Count, CountOr0, Positive, Whole
from featcache.probes.solvers.liblinear import Liblinear
from featcache.probes.solvers.low_shot import digest_of_draw, draw_few
from featcache.probes.solvers.machines import Machines, cross_validated, excess
from featcache.probes.solvers.solver import Choice, Fit, FullBatchSolver, Optimality
from featcache.probes.solvers.stacked_machines import StackedMachines

# Lists of costs that published code uses: VISSL's for VOC2007 as MMSelfSup and OpenMixup have it, and VISSL's default.
COSTS: dict[str, tuple[float, ...]] = {
    "voc07": (1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20))),
    "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
}
ENGINES: dict[str, Callable[[Tensor, bool], Machines]] = {"newton": StackedMachines, "liblinear": Liblinear}
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
    negatives: Count = Field(19, description="negatives that each class draws for each of its positives")
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
        known = _matrix(labels, len(classes))
        if self.positives:
            # Labels of -1 are never drawn, whatever the loss makes of them.
            needed = (1, self.positives), (0, self.positives * self.negatives)
            why, remedy = f"{self.positives} shots are drawn", "draw fewer"
        else:
            known, least = spec.loss.read(known), self.folds if len(self.cost_list) > 1 else 1
            needed = (1, least), (0, least)
            why, remedy = f"each of {least} folds needs one" if least > 1 else "one is needed", "leave the class out"
            remedy = "take fewer folds, or a single cost" if least > 1 else remedy
        for value, least in needed:
            counts = (known == value).sum(0)
            if int(counts.min()) < least:
                what = f"{'positives' if value else 'negatives'} of class {classes[int(counts.argmin())]!r}"
                asked = f", with {self.negatives} negatives for each" if self.positives and not value else ""
                return f"{int(counts.min())} {what} in training, and {why}{asked}; {remedy}"
        return None

    def shortfall(self, steps: int, optimality: Optimality | None) -> str:
        """See Solver.shortfall."""
        return "has machines that had not converged; give it more optimizer.iterations, or smaller costs"

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
        shared = Trainer(ENGINES[self.engine], rows, head.bias)
        return [_fit(spec, shared, labels, classes) for spec in specs]

    def passes(self) -> int:
        """See FullBatchSolver.passes."""
        return PASSES

    def image_bytes(self, width: int, classes: int) -> int:
        """See FullBatchSolver.image_bytes."""
        return FEATURE_BYTES * width + CLASS_BYTES * classes * len(self.cost_list)


class Trainer:
    """Trains machines on some or all rows of features, float64 [N, D]. Those of all rows share what they prepare."""

    def __init__(self, engine: Callable[[Tensor, bool], Machines], features: Tensor, bias: bool):
        self.engine, self.features, self.bias = engine, features, bias

    @cached_property
    def _machines(self) -> Machines:
        return self.engine(self.features, self.bias)

    def train(self, signs: Tensor, solver: Svm, positive_weight: float) -> "_Trained":
        """Choose costs and train a machine for each class. signs: int8 [C, N], 0 for images that it does not have.

        Classes that draw a few images of their own are trained one by one, each on its images alone.
        """
        if not solver.positives:
            return _train(self._machines, signs, solver, positive_weight)
        parts = []
        for sign in signs:
            rows = sign.nonzero()[:, 0]
            parts.append(_train(self.engine(self.features[rows], self.bias), sign[None, rows], solver, positive_weight))
        return _Trained(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


class _Trained(NamedTuple):
    """Machines of C classes. ap: [C, P], of each cost. folds, chosen: int64 [C]. The others as from solve and excess."""

    ap: Tensor
    folds: Tensor
    chosen: Tensor
    weights: Tensor  # [C, D] or [C, D + 1]
    converged: Tensor
    excess: Tensor
    loss: Tensor


def _train(machines: Machines, signs: Tensor, solver: Svm, positive_weight: float) -> _Trained:
    """Choose a cost for each class by cross-validation, if there are several, and train its machine on all images."""
    costs = torch.tensor(solver.cost_list, dtype=torch.float64, device=signs.device)
    ap = torch.full((len(signs), len(costs)), torch.nan, dtype=torch.float64)
    # Each fold needs a positive and a negative.
    folds = min(solver.folds, int((signs > 0).sum(1).min()), int((signs < 0).sum(1).min())) if len(costs) > 1 else 0
    if folds > 1:
        ap = cross_validated(machines, signs, costs, folds, positive_weight, solver.iterations)
        chosen = torch.from_numpy(ap.numpy().argmax(1))
    else:
        folds = 0
        chosen = (costs / PLAIN_COST).log().abs().argmin().cpu().expand(len(signs))
    own = costs[chosen.to(costs.device)]
    everything = torch.ones_like(signs, dtype=torch.bool).unsqueeze(1)
    weights, converged = machines.solve(signs, own.unsqueeze(1), everything, positive_weight, solver.iterations)
    bounds, losses = excess(machines, signs, own, positive_weight, weights[:, 0, 0])
    return _Trained(ap, torch.full_like(chosen, folds), chosen, weights[:, 0, 0], converged[:, 0, 0], bounds, losses)


def _fit(spec: Whole, trainer: Trainer, labels: Tensor, classes: int) -> Fit:
    """Train the machines of one probe."""
    solver, draw, known = spec.optimizer, None, _matrix(labels, classes)
    if solver.positives:
        drawn = draw_few(known.cpu().numpy(), solver.positives, solver.negatives, spec.seed or 0)
        draw, known = digest_of_draw(drawn), torch.from_numpy(drawn).to(labels.device)
    else:
        known = spec.loss.read(known)
    signs = torch.where(known < 0, 0, 2 * known - 1).to(torch.int8).t().contiguous()  # [C, N]
    weight = spec.loss.positive_weight
    trained = trainer.train(signs, solver, weight)
    dim = trainer.features.shape[1]
    weights = {"fc0.weight": trained.weights[:, :dim]} | ({"fc0.bias": trained.weights[:, dim]} if trainer.bias else {})
    labelled = int((signs != 0).sum())
    at_zero = labelled + (weight - 1) * int((signs > 0).sum())
    return Fit(
        {name: values.float().cpu().contiguous() for name, values in weights.items()},
        [at_zero / labelled, float(trained.loss.sum()) / labelled],
        bool(trained.converged.all()),
        choice=Choice(
            solver.cost_list,
            trained.ap.tolist(),
            trained.chosen.tolist(),
            trained.folds.tolist(),
            trained.excess.tolist(),
            draw,
        ),
    )


def _matrix(labels: Tensor, classes: int) -> Tensor:
    """Return labels as int8 [N, C], those of single-label data as one-hot."""
    return labels if labels.ndim == 2 else F.one_hot(labels, classes).to(torch.int8)
