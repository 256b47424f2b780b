"""Learning-rate schedules, as factors of a probe's own rate."""

import math

import torch

from featcache.probes.spec import PER


def factors(schedule, epochs, steps, epoch):
    """Return the factors of one epoch's steps, float64 [steps].

    step: gamma to the power of the milestones passed, or of the times that `every` epochs went by; a
    milestone below 1 is that fraction of the run, rounded to an epoch unless `per` is step.
    cosine: final + (1 - final) (1 + cos(pi t)) / 2 with t the share of the run gone by since the warm-up
    (Loshchilov & Hutter, ICLR 2017, without restarts). Epochs count from the start of the run, warm-up included.
    Warm-up: with W steps, step i < W has the factor start + (1 - start) i / (W - 1) of what it would have
    (mmengine's LinearLR; torch's with total_iters W - 1); start is warmup_start, or 1 / W.
    """
    step = epoch * steps + torch.arange(steps, dtype=torch.float64)
    per_epoch = (schedule.per or PER[schedule.type]) == "epoch"
    now = torch.full_like(step, epoch) if per_epoch else step / steps
    if schedule.type == "step":
        factor = schedule.gamma ** _passed(schedule, epochs, now, per_epoch)
    elif schedule.type == "cosine":
        last = max(epochs - schedule.warmup_epochs, 1 if per_epoch else 1 / steps)
        share = ((now - schedule.warmup_epochs) / last).clamp(0, 1)
        factor = schedule.final + (1 - schedule.final) * (1 + torch.cos(math.pi * share)) / 2
    else:
        factor = torch.ones_like(step)
    return factor * _warmup(schedule, step, steps) if schedule.warmup_epochs else factor


def _passed(schedule, epochs, now, per_epoch):
    """How many steps down were made by each time of `now`, in epochs."""
    if schedule.every:
        return (now / schedule.every).floor()
    points = [m * epochs if m < 1 else m for m in schedule.milestones]
    # The time is a quotient and a fraction of the run a product: both are off by their rounding.
    return sum((now >= (round(point) if per_epoch else point - 1e-9)).double() for point in points)


def _warmup(schedule, step, steps):
    length = schedule.warmup_epochs * steps
    start = schedule.warmup_start or 1 / length
    return (start + (1 - start) * step / max(length - 1, 1e-9)).clamp(max=1) if length > 1 else torch.ones_like(step)
