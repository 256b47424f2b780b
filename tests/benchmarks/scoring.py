"""Seconds to score probes with bootstrap intervals: featcache's tally against the plain way.

    python tests/benchmarks/scoring.py

mAP of probes on as many images and classes as VOC2007's test split has, each with its interval from
200 resamples. The plain way goes class by class and probe by probe over cumulative sums of the
sorted weights; it is also what the fast way must equal. Then all other metrics, and ImageNet's size.
"""

import argparse
import platform
import time

import torch

from featcache.probes.scores.bootstrap import resamples
from featcache.probes.scores.metrics import TASK_METRICS
from featcache.probes.scores.tally import MultiLabelTally, SingleLabelTally

CHUNK = 1024


def plain_map(logits, labels, weights):
    """mAP in every resample, [P, R], from cumulative sums of weights in order of the scores."""
    result = torch.empty(len(logits), labels.shape[1], weights.shape[1], dtype=torch.float64)
    weights = weights.double().t().contiguous()
    for p, scores in enumerate(logits):
        for c in range(labels.shape[1]):
            order = scores[:, c].argsort(descending=True)
            counts = weights[:, order]  # [R, N]
            hits = counts * (labels[order, c] == 1)
            # Equal scores are one threshold: its precision is that at the last of them.
            falling = -scores[order, c]
            ends = torch.searchsorted(falling, falling, right=True) - 1
            precision = (hits.cumsum(1) / counts.cumsum(1).clamp(min=1))[:, ends]
            result[p, c] = (hits * precision).sum(1) / hits.sum(1)
    return result.mean(1)


def timed(run):
    """Return (what run() returns, seconds)."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def gathered(kind, probes, images, classes, labels, seed=0):
    """A tally of random logits that favour the truth, and seconds to add them without drawing them."""
    generator = torch.Generator().manual_seed(seed)
    tally, seconds = kind(labels, classes, ["ce" if p % 2 else "bce" for p in range(probes)]), 0.0
    for rows in torch.arange(images).split(CHUNK):
        logits = torch.randn(probes, len(rows), classes, generator=generator)
        seconds += timed(lambda part=logits: tally.add(part))[1]
    return tally, seconds


def main():
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--plain", type=int, default=4, help="probes that the plain way scores")
    parser.add_argument("--large", type=int, default=8, help="probes of ImageNet's size")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    images, classes = 4952, 20
    labels = (torch.rand(images, classes, generator=torch.Generator().manual_seed(1)) < 0.075).to(torch.int8)
    tally, add = gathered(MultiLabelTally, arguments.probes, images, classes, labels)
    weights = resamples(images)
    expected, plain = timed(lambda: plain_map(tally._logits[: arguments.plain], labels, weights))
    tables, fast = timed(lambda: tally.average_precisions(weights))
    torch.testing.assert_close(tables[: arguments.plain, :, 1:].mean(1), expected, rtol=1e-6, atol=0)
    _, everything = timed(lambda: tally.scores(weights))
    plain, fast, everything = plain / arguments.plain, fast / arguments.probes, (add + everything) / arguments.probes
    print(f"{images} images, {classes} classes, {weights.shape[1]} resamples\n")
    print("| ms a probe | mAP, plain | mAP | ratio | all nine metrics |\n| --- | --- | --- | --- | --- |")
    print(f"| | {1000 * plain:.0f} | {1000 * fast:.1f} | {plain / fast:.0f}x | {1000 * everything:.1f} |\n")
    images, classes = 50_000, 1000
    labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(1))
    tally, add = gathered(SingleLabelTally, arguments.large, images, classes, labels)
    _, seconds = timed(lambda: tally.scores(resamples(images)))
    print(f"{images} images, {classes} classes: {', '.join(TASK_METRICS['single-label'])}\n")
    print("| s a probe | from logits, chunk by chunk | scores and intervals |\n| --- | --- | --- |")
    print(f"| | {add / arguments.large:.2f} | {seconds / arguments.large:.2f} |")


if __name__ == "__main__":
    main()
