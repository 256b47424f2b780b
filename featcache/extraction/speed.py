"""How fast this machine decodes images and runs a backbone over them, measured on a few batches."""

import os
import time
from collections.abc import Sequence

import torch

from featcache.backbones.precision import running
from featcache.extraction.fill import Stretch
from featcache.extraction.images import Images, image_batches
from featcache.extraction.job import Job
from featcache.feature import Feature

# About how long each measurement takes.
SECONDS = 1.0
# Decoding is measured on so many images at most, which are spread over all that are to be read, in small batches.
MOST_IMAGES, BATCH = 2048, 8


def decode_speed(images: Images, todo: Sequence[Stretch], workers: int) -> tuple[float, torch.Tensor]:
    """Decode some of the images that are to be read; return how many come in a second, and pixels of a batch.

    todo: what is to be read. The pixels are uint8 [B, 3, S, S]. Raises BadInput for an image that cannot be read.
    """
    keys = _spread(todo)
    batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
    # The first batch of each worker takes as long as the worker needs to start.
    skipped = max(1, workers)
    skipped *= len(batches) > skipped
    decoded, started = 0, time.perf_counter()
    for number, (batch, _) in enumerate(image_batches(images, batches, workers), 1):
        pixels, now = batch, time.perf_counter()
        if number == skipped:
            started = now
        elif number > skipped:
            decoded += len(pixels)
            if now - started > SECONDS:
                break
    return decoded / (now - started), pixels


def _spread(todo: Sequence[Stretch]) -> list[tuple[str, int]]:
    """Return the keys of about MOST_IMAGES images at equal distances, or of all if there are fewer."""
    total = sum(map(len, todo))
    step = max(1, total // MOST_IMAGES)
    keys, before = list[tuple[str, int]](), 0
    for stretch in todo:
        keys += [(stretch.split, row) for row in range(stretch.first + -before % step, stretch.end, step)]
        before += len(stretch)
    return keys


def forward_speed(job: Job, features: Sequence[Feature], pixels: torch.Tensor) -> float:
    """Run a job's backbone over images; return how many it takes in a second, with all their masked variants.

    features: those that are computed. pixels: uint8 [B, 3, S, S], which are repeated to fill batches.
    """
    model, dtype = job.model.to(job.device), getattr(torch, job.settings.dtype)
    yielded = job.backbone_features(features)

    def run(count: int) -> float:
        batch = pixels[torch.arange(count) % len(pixels)]
        started = time.perf_counter()
        with running(job.settings.precision, job.device):
            results = model(model.preprocessing.normalise(batch.to(job.device)), yielded)
            # The copy waits for the device.
            for values in results.values():
                values.to(dtype).cpu()
        return time.perf_counter() - started

    run(1)
    count, spent, each = 1, run(1), 0.0
    # A forward takes a while however few images it has, so that small batches say little: larger ones are tried up to
    # the extraction's own, as long as the next is expected to take two measurements at most.
    while count < job.settings.batch_size and spent + each * 3 * count <= 2 * SECONDS:
        larger = min(4 * count, job.settings.batch_size)
        longer = run(larger)
        each = max(longer - spent, 0) / (larger - count)
        count, spent = larger, longer
    # The first run of a size allocates its memory: it counts only where it takes all the time that there is.
    times = int(spent >= SECONDS)
    spent *= times
    while spent < SECONDS:
        spent += run(count)
        times += 1
    variants = job.masking.number(model.preprocessing.size) if job.masking else 1
    return count * times / spent / variants


def together(decode: float, forward: float, workers: int, device: torch.device) -> float:
    """Return how many seconds a pass takes, given the seconds that its decoding and its forwards take alone.

    Without workers one follows the other. Else the longer counts; on a CPU both also share its cores, and no pass takes
    less than the CPU seconds of both over all cores.
    """
    if not workers:
        return decode + forward
    if device.type != "cpu":
        return max(decode, forward)
    cores = os.cpu_count() or 1
    busy = decode * min(workers, cores) + forward * min(torch.get_num_threads(), cores)
    return max(decode, forward, busy / cores)
