"""One configuration while it trains: network, update, moving average, loss scale, and its state on disk."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from featcache.errors import BadInput
from featcache.finetuning.draws import Draws
from featcache.finetuning.groups import Update, gradients, parameter_groups
from featcache.finetuning.images import mix
from featcache.finetuning.network import Network
from featcache.probes.engine.best import BestWeights, stalled
from featcache.probes.losses.loss import LossFunction
from featcache.probes.runs.sealed_tensors import read_content, unseal, write_sealed
from featcache.ranks import Alone

# A scale of the loss that keeps the gradients of fp16 from vanishing: torch.amp.GradScaler's numbers.
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
# A part of a mini-batch: its number, its pixels uint8 [b, 3, S, S], and the rows of its images.
Part = tuple[int, Tensor, Tensor]


class Tuner:
    """A network in training. epoch, step: whole epochs done, and steps of the next; save() and restore() keep all of it.

    labels: of all training rows, on the device. losses: mean loss of every whole epoch. scores: after it, the metric by
    which configurations are chosen, higher is better, NaN where it was not measured. diverged: the step at which the loss
    stopped being finite, or None.
    """

    def __init__(self, network: Network, labels: Tensor, draws: Draws, device: torch.device, ranks: Alone):
        self.network, self.labels, self.draws, self.device, self.ranks = (
            network.to(device),
            labels,
            draws,
            device,
            ranks,
        )
        self.function = LossFunction(network.spec.loss, labels, network.classes)
        self.update = Update(parameter_groups(network), network, device)
        decay = network.tuning.ema
        # Batch counters are whole numbers, which have no average.
        self.average = {k: v.clone() for k, v in network.state_dict().items() if v.is_floating_point()} if decay else {}
        self.best: BestWeights | None = None
        self.epoch = self.step = 0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.running = 0.0
        self.diverged: int | None = None
        self.scale = FIRST_SCALE if network.tuning.amp == "fp16" else 1.0
        self.clean = 0

    def train_step(self, batch: Tensor, mine: Iterable[Part], factor: float) -> None:
        """Make one step. batch: rows of the whole mini-batch. mine: this process's parts of it. factor: of the rate."""
        self.network.train()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        whole = self.function.count(self.labels[batch])
        for parameter in self.update.parameters:
            parameter.grad = None
        for number, pixels, rows in mine:
            loss += self._backward(number, pixels, self.labels[rows], whole)
        self._add_up(loss)
        self.running += float(loss)
        self.step += 1
        if not math.isfinite(loss):
            self.diverged = self.update.steps
        elif self._gradients_are_usable():
            self.update.step(factor)
            self._average()

    def _backward(self, number: int, pixels: Tensor, labels: Tensor, whole: float) -> Tensor:
        """Run one part forward and backward; return its share of the mean loss of the batch, float64."""
        torch.manual_seed(self.draws.part(self.epoch, self.step, number))
        preprocessing, tuning = self.network.backbone.preprocessing, self.network.tuning
        images, share = mix(preprocessing.normalise(pixels.to(self.device, non_blocking=True)), tuning)
        logits = self.network(images)
        loss, slope = self._loss(logits.detach().unsqueeze(1), labels, share)
        weight = self.function.count(labels) / whole
        logits.backward(slope.squeeze(1) * (weight * self.scale))
        return loss.double().squeeze(0) * weight

    def _loss(self, logits: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return the mean loss [1] and its gradient [b, 1, C]. share: of the images' own labels, see mix."""
        if share == 1:
            return self.function(logits, labels)
        others = labels.roll(1, 0)
        if self.network.tuning.mixed == "both":
            if labels.ndim == 1:
                labels, others = (F.one_hot(n, self.network.classes).to(torch.int8) for n in (labels, others))
            return self.function(logits, torch.maximum(labels, others))
        # All losses are linear in the targets, so that the loss of a mixture is the mixture of the losses.
        (a, a_slope), (b, b_slope) = self.function(logits, labels), self.function(logits, others)
        return a * share + b * (1 - share), a_slope * share + b_slope * (1 - share)

    def _add_up(self, loss: Tensor) -> None:
        """Add the gradients and losses of all processes."""
        if self.ranks.size == 1:
            return
        for parameter in self.update.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        own = gradients(self.update.parameters)
        flat = torch.cat([g.flatten() for g in own])
        torch.distributed.all_reduce(flat)
        torch.distributed.all_reduce(loss)
        for gradient, part in zip(own, flat.split([g.numel() for g in own]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def _gradients_are_usable(self) -> bool:
        """Undo the scale of the loss. Returns False, with a smaller scale, where it was too large."""
        if self.network.tuning.amp != "fp16":
            return True
        own = gradients(self.update.parameters)
        torch._foreach_mul_(own, 1 / self.scale)
        if not bool(torch.stack([g.isfinite().all() for g in own]).all()):
            self.scale, self.clean = max(self.scale / 2, 1.0), 0
            return False
        self.clean += 1
        if self.clean == GROWTH_STEPS:
            self.scale, self.clean = self.scale * 2, 0
        return True

    @torch.no_grad()
    def _average(self) -> None:
        current = self.network.state_dict()
        for name, average in self.average.items():
            average.lerp_(current[name], 1 - self.network.tuning.ema)

    def end_epoch(self, steps: int) -> None:
        """Close an epoch of so many steps. The batch-norm statistics of the first process become those of all."""
        self.losses.append(self.running / steps)
        self.epoch, self.step, self.running = self.epoch + 1, 0, 0.0
        if self.ranks.size > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validated(self, score: float) -> None:
        """Take the score after an epoch, higher is better, and with keep: best the weights that have the best one."""
        self.scores.append(score)
        if self.network.spec.keep == "best":
            weights = {name: tensor.unsqueeze(0) for name, tensor in self.weights().items()}
            self.best = self.best or BestWeights.before_validation(weights)
            self.best.update(torch.tensor([score], dtype=torch.float64), self.epoch, weights)

    def impatient(self) -> bool:
        """Return whether `patience` epochs have passed without a better score."""
        scores = torch.tensor(self.scores, dtype=torch.float64).unsqueeze(1)
        return bool(stalled(scores, self.network.spec.patience))

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors as they are scored: the moving average if there is one, else the network's own."""
        return dict(self.network.state_dict()) | self.average

    def finish(self) -> int:
        """Leave the final weights in the network; return the epoch that they are of."""
        self.network.load_state_dict(self._best() or self.weights())
        self.average = {}
        self.network.eval()
        return self._best_epoch or self.epoch

    @property
    def _best_epoch(self) -> int:
        """The epoch of the best score, 0 where there is none."""
        return int(self.best.epochs[0]) if self.best else 0

    def _best(self) -> dict[str, Tensor]:
        """Return the tensors that had the best score, {} where there is none."""
        return {name: tensor[0] for name, tensor in self.best.weights.items()} if self.best and self._best_epoch else {}

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Write the state. content: what the file says besides, see probe_file."""
        counts = {
            "step": self.step, "steps": self.update.steps, "losses": self.losses, "scores": _as_json(self.scores),
            "running": self.running, "scale": self.scale, "clean": self.clean, "best_epoch": self._best_epoch,
        }  # fmt: skip
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}
        write_sealed(path, tensors, content | {"epoch": self.epoch, "counts": counts})

    def restore(self, path: Path) -> None:
        """Go on from a state. Raises BadInput if it is not one of this configuration."""
        try:
            unseal(path)
            content, saved = read_content(path), safetensors.torch.load_file(path)
            counts = content["counts"]
            scores = [math.nan if score is None else score for score in counts["scores"]]
            best = {n.removeprefix("best."): t for n, t in saved.items() if n.startswith("best.")}
            if best:
                self.best = BestWeights(
                    torch.tensor([scores[counts["best_epoch"] - 1]], dtype=torch.float64),
                    torch.tensor([counts["best_epoch"]]),
                    {name: tensor.to(self.device).unsqueeze(0) for name, tensor in best.items()},
                )
            own = self._tensors()
            if own.keys() != saved.keys():
                raise ValueError("its tensors are others")
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        except (OSError, LookupError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise BadInput(f"cannot read state {path}: {error}; delete it and run the same finetune again") from None
        self.epoch, self.step, self.update.steps = content["epoch"], counts["step"], counts["steps"]
        self.losses, self.running, self.scale = counts["losses"], counts["running"], counts["scale"]
        self.clean, self.scores = counts["clean"], scores

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state; they are those that training changes."""
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        average = {f"average.{name}": tensor for name, tensor in self.average.items()}
        best = {f"best.{name}": tensor for name, tensor in self._best().items()}
        return network | average | best | self.update.state()


def _as_json(scores: Sequence[float]) -> list[float | None]:
    return [score if math.isfinite(score) else None for score in scores]
