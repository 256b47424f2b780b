"""What every solver does: it changes the weights of probes so that their losses fall."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.gemm import PRECISIONS
from featcache.probes.heads.head import Gradient
from featcache.probes.part import AtLeast0, CountOr0, Part, Positive, Whole


class Solver(Part):
    """Base of all solvers."""

    # Whether it sees all images at once, and so has no epochs, rates and mini-batches.
    full_batch: ClassVar[bool] = False
    # Whether it changes weights at all.
    trains: ClassVar[bool] = True
    # The fields in which the probes of one stack may differ.
    per_probe: ClassVar[frozenset[str]] = frozenset()
    # Precisions in which the products can be computed.
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    @property
    def shared(self) -> Hashable:
        """What the probes of one stack have in common: type and fields."""
        return tuple((name, value) for name, value in self if name not in self.per_probe)

    @property
    def order(self) -> float:
        """What the probes of a stack are sorted by, so that few stacks mix its values."""
        return 0.0

    @property
    def summary_of_rate(self) -> str:
        """How messages about a probe describe its rate: lr 0.1, or the type where there is no rate."""
        return self.type

    def shortfall(self, steps: int, optimality: "Optimality | None") -> str:
        """Return how messages go on about a probe that had not converged after so many steps."""
        missing = f", {optimality}" if optimality else ""
        return (
            f"had not converged after {steps} Newton steps ({self.type}{missing}); give it more optimizer.iterations, or "
            "more weight_decay"
        )


@dataclass(frozen=True)
class Optimality:
    """How far from the optimum W* a full-batch probe ended.

    distance: a bound on |W - W*| / |W|, infinite where there is none, as without weight decay. gradient: its norm over
    the largest at which the probe counts as converged.
    """

    distance: float
    gradient: float

    def __str__(self) -> str:
        if math.isfinite(self.distance):
            return f"up to {self.distance:.1e} of its weights from the optimum"
        return f"with {self.gradient:.1e} times the gradient that it may have"


@dataclass(frozen=True)
class Choice:
    """The regularisation that each of C classes was trained with, out of K costs.

    ap: of each class and cost, the mean average precision on held-out folds; NaN where nothing was held out. chosen:
    the place of each class's cost. folds: of each class, 0 where nothing was held out. excess: a bound on the share by
    which each class's objective exceeds its minimum. draw: a digest of the images that were drawn to train on, or None
    for all images.
    """

    costs: Sequence[float]
    ap: list[list[float]]
    chosen: list[int]
    folds: list[int]
    excess: list[float]
    draw: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with None for NaN."""
        return asdict(self) | {"ap": [[None if math.isnan(ap) else ap for ap in row] for row in self.ap]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the Choice whose to_json() this is."""
        ap = [[math.nan if ap is None else ap for ap in row] for row in content["ap"]]
        return cls(**{**content, "ap": ap})


@dataclass(frozen=True)
class Fit:
    """The result of full-batch training of one probe.

    weights: {name: float32 CPU tensor}; NaN if the features are not all finite. losses: the mean losses before and
    after each step. converged: False if the steps ran out. choice: of a solver that chooses for each class. optimality:
    None if the solver does not know it.
    """

    weights: dict[str, Tensor]
    losses: list[float]
    converged: bool
    choice: Choice | None = None
    optimality: Optimality | None = None


class FullBatchSolver(Solver):
    """Base of solvers that see all images at once."""

    full_batch: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = ("float32", "tf32")

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if spec.views:
            return f"optimizer {self.type} trains on the images as they are: say views: 0"
        if spec.keep != "last" or spec.patience:
            return f"optimizer {self.type} has no epochs to choose from: leave out keep and patience"
        return None

    def fit(self, specs: Sequence[Whole], features: Tensor, labels: Tensor, classes: int) -> list[Fit]:
        """Train probes that share features and head, and return a Fit of each.

        features: [N, D], any float dtype. labels: int8 [N, C] or int64 [N]. Both on one device.
        """
        raise NotImplementedError

    def shares_folds(self, spec: Whole) -> bool:
        """Return whether such a probe trains together with others that hold other folds out, by fit_folds()."""
        return False

    def fit_folds(
        self, specs: Sequence[Whole], features: Tensor, labels: Tensor, classes: int, held_out: Mapping[str, Tensor]
    ) -> list[Fit]:
        """Train probes as fit() does, of which some learn nothing from a fold of the images.

        held_out: {fold of a spec: the rows that it holds out, int64 [n]}.
        """
        raise NotImplementedError

    def unfit(self, spec: Whole, labels: Tensor, classes: Sequence[str]) -> str | None:
        """Return a line for the user if a probe cannot be trained on these labels, else None. classes: their names."""
        return None

    def passes(self) -> int:
        """Return roughly how often it goes over the images for one probe."""
        raise NotImplementedError

    def image_bytes(self, width: int, classes: int) -> int:
        """Return roughly how many bytes it keeps for each image."""
        raise NotImplementedError

    @property
    def weight_copies(self) -> int:
        """How many float32 numbers it keeps for each weight of a probe until the whole block is trained."""
        return 2


class MiniBatchSolver(Solver):
    """Base of solvers that take a step for every mini-batch. The rate is lr, or lr batch_size / lr_base if there is one."""

    lr: Positive = Field(description="learning rate")
    weight_decay: AtLeast0 = Field(0.0, description="weight decay")
    clip: AtLeast0 = Field(0.0, description="largest norm of the probe's gradient; 0 allows any")
    lr_base: CountOr0 = Field(
        0, description="batch size that lr is meant for (Goyal et al., 2017); 0 takes lr as it is"
    )

    per_probe: ClassVar[frozenset[str]] = frozenset({"lr", "lr_base", "weight_decay", "clip"})
    # Numbers that the update rule keeps for each weight, besides the weight and its gradient.
    moments: ClassVar[int] = 1

    def rate(self, batch_size: int) -> float:
        """Return the learning rate before the schedule."""
        return self.lr * batch_size / self.lr_base if self.lr_base else self.lr

    @property
    def summary_of_rate(self) -> str:
        """See Solver.summary_of_rate."""
        return f"lr {self.lr:g}"

    @property
    def weight_copies(self) -> int:
        """How many float32 numbers training keeps for each weight: itself, its gradient, and the rule's state."""
        return 2 + self.moments

    def rule(self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device) -> "Rule":
        """Return the Rule that updates stacked parameters, [P, ...] each. solvers: of the P probes, all of this kind."""
        raise NotImplementedError


class DecayingSolver(MiniBatchSolver):
    """Base of solvers that let a user say which parameters weight decay leaves alone."""

    undecayed: Literal["none", "norms", "biases", "both"] = Field(
        "none", description="parameters that weight_decay leaves alone: none, those of norms, biases of layers, or both"
    )

    def leaves_alone(self, name: str) -> bool:
        """Return whether weight decay leaves a parameter alone. name: such as bn0.weight or fc0.bias."""
        norm = name.startswith("bn")
        bias = name.endswith(".bias") and not norm
        return (norm and self.undecayed in ("norms", "both")) or (bias and self.undecayed in ("biases", "both"))


class Rule(Protocol):
    """An update rule over the stacked parameters of P probes, with its state."""

    steps: int

    def advance(self) -> None:
        """Count a step that is about to be taken, in `steps`, and set what depends on their number."""

    def step(self, gradients: list[Gradient], rates: Tensor) -> None:
        """Update all parameters in place; it may overwrite the gradients. rates: float32 [P]."""

    def state(self) -> dict[str, list[Tensor]]:
        """Return the state besides the parameters: {name: tensors [P, ...]}, which may be written to."""
