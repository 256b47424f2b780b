"""Optimisers over stacked parameters [P, ...]: published update rules, with their numbers per probe.

A gradient is a tensor of the parameter's size, which step() may overwrite, or a pair of matrices (A, B), or of P
matrices each, that stands for A B: that lets SGD add it into the momentum within the GEMM, without a pass over memory
of its own.
"""

import math
from dataclasses import replace

import torch

from featcache.probes.gemm import accumulate, multiply
from featcache.probes.heads.layers import Memory


def common(optimizer):
    """What of a spec's optimizer the probes of one stack share; the rest may differ."""
    return replace(optimizer, lr=0.0, lr_base=0, momentum=0.0, weight_decay=0.0, clip=0.0, trust=0.0)


class _Rule:
    """Parameters, and the numbers of their probes. What moves is in lists of tensors [P, ...], and in `steps`."""

    def __init__(self, parameters, specs, device):
        self.parameters = [p.detach() for p in parameters]
        self.decay = self._numbers(specs, "weight_decay", device)
        self.clip = self._numbers(specs, "clip", device)
        self.precision = specs[0].precision
        self.memory = Memory.shared()
        self.steps = 0

    @staticmethod
    def _numbers(specs, name, device):
        """A field of the optimizers as float32 [P], or None if all are 0."""
        values = [getattr(s.optimizer, name) for s in specs]
        return torch.tensor(values, device=device) if any(values) else None

    def _zeros(self):
        return [torch.zeros_like(p) for p in self.parameters]

    def step(self, gradients, rates):
        """Update all parameters in place. rates: float32 [P]."""
        self.steps += 1
        if self.clip is not None:
            gradients = self._clipped(gradients)
        for number, gradient in enumerate(gradients):
            self._update(number, self.parameters[number], gradient, rates)

    def _clipped(self, gradients):
        """Scale each probe's gradient to a norm of at most `clip`, as torch's clip_grad_norm_ would it alone."""
        gradients = [self._dense(n, g) for n, g in enumerate(gradients)]
        norm = torch.stack([_norms(g) for g in gradients]).norm(dim=0)  # [P]
        limit = torch.where(self.clip > 0, self.clip, torch.inf)
        factor = (limit / (norm + 1e-6)).clamp(max=1)
        return [g.mul_(_per_probe(factor, g)) for g in gradients]

    def _dense(self, number, gradient):
        """A gradient as one tensor of its parameter's shape."""
        parameter = self.parameters[number]
        if isinstance(gradient, tuple):
            shape = (*gradient[0].shape[:-1], gradient[1].shape[-1])
            out = self.memory.tensor(("gradient", number), shape, parameter)
            gradient = multiply(*gradient, self.precision, out)
        return gradient.view(parameter.shape)

    def _decayed(self, number, gradient):
        """The dense gradient with weight decay added."""
        gradient, parameter = self._dense(number, gradient), self.parameters[number]
        return gradient if self.decay is None else gradient.addcmul_(parameter, _per_probe(self.decay, parameter))


class SGD(_Rule):
    """torch.optim.SGD: v = momentum v + (g + decay w), w = w - rate v; Nesterov: rate (g + decay w + momentum v)."""

    def __init__(self, parameters, specs, device):
        super().__init__(parameters, specs, device)
        self.velocities = self._zeros()
        self.momenta = torch.tensor([s.optimizer.momentum for s in specs], device=device)
        first = specs[0].optimizer
        # Within the GEMM if it is one number, as a rule it is.
        self.momentum = first.momentum if all(s.optimizer.momentum == first.momentum for s in specs) else None
        self.nesterov = first.nesterov

    def _update(self, number, parameter, gradient, rates):
        velocity = self.velocities[number]
        if self.nesterov:
            gradient = self._decayed(number, gradient)
        self._accumulate(velocity, gradient)
        if self.nesterov:
            velocity = torch.addcmul(gradient, velocity, _per_probe(self.momenta, velocity))
        elif self.decay is not None:
            velocity.addcmul_(parameter, _per_probe(self.decay, parameter))
        parameter.addcmul_(velocity, _per_probe(rates, parameter), value=-1)

    def _accumulate(self, velocity, gradient):
        momentum = self.momentum
        if momentum is None:
            velocity.mul_(_per_probe(self.momenta, velocity))
            momentum = 1.0
        if not isinstance(gradient, tuple):
            velocity.mul_(momentum).add_(gradient.view(velocity.shape))
        elif gradient[0].ndim == 2:
            accumulate(velocity.flatten(0, -2), *gradient, momentum, self.precision)
        else:
            accumulate(velocity, *gradient, momentum, self.precision)


class LARS(SGD):
    """Layer-wise adaptive rates (You, Gitman & Ginsburg, 2017, algorithm 1), for each weight matrix of each probe:

    a = trust |w| / (|g| + decay |w|), v = momentum v + rate a (g + decay w), w = w - v; a = 1 where it is 0 or
    undefined. Biases, norms and the attentive query, vectors all, are neither decayed nor adapted, as in BYOL.
    """

    def __init__(self, parameters, specs, device):
        super().__init__(parameters, specs, device)
        self.trust = torch.tensor([s.optimizer.trust for s in specs], device=device)

    def _update(self, number, parameter, gradient, rates):
        gradient = self._dense(number, gradient)
        scale = rates
        if parameter.ndim == 3:
            weight, slope = _norms(parameter), _norms(gradient)
            if self.decay is not None:
                gradient = self._decayed(number, gradient)
                slope = slope + self.decay * weight
            adapted = self.trust * weight / slope
            scale = rates * torch.where((weight > 0) & (slope > 0), adapted, 1.0)
        velocity = self.velocities[number]
        velocity.mul_(_per_probe(self.momenta, velocity)).addcmul_(gradient, _per_probe(scale, velocity))
        parameter.sub_(velocity)


class Adam(_Rule):
    """torch.optim.Adam with betas 0.9 and 0.999, eps 1e-8, and decay added to the gradient (Kingma & Ba, 2015)."""

    def __init__(self, parameters, specs, device):
        super().__init__(parameters, specs, device)
        self.first, self.second = self._zeros(), self._zeros()

    def _update(self, number, parameter, gradient, rates):
        self._move(number, parameter, self._decayed(number, gradient), rates)

    def _move(self, number, parameter, gradient, rates):
        first, second = self.first[number], self.second[number]
        correction1, correction2 = 1 - 0.9**self.steps, math.sqrt(1 - 0.999**self.steps)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        # w - rate (m / c1) / (sqrt(s) / c2 + eps), with the numbers of each probe put into what divides: each pass
        # over memory costs as much as the next. The gradient's memory is free by now; a rate may be 0.
        steep = correction1 / rates.clamp(min=1e-30)
        root = torch.sqrt(second, out=gradient)
        root = torch.addcmul(_per_probe(1e-8 * steep, root), root, _per_probe(steep / correction2, root), out=root)
        parameter.addcdiv_(first, root, value=-1)


class AdamW(Adam):
    """torch.optim.AdamW: Adam, with w = (1 - rate decay) w beforehand (Loshchilov & Hutter, ICLR 2019)."""

    def _update(self, number, parameter, gradient, rates):
        if self.decay is not None:
            parameter.mul_(_per_probe(1 - rates * self.decay, parameter))
        self._move(number, parameter, self._dense(number, gradient), rates)


def _per_probe(values, parameter):
    """View [P] so that it multiplies [P, ...]."""
    return values.view(-1, *[1] * (parameter.ndim - 1))


def _norms(tensor):
    """Norm of each probe's part of [P, ...]."""
    return tensor.flatten(1).norm(dim=1)


OPTIMIZERS = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "lars": LARS}
