"""Optimisers over stacked parameters [P, ...]: PyTorch's update rules with a rate and decay per probe.

A gradient is a tensor of the parameter's size, or a pair (A [n, B], B [B, m]) that stands for A B:
that lets SGD add it into the momentum within the GEMM, without a pass over memory of its own.
"""

import torch


def _per_probe(values, parameter):
    """View [P] so that it multiplies [P, ...]."""
    return values.view(-1, *[1] * (parameter.ndim - 1))


def _dense(gradient, like):
    if isinstance(gradient, tuple):
        gradient = gradient[0] @ gradient[1]
    return gradient.view(like.shape)


class SGD:
    """torch.optim.SGD: v = momentum v + (g + decay w), w = w - rate v."""

    def __init__(self, parameters, specs, device):
        self.parameters = [p.detach() for p in parameters]
        self.momentum = specs[0].optimizer.momentum
        self.decay = torch.tensor([s.optimizer.weight_decay for s in specs], device=device)
        self.decays = any(s.optimizer.weight_decay for s in specs)
        self.velocities = [torch.zeros_like(p) for p in self.parameters]

    def step(self, gradients, rates):
        """Update all parameters in place. rates: float32 [P]."""
        for parameter, velocity, gradient in zip(self.parameters, self.velocities, gradients, strict=True):
            if isinstance(gradient, tuple):
                velocity.flatten(0, -2).addmm_(*gradient, beta=self.momentum)
            else:
                velocity.mul_(self.momentum).add_(gradient.view(velocity.shape))
            if self.decays:
                velocity.addcmul_(parameter, _per_probe(self.decay, parameter))
            parameter.addcmul_(velocity, _per_probe(rates, parameter), value=-1)


class Adam:
    """torch.optim.Adam with betas 0.9 and 0.999, eps 1e-8, and decay added to the gradient (Kingma & Ba, 2015)."""

    def __init__(self, parameters, specs, device):
        self.parameters = [p.detach() for p in parameters]
        self.decay = torch.tensor([s.optimizer.weight_decay for s in specs], device=device)
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    def step(self, gradients, rates):
        """Update all parameters in place. rates: float32 [P]."""
        self.steps += 1
        correction1, correction2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for parameter, first, second, gradient in zip(self.parameters, self.first, self.second, gradients, strict=True):
            gradient = _dense(gradient, parameter).addcmul(parameter, _per_probe(self.decay, parameter))
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scale = (second.sqrt() / correction2**0.5).add_(1e-8)
            parameter.sub_(_per_probe(rates, parameter) * (first / scale) / correction1)


OPTIMIZERS = {"sgd": SGD, "adam": Adam}
