"""The probes of one block while they train: weights, optimiser, and what is known of each."""

from pathlib import Path

import safetensors.torch
import torch

from featcache.device import multiplying
from featcache.probes.engine.blocks import padded
from featcache.probes.engine.memory import MemoryBudget
from featcache.probes.engine.predict import predict
from featcache.probes.heads.weights import stacked_weights
from featcache.probes.identity import spec_to_dict
from featcache.probes.losses.loss import LossFunction
from featcache.probes.runs.probe_file import block_name
from featcache.probes.runs.run_file import PARTIAL
from featcache.probes.runs.sealed_tensors import read_content, write_sealed
from featcache.probes.spec import spec_from_dict
from featcache.probes.trained import TrainedProbe


class Training:
    """A block of probes that share features, views, head, batches and rule (see stack.blocks).

    An epoch is begin_epoch(), feed() for each mini-batch, end_epoch(). All state of it is what save() writes,
    from which restored() goes on to the same bits. Attributes: specs (of the probes still training),
    epoch (epochs done), steps (of an epoch), name (of the block as it began, from its probes' ids).
    """

    def __init__(self, specs, dim, classes, labels):
        """specs: of one block. dim: width of the features. labels: of the training data, on the device to train on."""
        self.specs = list(specs)
        self.name = block_name(specs)
        self.epoch = 0
        self._shape = (dim, classes, labels)
        self._losses = torch.zeros(0, len(specs), dtype=torch.float64)  # [epochs done, P]
        self._scores = torch.zeros(0, len(specs), dtype=torch.float64)
        self._diverged = torch.full((len(specs),), -1)
        self._best = None
        self._build()

    def _build(self):
        dim, classes, labels = self._shape
        full, first = padded(self.specs, classes), self.specs[0]
        self._stack = first.head.stack(stacked_weights(full, dim, classes, labels.device), first.precision)
        solvers = [spec.optimizer for spec in full]
        self._rule = first.optimizer.rule(self._stack.parameters, solvers, first.precision, labels.device)
        self._slices = _loss_slices(full, labels, classes)
        self.steps = -(-len(labels) // self.batch_size)

    @property
    def batch_size(self):
        """Rows of a mini-batch."""
        return self.specs[0].batch_size

    @property
    def epochs(self):
        """Epochs that the probes train for."""
        return self.specs[0].epochs

    @property
    def views(self):
        """Views that the epochs rotate over."""
        return self.specs[0].views

    @property
    def validates(self):
        """Whether a validation score is asked for after every epoch."""
        return self.specs[0].keep == "best" or self.specs[0].patience > 0

    def begin_epoch(self):
        """Prepare the rates of an epoch's steps."""
        _, classes, labels = self._shape
        full = padded(self.specs, classes)
        rates = torch.tensor([s.optimizer.rate(s.batch_size) for s in full], dtype=torch.float64)
        drawn = {s: s.factors(self.epochs, self.steps, self.epoch) for s in {s.schedule for s in full}}
        factor = torch.stack([drawn[s.schedule] for s in full], dim=1)
        self._rates = (factor * rates).float().to(labels.device)  # [steps, P]
        self._table = torch.zeros(self.steps, len(full), device=labels.device)
        self._sizes = []

    def feed(self, features, targets):
        """Take one step. features: float32 [B, D] or [B, D, S]. targets: labels of the rows, [B] or [B, C]."""
        step = len(self._sizes)
        with multiplying(self.specs[0].precision):
            logits = self._stack.forward(features, training=True)  # [B, P, C]
            exact = logits.device.type == "cpu" and self.specs[0].precision == "float32"
            loss, gradient = _loss_and_gradient(logits.detach(), targets, self._slices, exact)
            self._rule.step(self._stack.backward(features, logits, gradient), self._rates[step])
        self._table[step] = loss
        self._sizes.append(len(features))

    def end_epoch(self):
        """Note the epoch's losses, and for a loss that is not finite the step at which it came."""
        table = self._table[:, : len(self.specs)].double().cpu()
        sizes = torch.tensor(self._sizes, dtype=torch.float64)[:, None]
        self._losses = torch.cat([self._losses, (table * sizes).sum(0, keepdim=True) / sizes.sum()])
        self._scores = torch.cat([self._scores, torch.full((1, len(self.specs)), torch.nan, dtype=torch.float64)])
        bad = ~torch.isfinite(table)
        new = bad.any(0) & (self._diverged < 0)
        self._diverged[new] = self.epoch * self.steps + bad.int().argmax(0)[new]
        self.epoch += 1

    @torch.no_grad()
    def logits(self, features):
        """Logits [P, R, C] of features, float32 [R, D] or [R, D, S], by the weights as they are."""
        return predict(self._stack, self.batch_size, features)[: len(self.specs)]

    def validated(self, scores):
        """Take the validation scores after an epoch, float64 [P], higher is better; keep the best weights."""
        self._scores[-1] = scores
        if self.specs[0].keep != "best":
            return
        scores = scores.nan_to_num(nan=-torch.inf)
        if self._best is None:
            none = torch.full((len(self.specs),), -torch.inf, dtype=torch.float64)
            held = {n: w[: len(self.specs)].detach().clone() for n, w in self._stack.weights.items()}
            self._best = {"score": none, "epoch": torch.zeros(len(self.specs), dtype=torch.int64), "weights": held}
        better = scores > self._best["score"]
        self._best["score"][better] = scores[better]
        self._best["epoch"][better] = self.epoch
        for name, kept in self._best["weights"].items():
            kept[better.to(kept.device)] = self._stack.weights[name][: len(self.specs)][better.to(kept.device)].detach()

    def impatient(self):
        """Which probes have gone `patience` epochs without a better validation score: bool [P]."""
        patience = self.specs[0].patience
        if not patience or self.epoch <= patience:
            return torch.zeros(len(self.specs), dtype=torch.bool)
        scores = self._scores.nan_to_num(nan=-torch.inf)
        return scores[-patience:].amax(0) <= scores[:-patience].amax(0)

    def scores(self, p):
        """Validation scores of a probe after every epoch, NaN where it was not asked for."""
        return self._scores[:, p].tolist()

    def take_out(self, gone, why=None):
        """Take probes out, bool [P], and return them as TrainedProbes; why: what stopped them early."""
        taken = [self._finished(p, why) for p in gone.nonzero().flatten().tolist()]
        stay = (~gone).nonzero().flatten()
        if len(taken) and len(stay):
            weights, state = self._held()
            steps = self._rule.steps
            self.specs = [self.specs[p] for p in stay.tolist()]
            self._losses, self._scores, self._diverged = (
                t[..., stay] for t in (self._losses, self._scores, self._diverged)
            )
            if self._best:
                self._best = {
                    "score": self._best["score"][stay],
                    "epoch": self._best["epoch"][stay],
                    "weights": {n: w[stay.to(w.device)] for n, w in self._best["weights"].items()},
                }
            self._build()
            self._fill({n: w[stay.to(w.device)] for n, w in weights.items()})
            self._fill_rule({n: t[stay.to(t.device)] for n, t in state.items()}, steps)
        elif len(taken):
            self.specs = []
        return taken

    def finish(self):
        """All probes, as TrainedProbes."""
        return [self._finished(p, None) for p in range(len(self.specs))]

    def _finished(self, p, why):
        losses = self._losses[:, p].tolist()
        diverged = int(self._diverged[p])
        weights = {name: w[p].detach().cpu().clone() for name, w in self._stack.weights.items()}
        epoch = self.epoch
        if diverged < 0 and not _finite(weights):
            # The last step's loss was still finite, and what it led to is not.
            diverged = self.epoch * self.steps - 1
        if diverged >= 0:
            weights = {n: torch.full_like(w, torch.nan) for n, w in weights.items()}
        elif self._best and self._best["epoch"][p]:
            weights = {n: w[p].cpu().clone() for n, w in self._best["weights"].items()}
            epoch = int(self._best["epoch"][p])
        return TrainedProbe(
            spec=self.specs[p],
            weights=weights,
            losses=losses,
            diverged=None if diverged < 0 else diverged,
            epoch=epoch,
            scores=self.scores(p),
            stopped=why,
        )

    def _held(self):
        """What the stack and the update rule hold of each probe, {name: [P, ...]}, without padding."""
        count = len(self.specs)
        weights = {n: w[:count].detach() for n, w in self._stack.weights.items()}
        return weights, {n: t[:count] for n, t in _tensors_of(self._rule).items()}

    @torch.no_grad()
    def _fill(self, weights):
        for name, stacked in self._stack.weights.items():
            _repeat_last(stacked, weights[name])

    def _fill_rule(self, tensors, steps):
        for name, held in _tensors_of(self._rule).items():
            _repeat_last(held, tensors[name])
        self._rule.steps = steps

    def save(self, folder, origin):
        """Write a state, from which restored() goes on as if nothing had been, into a folder. origin: of what, an Origin."""
        weights, state = self._held()
        tensors = {f"weights/{n}": w.contiguous() for n, w in weights.items()}
        tensors |= {f"optimizer/{n}": t.contiguous() for n, t in state.items()}
        tensors |= {"losses": self._losses, "scores": self._scores, "diverged": self._diverged}
        if self._best:
            tensors |= {"best/score": self._best["score"], "best/epoch": self._best["epoch"]}
            tensors |= {f"best/weights/{n}": w for n, w in self._best["weights"].items()}
        content = {
            "name": self.name,
            "specs": [spec_to_dict(s) for s in self.specs],
            "epoch": self.epoch,
            "counts": {"steps": self._rule.steps},
        }
        write_sealed(
            state_path(folder, self.name), {n: t.contiguous() for n, t in tensors.items()}, vars(origin) | content
        )

    @classmethod
    def restored(cls, path, dim, classes, labels):
        """The Training whose state a file holds, which check_file has found whole."""
        content, tensors = read_content(path), safetensors.torch.load_file(path)
        made = cls([spec_from_dict(s) for s in content["specs"]], dim, classes, labels)
        made.name, made.epoch = Path(path).stem, content["epoch"]
        made._losses, made._scores, made._diverged = (tensors[n] for n in ("losses", "scores", "diverged"))
        made._fill(_under("weights/", tensors))
        made._fill_rule(_under("optimizer/", tensors), content["counts"]["steps"])
        if "best/score" in tensors:
            kept = {n: w.to(labels.device) for n, w in _under("best/weights/", tensors).items()}
            made._best = {"score": tensors["best/score"], "epoch": tensors["best/epoch"], "weights": kept}
        return made


def state_path(folder, name):
    """Where the state of a block lies, which is named after the probes that it began with."""
    return Path(folder) / PARTIAL / f"{name}.safetensors"


def fit_block(specs, features, labels, classes):
    """As train_block, for probes whose optimizer sees all images at once."""
    fits = specs[0].optimizer.fit(specs, features, labels, classes)
    return [
        TrainedProbe(
            spec,
            fit.weights,
            fit.losses,
            None if _finite(fit.weights) else len(fit.losses) - 1,
            spec.epochs,
            stopped=None if fit.converged else "iterations",
        )
        for spec, fit in zip(specs, fits, strict=True)
    ]


def _finite(weights):
    # The largest and the smallest tell, in a fraction of the time of looking at each.
    return all(bool(torch.isfinite(torch.stack(w.aminmax())).all()) for w in weights.values())


def _under(prefix, tensors):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _tensors_of(rule):
    """The state of an update rule as {name: [P, ...]}."""
    return {f"{name}/{i}": tensor for name, tensors in rule.state().items() for i, tensor in enumerate(tensors)}


def _repeat_last(stacked, held):
    """Copy [P, ...] into the padded [P', ...]: what is padding repeats the last."""
    stacked[: len(held)] = held
    stacked[len(held) :] = held[-1]


def _loss_slices(specs, labels, classes):
    """Return [(loss function, start, end)] over probes that are sorted by loss, each as the room is."""
    most = max(MemoryBudget.of(labels.device).losses // (8 * specs[0].batch_size * classes), 1)
    functions = {loss: LossFunction(loss, labels, classes) for loss in {spec.loss for spec in specs}}
    slices = []
    for number, spec in enumerate(specs):
        function = functions[spec.loss]
        if slices and slices[-1][0] is function and number - slices[-1][1] < most:
            slices[-1] = (function, slices[-1][1], number + 1)
        else:
            slices.append((function, number, number + 1))
    return slices


def _loss_and_gradient(logits, targets, slices, exact):
    """Return losses [P] and their gradient [B, P, C]: no probe sees another's logits. exact: compute in float64."""
    loss = logits.new_empty(logits.shape[1])
    # On a CPU, exp and log round otherwise in a vector than in the few elements left over, and which
    # those are depends on the neighbours. In float64 that difference is gone after the cast back.
    dtype = torch.float64 if exact else logits.dtype
    # Same strides as the logits whatever the mix of losses, so that sums over it take the same order.
    gradient = torch.empty_like(logits)
    for function, start, end in slices:
        loss[start:end], gradient[:, start:end] = function(logits[:, start:end].to(dtype), targets)
    return loss, gradient
