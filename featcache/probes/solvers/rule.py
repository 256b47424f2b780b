"""What the update rules of mini-batch solvers share.

A gradient is a tensor of the parameter's size, which step() may overwrite, or a pair (A, B) that stands for A B: two
matrices, or two stacks of P matrices. A pair lets SGD add the product to the momentum within the GEMM, without another
pass over memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from featcache.probes.gemm import multiply
from featcache.probes.heads.head import Gradient
from featcache.probes.heads.stacked_layers import Memory
from featcache.probes.solvers.solver import MiniBatchSolver


class UpdateRule:
    """Base of update rules over parameters [P, ...], with the decay and clip of each of the P probes. See Rule."""

    def __init__(
        self, parameters: list[Tensor], solvers: Sequence[MiniBatchSolver], precision: str, device: torch.device
    ):
        self.parameters = [p.detach() for p in parameters]
        self.decay = _numbers([s.weight_decay for s in solvers], device)
        self.clip = _numbers([s.clip for s in solvers], device)
        self.precision = precision
        # On a GPU, whose allocator keeps memory anyway, a captured step relies on memory that no other block uses.
        self.memory = Memory.shared() if device.type == "cpu" else Memory()
        self.steps = 0
        # Numbers of the parameters that weight decay leaves alone.
        self.undecayed: frozenset[int] = frozenset()

    def zeros(self) -> list[Tensor]:
        """Return a tensor of zeros for each parameter."""
        return [torch.zeros_like(p) for p in self.parameters]

    def state(self) -> dict[str, list[Tensor]]:
        """See Rule.state."""
        raise NotImplementedError

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        """Update one parameter in place."""
        raise NotImplementedError

    def advance(self) -> None:
        """See Rule.advance."""
        self.steps += 1

    def step(self, gradients: list[Gradient], rates: Tensor) -> None:
        """See Rule.step."""
        if self.clip is not None:
            gradients = self._clipped(gradients, self.clip)
        for number, gradient in enumerate(gradients):
            self.update(number, self.parameters[number], gradient, rates)

    def _clipped(self, gradients: list[Gradient], clip: Tensor) -> list[Gradient]:
        """Scale each probe's gradient to a norm of at most clip [P], as torch's clip_grad_norm_ does for one probe."""
        dense = [self.dense(n, g) for n, g in enumerate(gradients)]
        norm = torch.stack([norms(g) for g in dense]).norm(dim=0)  # [P]
        limit = torch.where(clip > 0, clip, torch.inf)
        factor = (limit / (norm + 1e-6)).clamp(max=1)
        return [g.mul_(per_probe(factor, g)) for g in dense]

    def dense(self, number: int, gradient: Gradient) -> Tensor:
        """Return a gradient as one tensor of its parameter's shape."""
        parameter = self.parameters[number]
        if not isinstance(gradient, tuple):
            return gradient.view(parameter.shape)
        left, right = gradient
        out = self.memory.tensor(("gradient", number), (*left.shape[:-1], right.shape[-1]), parameter)
        return multiply(left, right, self.precision, out).view(parameter.shape)

    def decay_of(self, number: int) -> Tensor | None:
        """Return each probe's weight decay of a parameter, [P], or None if there is none."""
        return None if number in self.undecayed else self.decay

    def decayed(self, number: int, gradient: Gradient) -> Tensor:
        """Return the dense gradient with weight decay added."""
        dense, parameter, decay = self.dense(number, gradient), self.parameters[number], self.decay_of(number)
        return dense if decay is None else dense.addcmul_(parameter, per_probe(decay, parameter))


def _numbers(values: list[float], device: torch.device) -> Tensor | None:
    """Return a number of each probe as float32 [P], or None if all are 0."""
    return torch.tensor(values, device=device) if any(values) else None


def per_probe(values: Tensor, parameter: Tensor) -> Tensor:
    """View values [P] so that they broadcast over [P, ...]."""
    return values.view(-1, *[1] * (parameter.ndim - 1))


def norms(tensor: Tensor) -> Tensor:
    """Return the norm of each probe's part of [P, ...]."""
    return tensor.flatten(1).norm(dim=1)
