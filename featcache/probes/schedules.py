"""Learning-rate schedules, as factors of a probe's own rate."""

import math

import torch


def factors(schedule, epochs, steps, epoch):
    """Return the factors of one epoch's steps, float64 [steps].

    step: gamma to the power of the milestones passed, changed between epochs; a milestone below 1
    is that fraction of the run, rounded to an epoch. cosine: (1 + cos(pi t)) / 2 with t the share of
    all steps taken since the warm-up, changed every step (Loshchilov & Hutter, ICLR 2017, without
    restarts). Warm-up: the factor times (step + 1) / (warm-up steps) until it reaches 1.
    """
    step = epoch * steps + torch.arange(steps, dtype=torch.float64)
    warmup = schedule.warmup_epochs * steps
    if schedule.type == "step":
        passed = sum(epoch >= (round(m * epochs) if m < 1 else m) for m in schedule.milestones)
        factor = torch.full((steps,), schedule.gamma**passed, dtype=torch.float64)
    elif schedule.type == "cosine":
        share = ((step - warmup) / max(epochs * steps - warmup, 1)).clamp(0, 1)
        factor = (1 + torch.cos(math.pi * share)) / 2
    else:
        factor = torch.ones(steps, dtype=torch.float64)
    return factor * ((step + 1) / warmup).clamp(max=1) if warmup else factor
