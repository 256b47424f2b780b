"""Layers of many probes side by side, forward and backward in closed form.

Activations lie as [P, U, R]: probe, unit, row, where a row is a position of an image, and rows run image by
image. So the first layer is one product of all probes' weights with the features [D, R] that they share, no
layer transposes anything, and statistics run along memory. forward() keeps what backward() needs; backward()
returns the gradient of the input and leaves those of the parameters in `gradients`, a weight's as the pair
(A, B) that stands for A B. Both may overwrite what they are given.
"""

import math
import threading
import weakref

import torch

from featcache.probes.gemm import multiply
from featcache.probes.heads.bcos_modules import NORM_EPS, uncentred_scale

NORM_MOMENTUM = 0.1
aten = torch.ops.aten


class Memory:
    """Memory for activations and their gradients, by name: to have the system map it anew costs two passes over it.

    The stacks of a thread share one, for only one of them is between forward() and backward() at a time; it
    lives as long as they do.
    """

    _of_thread = threading.local()

    def __init__(self):
        self._held = {}
        self.turn = None

    @classmethod
    def shared(cls):
        """That of this thread."""
        there = getattr(cls._of_thread, "memory", lambda: None)() or cls()
        cls._of_thread.memory = weakref.ref(there)
        return there

    def tensor(self, name, shape, like):
        """An uninitialised tensor, which lies where that of the same name lay."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        if key not in self._held or self._held[key].numel() < size:
            # Not both at a time.
            self._held.pop(key, None)
            self._held[key] = like.new_empty(size)
        return self._held[key][:size].view(shape)


class Layer:
    """What all layers have: gradients of the last backward(), place and memory in the stack, precision of products,
    and the rows of an image.
    """

    gradients = ()
    place = memory = None
    precision = "float32"
    positions = 1

    def tensor(self, name, shape, like):
        """An uninitialised tensor of this layer's own."""
        return self.memory.tensor((self.place, name), shape, like)

    def dot(self, a, b, dim):
        """Inner products of [P, U, R] along an axis."""
        return torch.mul(a, b, out=self.tensor("dot", b.shape, b)).sum(dim)

    def products(self, weight, rows):
        """Apply weights [P, U, D] to rows [D, R] that all probes share, or [P, D, R]: [P, U, R]."""
        out = self.tensor("products", (*weight.shape[:2], rows.shape[-1]), rows)
        if rows.ndim == 2:
            multiply(weight.flatten(0, 1), rows, self.precision, out.flatten(0, 1))
        else:
            multiply(weight, rows, self.precision, out)
        return out

    def input_gradient(self, weight, gradient):
        """Take the gradient [P, U, R] back through products(): [P, D, R]."""
        out = self.tensor("input", (len(weight), weight.shape[2], gradient.shape[2]), gradient)
        return multiply(weight.transpose(1, 2), gradient, self.precision, out)


def weight_gradient(gradient, rows):
    """The gradient of products()'s weights as a pair of matrices."""
    if rows.ndim == 2:
        return gradient.flatten(0, 1), rows.t()
    return gradient, rows.transpose(1, 2)


class Linear(Layer):
    """y = W x + b. weight: [P, U, D]. bias: [P, U] or None."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def forward(self, rows, training):
        """Map [D, R] or [P, D, R] to [P, U, R]."""
        self.rows = rows
        out = self.products(self.weight, rows)
        return out if self.bias is None else out.add_(self.bias.unsqueeze(2))

    def backward(self, gradient):
        """Return the gradient [P, D, R] of the input, or None if the probes share it."""
        self.gradients = [weight_gradient(gradient, self.rows)]
        if self.bias is not None:
            self.gradients.append(gradient.sum(2))
        return None if self.rows.ndim == 2 else self.input_gradient(self.weight, gradient)


class BatchNorm(Layer):
    """torch.nn.BatchNorm with P U channels: y = weight (x - mean) / sqrt(variance + 1e-5) + bias, all [P, U].

    Written out, for torch's own takes several times as long on a CPU. One row alone has no variance: it is
    normalised by the running statistics and leaves them alone, where torch gives up.
    """

    follows = True

    def __init__(self, weight, bias, running_mean, running_var):
        self.weight, self.bias, self.running_mean, self.running_var = weight, bias, running_mean, running_var

    def forward(self, rows, training):
        """Map [P, U, R] to the same shape; if training by these rows' statistics, which move the running ones."""
        mean, variance, count = self.running_mean, self.running_var, rows.shape[2]
        self.moves = training and count > 1
        if self.moves:
            mean = rows.mean(2)
        self.centred = rows.sub_(mean.unsqueeze(2))
        if self.moves:
            variance = _mean_square(self.centred)
        if self.moves and self.follows:
            self.running_mean.lerp_(mean, NORM_MOMENTUM)
            self.running_var.lerp_(variance * (count / (count - 1)), NORM_MOMENTUM)
        self.spread = variance + NORM_EPS
        self.scale = self.weight / self.spread.sqrt()
        out = self.tensor("out", rows.shape, rows)
        return torch.addcmul(self.bias.unsqueeze(2), self.centred, self.scale.unsqueeze(2), out=out)

    def backward(self, gradient):
        """Return the gradient of the input, [P, U, R]: scale (g - mean(g) - x mean(g x) / spread), x centred."""
        total, agreement = gradient.sum(2), self.dot(gradient, self.centred, 2)
        self.gradients = [agreement / self.spread.sqrt(), total]
        if not self.moves:
            return gradient.mul_(self.scale.unsqueeze(2))
        shift = -self.scale * total / gradient.shape[2]
        pull = -self.scale * agreement / (self.spread * gradient.shape[2])
        torch.addcmul(shift.unsqueeze(2), gradient, self.scale.unsqueeze(2), out=gradient)
        return gradient.addcmul_(self.centred, pull.unsqueeze(2))


class UncentredBatchNorm(Layer):
    """y = weight x / sqrt(variance + 1e-5): batch norm that leaves the mean, the bcos package's without bias.

    One row alone is normalised by the running variance, as in BatchNorm.
    """

    follows = True

    def __init__(self, weight, running_var):
        self.weight, self.running_var = weight, running_var

    def forward(self, rows, training):
        """Map [P, U, R] to the same shape; by the variance of these rows, which moves the running one, if training."""
        out, variance = self.tensor("out", rows.shape, rows), self.running_var
        self.rows, self.moves = rows, training and rows.shape[2] > 1
        if self.moves:
            self.mean = rows.mean(2)
            variance = _mean_square(torch.sub(rows, self.mean.unsqueeze(2), out=out))
            if self.follows:
                self.running_var.lerp_(variance, NORM_MOMENTUM)
        self.spread = variance + NORM_EPS
        return torch.mul(rows, uncentred_scale(self.weight, variance).unsqueeze(2), out=out)

    def backward(self, gradient):
        """Return the gradient of the input, [P, U, R]: scale g - scale (x - mean) mean(g x) / spread."""
        agreement, scale = self.dot(gradient, self.rows, 2), self.weight / self.spread.sqrt()
        self.gradients = [agreement / self.spread.sqrt()]
        if not self.moves:
            return gradient.mul_(scale.unsqueeze(2))
        pull = -scale * agreement / (self.spread * gradient.shape[2])
        torch.addcmul((-pull * self.mean).unsqueeze(2), gradient, scale.unsqueeze(2), out=gradient)
        return gradient.addcmul_(self.rows, pull.unsqueeze(2))


class GhostNorm(Layer):
    """A batch norm that sees `images` of a mini-batch at a time (Hoffer et al., NeurIPS 2017), the last ones fewer.

    That is what GPUs with so many images each do without SyncBN. The first's statistics alone move the running ones,
    for it is its process that saves them.

    norm: BatchNorm or UncentredBatchNorm. weights: of it.
    """

    def __init__(self, norm, weights, images):
        self.norm, self.weights, self.images, self.parts = norm, weights, images, []

    def forward(self, rows, training):
        """Map [P, U, R] to the same shape."""
        pieces = rows.split(self.images * self.positions, dim=2) if training else [rows]
        self.parts = [self.norm(*self.weights) for _ in pieces]
        out = self.tensor("whole", rows.shape, rows)
        for number, (part, piece, into) in enumerate(
            zip(self.parts, pieces, out.split(pieces[0].shape[2], dim=2), strict=True)
        ):
            part.place, part.memory, part.follows = (self.place, number), self.memory, not number
            into.copy_(part.forward(piece, training))
        return out

    def backward(self, gradient):
        """Return the gradient of the input, [P, U, R], which takes the place of the output's."""
        for part, piece in zip(self.parts, gradient.split(self.images * self.positions, dim=2), strict=True):
            # The layers write it there themselves.
            part.backward(piece)
        self.gradients = [sum(parts) for parts in zip(*(part.gradients for part in self.parts), strict=True)]
        return gradient


def _mean_square(centred):
    """The mean of squares along rows, in one pass, where torch's var is many times slower on a CPU."""
    return torch.linalg.vector_norm(centred, dim=2).square_().div_(centred.shape[2])


class ReLU(Layer):
    """max(x, 0)."""

    def forward(self, rows, training):
        """Map [P, U, R] to the same shape, in place."""
        self.out = rows.relu_()
        return self.out

    def backward(self, gradient):
        """Return the gradient of the input, [P, U, R]; from that of the output, or [P, U, B, S] after Mean."""
        into, out = self.out_of(gradient), self.out.view(gradient.shape)
        return aten.threshold_backward.grad_input(gradient, out, 0, grad_input=into).view(self.out.shape)

    def out_of(self, gradient):
        """Where to write a gradient element by element: in its place, unless one number stands for many there."""
        return gradient if gradient.is_contiguous() else self.tensor("gradient", gradient.shape, gradient)


class GELU(ReLU):
    """x Phi(x), the exact form with erf (Hendrycks & Gimpel, 2016)."""

    def forward(self, rows, training):
        """Map [P, U, R] to the same shape."""
        self.rows = rows
        return aten.gelu.out(rows, out=self.tensor("out", rows.shape, rows))

    def backward(self, gradient):
        """Return the gradient of the input, as ReLU's."""
        into, rows = self.out_of(gradient), self.rows.view(gradient.shape)
        return aten.gelu_backward.grad_input(gradient, rows, grad_input=into).view(self.rows.shape)


class Mean(Layer):
    """The mean over the S positions of each image: rows [P, U, B S] to [P, U, B]."""

    def forward(self, rows, training):
        """Map [P, U, B S] to [P, U, B]."""
        return rows.unflatten(2, (-1, self.positions)).mean(3)

    def backward(self, gradient):
        """Return the gradient of the input as [P, U, B, S], a view that repeats one number over the positions."""
        return (gradient / self.positions).unsqueeze(3).expand(*gradient.shape, self.positions)
