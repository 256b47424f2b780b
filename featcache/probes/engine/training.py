"""A block of probes while it trains on mini-batches: weights, update rule, and the history of each probe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from torch import Tensor

from featcache.device import multiplying
from featcache.probes.engine.best import BestWeights, stalled
from featcache.probes.engine.blocks import padded
from featcache.probes.engine.mini_batch import MiniBatchRecipe
from featcache.probes.engine.predict import predict
from featcache.probes.engine.stack_loss import StackLoss
from featcache.probes.engine.step import can_capture, make_step
from featcache.probes.inputs.input import Columns
from featcache.probes.runs.probe_file import Origin, block_name
from featcache.probes.runs.run_file import PARTIAL
from featcache.probes.runs.sealed_tensors import read_content, write_sealed
from featcache.probes.solvers.rule import UpdateRule
from featcache.probes.solvers.solver import DecayingSolver, Rule
from featcache.probes.spec import ProbeSpec, spec_from_dict, spec_to_dict
from featcache.probes.trained import TrainedProbe
from featcache.probes.weights import all_finite, stacked_weights


class Training:
    """Probes of one block, which share images, features, views, head, batches and update rule (see blocks.py).

    An epoch is begin_epoch(), feed() for each mini-batch, and end_epoch(). save() writes the whole state, from which
    restored() goes on to the same bits.

    specs: the probes that still train. name: of the block as it began, from its probes' ids. epoch: epochs done, of
    `epochs`. end: the epoch after which training ends, which for a refit may be before the last. steps: of an epoch.
    batch_size: images of a mini-batch. views: over which the epochs rotate. validates: whether every epoch ends with a
    validation score. columns: of the features that training reads, None for all.
    """

    columns: Columns | None = None

    def __init__(self, specs: Sequence[ProbeSpec], dim: int, classes: int, labels: Tensor):
        """specs: of one block. dim: width of the features. labels: of the training data, on the device to train on."""
        first = specs[0]
        recipe = MiniBatchRecipe.of(first)
        self.specs, self.name = list(specs), block_name(specs)
        self.epoch, self.epochs, self.batch_size, self.views = 0, recipe.epochs, recipe.batch_size, first.views
        self.end = first.stop or self.epochs
        self.steps = -(-len(labels) // self.batch_size)
        # A refit has no images left to validate on; what the choice found out is its `stop`.
        self.validates = (first.keep == "best" or first.patience > 0) and not first.refit
        self._first, self._dim, self._classes, self._labels = first, dim, classes, labels
        self._losses = torch.zeros(0, len(specs), dtype=torch.float64)  # [epochs done, P]
        self._scores = torch.zeros(0, len(specs), dtype=torch.float64)
        self._diverged = torch.full((len(specs),), -1)  # Steps over all epochs, -1 where the loss was always finite.
        self._best: BestWeights | None = None
        self._build()

    def _build(self) -> None:
        """Make the stack, the update rule and the losses of the specs, with initial weights."""
        head, precision, device = self._first.head, self._first.precision, self._labels.device
        self._padded = padded(self.specs, self._classes)
        self._recipes = [MiniBatchRecipe.of(spec) for spec in self._padded]
        self._stack = head.stack(stacked_weights(self._padded, self._dim, self._classes, device), precision)
        solvers = [recipe.solver for recipe in self._recipes]
        self._rule = solvers[0].rule(self._stack.parameters, solvers, precision, device)
        if isinstance(solvers[0], DecayingSolver) and isinstance(self._rule, UpdateRule):
            names = [name for name in self._stack.weights if "running" not in name]
            self._rule.undecayed = frozenset(n for n, name in enumerate(names) if solvers[0].leaves_alone(name))
        loss = StackLoss(self._padded, self._labels, self._classes, self.batch_size)
        capturable = all(can_capture(spec, device) for spec in self.specs)
        self._step = make_step(self._first, self._stack, loss, self._rule, capturable)

    def begin_epoch(self) -> None:
        """Prepare the rates of an epoch's steps."""
        rates = torch.tensor([recipe.rate for recipe in self._recipes], dtype=torch.float64)
        schedules = {spec.schedule for spec in self._padded}
        factors = {schedule: schedule.factors(self.epochs, self.steps, self.epoch) for schedule in schedules}
        factor = torch.stack([factors[spec.schedule] for spec in self._padded], dim=1)
        self._rates = (factor * rates).float().to(self._labels.device)  # [steps, P]
        self._step_losses = torch.zeros(self.steps, len(self._padded), device=self._labels.device)
        self._step_sizes: list[int] = []

    def feed(self, features: Tensor, targets: Tensor) -> None:
        """Take one step. features: float32 [B, D] or [B, D, S]. targets: labels of the rows, [B] or [B, C]."""
        step = len(self._step_sizes)
        self._rule.advance()
        with multiplying(self._first.precision):
            self._step_losses[step] = self._step(features, targets, self._rates[step])
        self._step_sizes.append(len(features))

    def end_epoch(self) -> None:
        """Note the epoch's mean losses, and where a loss stopped being finite, the step."""
        count = len(self.specs)
        losses = self._step_losses[:, :count].double().cpu()
        sizes = torch.tensor(self._step_sizes, dtype=torch.float64)[:, None]
        self._losses = torch.cat([self._losses, (losses * sizes).sum(0, keepdim=True) / sizes.sum()])
        self._scores = torch.cat([self._scores, torch.full((1, count), torch.nan, dtype=torch.float64)])
        bad = ~torch.isfinite(losses)
        new = bad.any(0) & (self._diverged < 0)
        self._diverged[new] = self.epoch * self.steps + bad.int().argmax(0)[new]
        self.epoch += 1

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [P, R, C] of features, float32 [R, D] or [R, D, S], with the current weights."""
        return predict(self._stack, self.batch_size, features)[: len(self.specs)]

    def validated(self, scores: Tensor) -> None:
        """Take the validation scores after an epoch, float64 [P], higher is better; keep the weights if keep is best."""
        self._scores[-1] = scores
        if self._first.keep == "best":
            weights = self._weights()
            self._best = self._best or BestWeights.before_validation(weights)
            self._best.update(scores, self.epoch, weights)

    def impatient(self) -> Tensor:
        """Return which probes have gone `patience` epochs without a better validation score, bool [P]."""
        return stalled(self._scores, self._first.patience if self.validates else 0)

    def scores(self, p: int) -> list[float]:
        """Return the validation scores of a probe after every epoch, NaN where there was no validation."""
        return self._scores[:, p].tolist()

    def take_out(self, gone: Tensor, why: str | None = None) -> list[TrainedProbe]:
        """Take probes out, bool [P], and return them as TrainedProbes. why: what stopped them early."""
        taken = [self._finished(p, why) for p in gone.nonzero().flatten().tolist()]
        stay = (~gone).nonzero().flatten()
        if taken and len(stay):
            self._keep(stay)
        elif taken:
            self.specs = []
        return taken

    def _keep(self, stay: Tensor) -> None:
        """Go on with the probes of these numbers alone, int64 [P'], in a smaller stack."""
        weights, moments, steps = self._weights(), self._moments(), self._rule.steps
        self.specs = [self.specs[p] for p in stay.tolist()]
        self._losses, self._scores = self._losses[:, stay], self._scores[:, stay]
        self._diverged = self._diverged[stay]
        if self._best:
            self._best.keep(stay)
        self._build()
        self._fill(
            {name: w[stay.to(w.device)] for name, w in weights.items()},
            {name: t[stay.to(t.device)] for name, t in moments.items()},
            steps,
        )

    def finish(self) -> list[TrainedProbe]:
        """Return all probes as TrainedProbes."""
        return [self._finished(p, None) for p in range(len(self.specs))]

    def _finished(self, p: int, why: str | None) -> TrainedProbe:
        diverged, epoch = int(self._diverged[p]), self.epoch
        weights = {name: w[p].detach().cpu().clone() for name, w in self._stack.weights.items()}
        if diverged < 0 and not all_finite(weights):
            # The loss of the last step was still finite, but the weights after it are not.
            diverged = self.epoch * self.steps - 1
        if diverged >= 0:
            weights = {name: torch.full_like(w, torch.nan) for name, w in weights.items()}
        elif self._best and self._best.epochs[p]:
            weights = {name: w[p].cpu().clone() for name, w in self._best.weights.items()}
            epoch = int(self._best.epochs[p])
        return TrainedProbe(
            spec=self.specs[p],
            weights=weights,
            losses=self._losses[:, p].tolist(),
            diverged=None if diverged < 0 else diverged,
            epoch=epoch,
            scores=self.scores(p),
            stopped=why,
        )

    def _weights(self) -> dict[str, Tensor]:
        """Return views of the weights without padding, {name: [P, ...]}."""
        return {name: w[: len(self.specs)].detach() for name, w in self._stack.weights.items()}

    def _moments(self) -> dict[str, Tensor]:
        """Return views of the update rule's state without padding, {name: [P, ...]}."""
        return {name: t[: len(self.specs)] for name, t in _tensors_of(self._rule).items()}

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor], moments: dict[str, Tensor], steps: int) -> None:
        """Set what _weights() and _moments() return, and the number of steps that the update rule has taken."""
        for name, stacked in self._stack.weights.items():
            _repeat_last(stacked, weights[name])
        for name, stacked in _tensors_of(self._rule).items():
            _repeat_last(stacked, moments[name])
        self._rule.steps = steps

    def save(self, folder: str | Path, origin: Origin) -> None:
        """Write the state into a run folder, from which restored() goes on as if nothing had happened."""
        tensors = {f"weights/{name}": w for name, w in self._weights().items()}
        tensors |= {f"optimizer/{name}": t for name, t in self._moments().items()}
        tensors |= {"losses": self._losses, "scores": self._scores, "diverged": self._diverged}
        if self._best:
            tensors |= {"best/score": self._best.scores, "best/epoch": self._best.epochs}
            tensors |= {f"best/weights/{name}": w for name, w in self._best.weights.items()}
        content = {
            "name": self.name,
            "specs": [spec_to_dict(spec) for spec in self.specs],
            "epoch": self.epoch,
            "counts": {"steps": self._rule.steps},
        }
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        write_sealed(state_path(folder, self.name), contiguous, vars(origin) | content)

    @classmethod
    def restored(cls, path: str | Path, width: Callable[[ProbeSpec], int], classes: int, labels: Tensor) -> Self:
        """Return the Training whose state a file holds. The file has passed check_file. width: of a probe's features."""
        content, tensors = read_content(path), safetensors.torch.load_file(path)
        specs = [spec_from_dict(spec) for spec in content["specs"]]
        training = cls(specs, width(specs[0]), classes, labels)
        training.name, training.epoch = Path(path).stem, content["epoch"]
        training._losses, training._scores = tensors["losses"], tensors["scores"]
        training._diverged = tensors["diverged"]
        training._fill(_under("weights/", tensors), _under("optimizer/", tensors), content["counts"]["steps"])
        if "best/score" in tensors:
            weights = {name: w.to(labels.device) for name, w in _under("best/weights/", tensors).items()}
            training._best = BestWeights(tensors["best/score"], tensors["best/epoch"], weights)
        return training


def state_path(folder: str | Path, name: str) -> Path:
    """Return the file of a block's state in a run folder. name: of the block as it began."""
    return Path(folder) / PARTIAL / f"{name}.safetensors"


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _tensors_of(rule: Rule) -> dict[str, Tensor]:
    """Return the state of an update rule as {name: [P, ...]}."""
    return {f"{name}/{i}": tensor for name, tensors in rule.state().items() for i, tensor in enumerate(tensors)}


def _repeat_last(stacked: Tensor, values: Tensor) -> None:
    """Copy [P, ...] into the padded [P', ...], whose padding repeats the last probe."""
    stacked[: len(values)] = values
    stacked[len(values) :] = values[-1]
