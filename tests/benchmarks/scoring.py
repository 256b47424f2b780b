"""CPU seconds to score probes, with the interval of every metric.

    python tests/benchmarks/scoring.py

Multi-label: a plain loop over probes and classes with scikit-learn's average precision, without intervals, against
all nine metrics with theirs; then how the time grows with the images. Single-label: 1,000, 10,000 and 21,000 classes,
beside one pass over the logits for the logarithm of the sum of exp in float64, which is the floor of nll.
"""

import argparse
import platform
import time

import torch
from sklearn.metrics import average_precision_score

from featcache.probes.scores.tally import Tally

CHUNK = 1024


def timed(run):
    """Return (what run() returns, CPU seconds)."""
    started = time.process_time()
    result = run()
    return result, time.process_time() - started


def drawn(probes, images, classes):
    """Yield chunks of random logits [P, n, C], in memory class by class, as predictions are."""
    generator = torch.Generator().manual_seed(0)
    for rows in torch.arange(images).split(CHUNK):
        yield torch.randn(probes, classes, len(rows), generator=generator).transpose(1, 2)


def gathered(probes, images, classes, labels):
    """A tally of random logits, CPU seconds to add them without drawing them, and those of the floor."""
    tally, seconds, floor = Tally(labels, classes, [labels.ndim == 1] * probes), 0.0, 0.0
    for logits in drawn(probes, images, classes):
        seconds += timed(lambda part=logits: tally.add(part))[1]
        if labels.ndim == 1:
            floor += timed(lambda part=logits: [p.t().double().logsumexp(0) for p in part])[1]
    return tally, seconds, floor


def multi_label(probes, images, classes=20):
    """(A tally, labels, CPU seconds to make the tally and score it)."""
    labels = (torch.rand(images, classes, generator=torch.Generator().manual_seed(1)) < 0.06).to(torch.int8)
    tally, add, _ = gathered(probes, images, classes, labels)
    return tally, labels, add + timed(tally.estimates)[1]


def main():
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--plain", type=int, default=4, help="probes that the plain way scores")
    parser.add_argument("--rows", type=int, default=4096, help="images with thousands of classes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}\n")
    tally, labels, _ = multi_label(arguments.plain, 4952)
    logits, truth = torch.cat(list(drawn(arguments.plain, *labels.shape)), dim=1).numpy(), labels.numpy()
    expected, plain = timed(
        lambda: [[average_precision_score(truth[:, c], each[:, c]) for c in range(each.shape[1])] for each in logits]
    )
    torch.testing.assert_close(tally.by_class()["map"], torch.tensor(expected, dtype=torch.float64))
    print(f"scikit-learn, average precision alone, 4952 images: {1000 * plain / arguments.plain:.0f} ms a probe\n")
    print(
        "| images | 20 classes, nine metrics with intervals, ms a probe | microseconds an image |\n| --- | --- | --- |"
    )
    for images in (1000, 4952, 12_500, 50_000, 100_000):
        probes = arguments.probes * (64 if images == 1000 else 1)
        seconds = multi_label(probes, images)[2] / probes
        print(f"| {images} | {1000 * seconds:.1f} | {1e6 * seconds / images:.2f} |")
    print("\n| classes | from logits, ns a logit | floor, ns a logit | ratio | scores and intervals, ms a probe |")
    print("| --- | --- | --- | --- | --- |")
    for classes in (1000, 10_000, 21_000):
        labels = torch.randint(classes, (arguments.rows,), generator=torch.Generator().manual_seed(1))
        tally, add, floor = gathered(2, arguments.rows, classes, labels)
        _, seconds = timed(tally.estimates)
        add, floor = (1e9 * s / (2 * arguments.rows * classes) for s in (add, floor))
        print(f"| {classes} | {add:.2f} | {floor:.2f} | {add / floor:.1f} | {500 * seconds:.1f} |")


if __name__ == "__main__":
    main()
