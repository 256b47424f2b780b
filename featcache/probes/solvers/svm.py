"""Linear support vector machines, one for each class, with a cost of its own."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from featcache.probes.heads.linear import Linear
from featcache.probes.losses.loss import one_hot
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
# Roughly how often it goes over the images for a machine of each class.
PASSES = 25
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
        return super().conflict(spec)

    def unfit(self, spec: Whole, labels: Tensor, classes: Sequence[str]) -> str | None:
        """See FullBatchSolver.unfit: every class needs positives and negatives, in every fold or draw."""
        known = one_hot(labels, len(classes)).to(torch.int8)
        if self.positives:
            # Labels of -1 are never drawn, whatever the loss makes of them.
            needed = (1, self.positives), (0, self.positives * self.negatives)
            why, remedy = f"{self.positives} shots are drawn", "take a smaller optimizer.positives (--shots)"
        else:
            known, least = spec.loss.read(known), self.folds if len(self.cost_list) > 1 else 1
            needed = (1, least), (0, least)
            why, remedy = f"each of {least} folds needs one", "take fewer folds, or a single cost"
        for value, least in needed:
            counts = (known == value).sum(0)
            if int(counts.min()) == 0:
                what = "positives" if value else "negatives"
                return f"no {what} of class {classes[int(counts.argmin())]!r} in training; train on more images"
            if int(counts.min()) < least:
                what = f"{'positives' if value else 'negatives'} of class {classes[int(counts.argmin())]!r}"
                asked = f", with {self.negatives} negatives for each" if self.positives and not value else ""
                return f"{int(counts.min())} {what} in training, and {why}{asked}; {remedy}"
        return None

    def shortfall(self, steps: int, optimality: Optimality | None) -> str:
        """See Solver.shortfall."""
        return "has machines that had not converged; give it more optimizer.iterations, or smaller costs"

    def fit(self, specs: Sequence[Whole], features: Tensor, labels: Tensor, classes: int) -> list[Fit]:
        """See FullBatchSolver.fit."""
        head = specs[0].head
        # Probes that are trained on the same labels share what the engine prepares.
        alike: dict[Hashable, list[int]] = {}
        for number, spec in enumerate(specs):
            solver = spec.optimizer
            drawn = (solver.positives, solver.negatives, spec.seed) if solver.positives else None
            alike.setdefault((spec.loss, drawn), []).append(number)
        trainer, fits = _Trainer(ENGINES[self.engine], head.normalised(features.double()), head.bias), dict[int, Fit]()
        for numbers in alike.values():
            members = [specs[number] for number in numbers]
            signs, draw = _signs(members[0], labels, classes)
            trained = trainer.train(signs, [spec.optimizer for spec in members], members[0].loss, one_by_one=bool(draw))
            fits |= {n: _fit(spec, signs, one, draw) for n, spec, one in zip(numbers, members, trained, strict=True)}
        return [fits[number] for number in range(len(specs))]

    def passes(self) -> int:
        """See FullBatchSolver.passes."""
        return PASSES * (len(self.cost_list) * self.folds + 1 if len(self.cost_list) > 1 else 1)

    def image_bytes(self, width: int, classes: int) -> int:
        """See FullBatchSolver.image_bytes."""
        return FEATURE_BYTES * width + CLASS_BYTES * classes * len(self.cost_list)


class _Trained(NamedTuple):
    """The machines of C classes of one probe."""

    ap: Tensor  # [C, P], NaN where nothing was held out
    folds: Tensor  # int64 [C]
    chosen: Tensor  # int64 [C]
    weights: Tensor  # [C, D], and a column for the bias if there is one
    converged: Tensor  # bool [C]
    excess: Tensor  # [C], see machines.excess
    loss: Tensor  # [C], summed over images


class _Trainer:
    """Trains machines on features, float64 [N, D]. Those of all images share what the engine prepares."""

    def __init__(self, engine: Callable[[Tensor, bool], Machines], features: Tensor, bias: bool):
        self.engine, self.features, self.bias = engine, features, bias

    @cached_property
    def _of_all_images(self) -> Machines:
        return self.engine(self.features, self.bias)

    def train(self, signs: Tensor, solvers: Sequence[Svm], loss: SquaredHinge, one_by_one: bool) -> list[_Trained]:
        """Return the machines of each probe. signs: int8 [C, N], of all of them.

        one_by_one: whether classes are trained one after another, each on the images that it has, since these are few.
        """
        if not one_by_one:
            return _train(self._of_all_images, signs, solvers, loss)
        parts = []
        for sign in signs:
            own = sign != 0
            parts.append(_train(self.engine(self.features[own], self.bias), sign[None, own], solvers, loss))
        return [
            _Trained(*(torch.cat(fields) for fields in zip(*of_probe, strict=True)))
            for of_probe in zip(*parts, strict=True)
        ]


def _signs(spec: Whole, labels: Tensor, classes: int) -> tuple[Tensor, str | None]:
    """Return the labels of a probe, int8 [C, N], 1, -1, and 0 for none; and the digest of its draw, if it draws."""
    solver, draw, known = spec.optimizer, None, one_hot(labels, classes).to(torch.int8)
    if solver.positives:
        drawn = draw_few(known.cpu().numpy(), solver.positives, solver.negatives, spec.seed or 0)
        draw, known = digest_of_draw(drawn), torch.from_numpy(drawn).to(labels.device)
    else:
        known = spec.loss.read(known)
    return torch.where(known < 0, 0, 2 * known - 1).to(torch.int8).t().contiguous(), draw


def _train(machines: Machines, signs: Tensor, solvers: Sequence[Svm], loss: SquaredHinge) -> list[_Trained]:
    """Choose a cost for each class of each probe, then train their machines on all images together."""
    choices = [_choose(machines, signs, solver, loss.positive_weight) for solver in solvers]
    own = torch.stack(
        [
            signs.new_tensor(s.cost_list, dtype=torch.float64)[place]
            for s, (*_, place) in zip(solvers, choices, strict=True)
        ],
        dim=1,
    )  # [C, probes]
    everything = torch.ones_like(signs, dtype=torch.bool).unsqueeze(1)
    weights, converged = machines.solve(signs, own, everything, loss.positive_weight, solvers[0].iterations)
    trained = []
    for p, choice in enumerate(choices):
        found = weights[:, 0, p]
        bounds_and_losses = excess(machines, signs, own[:, p], loss.positive_weight, found)
        trained.append(_Trained(*choice, found, converged[:, 0, p], *bounds_and_losses))
    return trained


def _choose(machines: Machines, signs: Tensor, solver: Svm, positive_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first three fields of _Trained: the cost of each class by cross-validation, if there are several.

    Each fold needs a positive and a negative. Where that leaves a single fold, the cost is the nearest to 1.
    """
    costs, classes = signs.new_tensor(solver.cost_list, dtype=torch.float64), len(signs)
    folds = min(solver.folds, int((signs > 0).sum(1).min()), int((signs < 0).sum(1).min()))
    if len(costs) > 1 and folds > 1:
        ap = cross_validated(machines, signs, costs, folds, positive_weight, solver.iterations)
        # Of equal ones numpy takes the first.
        return ap, torch.full((classes,), folds), torch.from_numpy(ap.numpy().argmax(1))
    nearest = (costs / PLAIN_COST).log().abs().argmin().cpu()
    return torch.full((classes, len(costs)), torch.nan).double(), torch.zeros(classes).long(), nearest.expand(classes)


def _fit(spec: Whole, signs: Tensor, trained: _Trained, draw: str | None) -> Fit:
    """Return the Fit of one probe. The mean losses are those at zero and in the end."""
    dim = trained.weights.shape[1] - spec.head.bias
    weights = {"fc0.weight": trained.weights[:, :dim]} | (
        {"fc0.bias": trained.weights[:, dim]} if spec.head.bias else {}
    )
    labelled = int((signs != 0).sum())
    at_zero = labelled + (spec.loss.positive_weight - 1) * int((signs > 0).sum())
    choice = Choice(
        spec.optimizer.cost_list,
        trained.ap.tolist(),
        trained.chosen.tolist(),
        trained.folds.tolist(),
        trained.excess.tolist(),
        draw,
    )
    return Fit(
        {name: values.float().cpu().contiguous() for name, values in weights.items()},
        [at_zero / labelled, float(trained.loss.sum()) / labelled],
        bool(trained.converged.all()),
        choice=choice,
    )
