"""Layers of many probes side by side, forward and backward in closed form.

Activations lie as [P, U, R]: probe, unit, row. A row is a position of an image, and rows run image by image. So the
first layer is one product of all probes' weights with the features [D, R] that they share, no layer transposes
anything, and statistics run along memory.
"""

import math
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from featcache.probes.gemm import multiply
from featcache.probes.heads.bcos_modules import NORM_EPS, uncentred_scale
from featcache.probes.heads.head import Gradient

NORM_MOMENTUM = 0.1
aten = torch.ops.aten


class Memory:
    """Reused memory for activations and gradients, by name: fresh memory from the system costs two passes over it.

    The stacks of a thread share one, because only one of them is between forward() and backward() at a time. It lives
    as long as they do. turn: a token of the stack whose forward() used it last.
    """

    _of_thread = threading.local()

    def __init__(self) -> None:
        self._held: dict[Hashable, Tensor] = {}
        self.turn: object = None

    @classmethod
    def shared(cls) -> "Memory":
        """Return the memory of this thread."""
        memory: Memory = getattr(cls._of_thread, "memory", lambda: None)() or cls()
        cls._of_thread.memory = weakref.ref(memory)
        return memory

    def tensor(self, name: Hashable, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor, in the place of the last one with that name, dtype and device."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        if key not in self._held or self._held[key].numel() < size:
            # Free the smaller one first, so that both are never held at once.
            self._held.pop(key, None)
            self._held[key] = like.new_empty(size)
        return self._held[key][:size].view(shape)


class Layer:
    """Base of all layers. Both passes may overwrite what they are given.

    gradients: of the parameters, set by backward(); a weight's as the pair (A, B) that stands for A B. The stack sets
    place (which layer this is), memory, precision (of the products) and positions (the rows of an image).
    """

    gradients: Sequence[Gradient] = ()
    place: Hashable
    memory: Memory
    precision: str = "float32"
    positions: int = 1

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map rows [P, D, R], or [D, R] if the probes share them, to the output; keep what backward() needs."""
        raise NotImplementedError

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Take the gradient of the output, and return that of the input, or None if the probes share the input."""
        raise NotImplementedError

    def tensor(self, name: Hashable, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor that no other layer uses."""
        return self.memory.tensor((self.place, name), shape, like)

    def dot(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        """Return inner products of [P, U, R] along an axis."""
        return torch.mul(a, b, out=self.tensor("dot", b.shape, b)).sum(dim)

    def products(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Apply weights [P, U, D] to rows [D, R] that all probes share, or [P, D, R]: [P, U, R]."""
        out = self.tensor("products", (*weight.shape[:2], rows.shape[-1]), rows)
        if rows.ndim == 2:
            multiply(weight.flatten(0, 1), rows, self.precision, out.flatten(0, 1))
        else:
            multiply(weight, rows, self.precision, out)
        return out

    def input_gradient(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Take the gradient [P, U, R] back through products(): [P, D, R]."""
        out = self.tensor("input", (len(weight), weight.shape[2], gradient.shape[2]), gradient)
        return multiply(weight.transpose(1, 2), gradient, self.precision, out)


def weight_gradient(gradient: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the weights of products() as a pair of matrices."""
    if rows.ndim == 2:
        return gradient.flatten(0, 1), rows.t()
    return gradient, rows.transpose(1, 2)


class LinearLayer(Layer):
    """y = W x + b. weight: [P, U, D]. bias: [P, U] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [D, R] or [P, D, R] to [P, U, R]."""
        self.rows = rows
        out = self.products(self.weight, rows)
        return out if self.bias is None else out.add_(self.bias.unsqueeze(2))

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient [P, D, R] of the input, or None if the probes share it."""
        weight = weight_gradient(gradient, self.rows)
        self.gradients = [weight] if self.bias is None else [weight, gradient.sum(2)]
        return None if self.rows.ndim == 2 else self.input_gradient(self.weight, gradient)


class Norm(Layer):
    """Base of batch norms. updates_running: whether the statistics of training move the running ones."""

    gradients: Sequence[Tensor] = ()
    updates_running = True


class BatchNorm(Norm):
    """torch.nn.BatchNorm with P U channels: y = weight (x - mean) / sqrt(variance + 1e-5) + bias, all [P, U].

    It is written out because torch's own takes several times as long on a CPU. A single row has no variance: it is
    normalised by the running statistics and does not move them, where torch raises an error.
    """

    def __init__(self, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor):
        self.weight, self.bias, self.running_mean, self.running_var = weight, bias, running_mean, running_var

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [P, U, R] to the same shape; in training by the statistics of these rows, which move the running ones."""
        mean, variance, count = self.running_mean, self.running_var, rows.shape[2]
        self.by_batch = training and count > 1
        if self.by_batch:
            mean = rows.mean(2)
        self.centred = rows.sub_(mean.unsqueeze(2))
        if self.by_batch:
            variance = _mean_square(self.centred)
        if self.by_batch and self.updates_running:
            self.running_mean.lerp_(mean, NORM_MOMENTUM)
            self.running_var.lerp_(variance * (count / (count - 1)), NORM_MOMENTUM)
        self.spread = variance + NORM_EPS
        self.scale = self.weight / self.spread.sqrt()
        out = self.tensor("out", rows.shape, rows)
        return torch.addcmul(self.bias.unsqueeze(2), self.centred, self.scale.unsqueeze(2), out=out)

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input, [P, U, R]: scale (g - mean(g) - x mean(g x) / spread), x centred."""
        total, agreement = gradient.sum(2), self.dot(gradient, self.centred, 2)
        self.gradients = [agreement / self.spread.sqrt(), total]
        if not self.by_batch:
            return gradient.mul_(self.scale.unsqueeze(2))
        shift = -self.scale * total / gradient.shape[2]
        pull = -self.scale * agreement / (self.spread * gradient.shape[2])
        torch.addcmul(shift.unsqueeze(2), gradient, self.scale.unsqueeze(2), out=gradient)
        return gradient.addcmul_(self.centred, pull.unsqueeze(2))


class UncentredBatchNorm(Norm):
    """y = weight x / sqrt(variance + 1e-5): batch norm that keeps the mean, as the bcos package's does, without bias.

    A single row is normalised by the running variance, as in BatchNorm.
    """

    def __init__(self, weight: Tensor, running_var: Tensor):
        self.weight, self.running_var = weight, running_var

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [P, U, R] to the same shape; in training by the variance of these rows, which moves the running one."""
        out, variance = self.tensor("out", rows.shape, rows), self.running_var
        self.rows, self.by_batch = rows, training and rows.shape[2] > 1
        if self.by_batch:
            self.mean = rows.mean(2)
            variance = _mean_square(torch.sub(rows, self.mean.unsqueeze(2), out=out))
            if self.updates_running:
                self.running_var.lerp_(variance, NORM_MOMENTUM)
        self.spread = variance + NORM_EPS
        return torch.mul(rows, uncentred_scale(self.weight, variance).unsqueeze(2), out=out)

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input, [P, U, R]: scale g - scale (x - mean) mean(g x) / spread."""
        agreement, scale = self.dot(gradient, self.rows, 2), self.weight / self.spread.sqrt()
        self.gradients = [agreement / self.spread.sqrt()]
        if not self.by_batch:
            return gradient.mul_(scale.unsqueeze(2))
        pull = -scale * agreement / (self.spread * gradient.shape[2])
        torch.addcmul((-pull * self.mean).unsqueeze(2), gradient, scale.unsqueeze(2), out=gradient)
        return gradient.addcmul_(self.rows, pull.unsqueeze(2))


class GhostNorm(Layer):
    """A batch norm that sees `images` of a mini-batch at a time (Hoffer et al., NeurIPS 2017), fewer in the last part.

    This is what several GPUs with so many images each do without SyncBN. Only the first part's statistics move the
    running ones, because the first process is the one that saves them.

    norm: BatchNorm or UncentredBatchNorm. weights: its arguments.
    """

    def __init__(self, norm: Callable[..., Norm], weights: Sequence[Tensor], images: int):
        self.norm, self.weights, self.images = norm, weights, images
        self.parts: list[Norm] = []

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [P, U, R] to the same shape."""
        pieces = rows.split(self.images * self.positions, dim=2) if training else (rows,)
        self.parts = [self.norm(*self.weights) for _ in pieces]
        out = self.tensor("whole", rows.shape, rows)
        for number, (part, piece, into) in enumerate(
            zip(self.parts, pieces, out.split(pieces[0].shape[2], dim=2), strict=True)
        ):
            part.place, part.memory, part.updates_running = (self.place, number), self.memory, number == 0
            into.copy_(part.forward(piece, training))
        return out

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input, [P, U, R], in the memory of the output's."""
        for part, piece in zip(self.parts, gradient.split(self.images * self.positions, dim=2), strict=True):
            # The norms write the gradient of their input in place.
            part.backward(piece)
        by_parameter = zip(*(part.gradients for part in self.parts), strict=True)
        self.gradients = [sum(parts, gradient.new_zeros(())) for parts in by_parameter]
        return gradient


def _mean_square(centred: Tensor) -> Tensor:
    """Return the mean of squares along rows, in one pass; torch's var is many times slower on a CPU."""
    return torch.linalg.vector_norm(centred, dim=2).square_().div_(centred.shape[2])


class ReLU(Layer):
    """max(x, 0)."""

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [P, U, R] to the same shape, in place."""
        self.out = rows.relu_()
        return self.out

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input, [P, U, R], from that of the output, which is [P, U, B, S] before a Mean."""
        into, out = self.out_of(gradient), self.out.view(gradient.shape)
        return aten.threshold_backward.grad_input(gradient, out, 0, grad_input=into).view(self.out.shape)

    def out_of(self, gradient: Tensor) -> Tensor:
        """Return where to write a gradient: over the output's, unless that is a view which repeats its numbers."""
        return gradient if gradient.is_contiguous() else self.tensor("gradient", gradient.shape, gradient)


class GELU(ReLU):
    """x Phi(x), the exact form with erf (Hendrycks & Gimpel, 2016)."""

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [P, U, R] to the same shape."""
        self.rows = rows
        return aten.gelu.out(rows, out=self.tensor("out", rows.shape, rows))

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input, as ReLU does."""
        into, rows = self.out_of(gradient), self.rows.view(gradient.shape)
        return aten.gelu_backward.grad_input(gradient, rows, grad_input=into).view(self.rows.shape)


class Mean(Layer):
    """The mean over the S positions of each image: rows [P, U, B S] to [P, U, B]."""

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [P, U, B S] to [P, U, B]."""
        return rows.unflatten(2, (-1, self.positions)).mean(3)

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input as [P, U, B, S], a view that repeats one number over the positions."""
        return (gradient / self.positions).unsqueeze(3).expand(*gradient.shape, self.positions)
