"""Support vector machines of one layer, `svm` in a grid, against scikit-learn's LinearSVC fit by fit.

    python tests/benchmarks/svm.py [--images 5011] [--width 2048] [--classes 20] [--reference 2]

Both choose the cost of each class among the 19 of VOC07 in three folds, and train again on all images. LinearSVC has
the settings of OpenMixup; it is run for the first `reference` classes, and its time multiplied. Seconds are those of all
cores together, which is what as many processes of LinearSVC as there are cores would take. The machines that are kept are then compared with LinearSVC at a tolerance of 1e-8: decision values relative to the largest, and average
precision on the images that they were trained on and on as many others.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from full_batch import data
from sklearn.metrics import average_precision_score

from featcache.probes.solvers.liblinear import Liblinear
from featcache.probes.solvers.machines import decisions
from featcache.probes.solvers.svm import Svm
from featcache.probes.spec import ProbeSpec

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from parts import Head, Loss

EXACT, STEPS = 1e-8, 1_000_000


def fitted(engine, features, labels):
    """(seconds of all cores together, Fit) of one probe."""
    classes = labels.shape[1]
    spec = ProbeSpec("x", "l:pooled", Head("linear", norm="l2", pool="before"), Loss("squared_hinge", positive_weight=2.0),
                     Svm(engine=engine), epochs=None, views=0)  # fmt: skip
    started = time.process_time()
    (fit,) = spec.optimizer.fit([spec], features, labels, classes)
    return time.process_time() - started, fit


def main(images, width, classes, reference):
    """Train both, and print times, their ratio, and how far the results are apart."""
    features, labels, _ = data(2 * images, width, classes)
    train, others, labels, unseen = features[:images], features[images:], labels[:images], labels[images:]
    ours, fit = fitted("newton", train, labels)
    choice = fit.choice
    print(f"featcache: {ours:.1f} s for {classes} classes; objectives within {max(choice.excess):.1e} of their minimum")
    seconds, other = fitted("liblinear", train, labels[:, :reference])
    theirs = seconds * classes / reference
    print(
        f"LinearSVC: {seconds:.1f} s for {reference} classes, {theirs:.0f} s for all; {theirs / ours:.1f} times as long"
    )
    head = Head("linear", norm="l2", pool="before")
    rows, held = head.normalised(train.double()), head.normalised(others.double())
    machines = Liblinear(rows, True, EXACT)
    for c in range(reference):
        sign = torch.where(labels[:, c] > 0, 1, -1).to(torch.int8)[None]
        cost = torch.tensor([[choice.costs[choice.chosen[c]]]], dtype=torch.float64)
        everything = torch.ones(1, 1, images, dtype=torch.bool)
        exact = machines.solve(sign, cost, everything, 2.0, STEPS)[0][0, 0]
        mine = torch.cat([fit.weights["fc0.weight"][c], fit.weights["fc0.bias"][c : c + 1]]).double()[None]
        values = [decisions(machines, w, slice(None))[0] for w in (mine, exact)]
        away = float((values[0] - values[1]).abs().max() / values[1].abs().max())
        seen = [average_precision_score(labels[:, c] == 1, v) for v in values]
        new = [average_precision_score(unseen[:, c] == 1, held @ w[0, :-1]) for w in (mine, exact)]
        table = [abs(a - b) for a, b in zip(choice.ap[c], other.choice.ap[c], strict=True)]
        print(
            f"class {c}: cost {cost.item():.3g} (LinearSVC chose {other.choice.costs[other.choice.chosen[c]]:.3g}), decisions "
            f"within {away:.1e}, AP {abs(seen[0] - seen[1]):.1e} and {abs(new[0] - new[1]):.1e} away, in cross-validation "
            f"at most {max(table):.1e}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 5011), ("width", 2048), ("classes", 20), ("reference", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
