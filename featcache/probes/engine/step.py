"""One step of training: gradients by the losses, and the update of the weights.

On a GPU it is captured as a CUDA graph where its kinds allow that, so that it runs at once instead of as a hundred kernels
launched one by one.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from featcache.probes.engine.stack_loss import StackLoss
from featcache.probes.heads.head import Stack
from featcache.probes.solvers.solver import Rule
from featcache.probes.spec import ProbeSpec

# From features [B, ...], targets [B, ...] and rates [P] to losses [P]; it updates the weights in place. The losses may be
# overwritten by the next step.
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_step(spec: ProbeSpec, stack: Stack, loss: StackLoss, rule: Rule, capturable: bool) -> Step:
    """Return the step of a block. spec: of any of its probes. capturable: whether can_capture() holds for all."""
    step = EagerStep(spec.precision, stack, loss, rule)
    return CapturedStep(step) if capturable else step


def can_capture(spec: ProbeSpec, device: torch.device) -> bool:
    """Return whether a step does the same work on the same memory every time, as its kinds promise (Part.capturable)."""
    return device.type == "cuda" and spec.head.capturable and spec.loss.capturable and spec.optimizer.capturable


class EagerStep:
    """A step that launches its kernels one by one."""

    def __init__(self, precision: str, stack: Stack, loss: StackLoss, rule: Rule):
        self.precision, self.stack, self.loss, self.rule = precision, stack, loss, rule

    def __call__(self, features: Tensor, targets: Tensor, rates: Tensor) -> Tensor:
        """See Step."""
        logits = self.stack.forward(features, training=True)  # [B, P, C]
        exact = logits.device.type == "cpu" and self.precision == "float32"
        losses, gradient = self.loss(logits.detach(), targets, exact)
        self.rule.step(self.stack.backward(features, logits, gradient), rates)
        return losses


class CapturedStep:
    """A step that is captured for mini-batches of the shape that comes first.

    Its first calls run the step itself, because libraries load kernels and allocate memory when they first meet a
    shape, which a capture forbids. Then it is captured, and called by copying the arguments to where the graph reads
    them. Mini-batches of another shape, such as the last of an epoch, always run the step itself.
    """

    WARM_UP = 2

    def __init__(self, step: Step):
        self._step, self._calls = step, 0
        self._shape: torch.Size | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._losses = torch.empty(0)

    def __call__(self, features: Tensor, targets: Tensor, rates: Tensor) -> Tensor:
        """See Step."""
        self._shape = self._shape or features.shape
        if features.shape != self._shape:
            return self._step(features, targets, rates)
        self._calls += 1
        if self._calls <= self.WARM_UP:
            return self._step(features, targets, rates)
        graph = self._graph or self._captured(features, targets, rates)
        for kept, value in zip(self._inputs, (features, targets, rates), strict=True):
            kept.copy_(value)
        graph.replay()
        return self._losses

    def _captured(self, *arguments: Tensor) -> torch.cuda.CUDAGraph:
        """Record the step on copies of the arguments; recording runs nothing."""
        self._inputs = tuple(argument.clone() for argument in arguments)
        self._graph = torch.cuda.CUDAGraph()
        # The garbage collector might free another graph, which invalidates a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Other threads read the next features meanwhile, and may allocate memory for them.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._losses = self._step(*self._inputs)
        finally:
            if collects:
                gc.enable()
        return self._graph
