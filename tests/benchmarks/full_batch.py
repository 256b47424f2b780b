"""Full-batch linear probes, `lbfgs` in a grid, against scikit-learn: seconds and the objective that is reached.

    python tests/benchmarks/full_batch.py [--images 450] [--width 1280] [--classes 20] [--decays 13] [--loss bce]

Features are like those of a network: not negative, correlated, of a spectrum that falls with a power. scikit-learn
solves bce class by class and ce as one problem, one weight decay after the other, by its default, L-BFGS. Both have
all cores.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from featcache.probes.spec import ProbeSpec

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from parts import Head, Loss, Optimizer, Schedule


def data(images, width, classes, positive=0.07):
    """Features float32 [N, D], labels int8 [N, C] and int64 [N]."""
    random = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.8
    turn = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
    features = torch.relu(3 * (torch.randn(images, width, generator=random) * spectrum) @ turn + 0.1)
    scores = features @ torch.randn(width, classes, generator=random)
    scores = (scores - scores.mean(0)) / scores.std(0) + torch.randn(images, classes, generator=random)
    return features, (scores > scores.quantile(1 - positive, dim=0)).to(torch.int8), scores.argmax(1)


def objective(loss, decay, weight, bias, features, labels):
    """The mean loss and the decay, in float64."""
    logits = features.double() @ weight.double().t() + bias.double()
    if loss == "bce":
        value = F.binary_cross_entropy_with_logits(logits, labels.double())
    else:
        value = F.cross_entropy(logits, labels)
    return float(value + decay / 2 * weight.double().square().sum())


def theirs(loss, decay, features, labels):
    """Weights and biases by scikit-learn."""
    count, x = len(features), features.double().numpy()
    terms = count * (labels.shape[1] if loss == "bce" else 1)
    model = LogisticRegression(C=1 / (terms * decay), tol=1e-6, max_iter=1000)
    targets = labels.t() if loss == "bce" else [labels]
    fitted = [model.fit(x, y.numpy()) and (model.coef_.copy(), model.intercept_.copy()) for y in targets]
    return (torch.from_numpy(np.concatenate(parts)) for parts in zip(*fitted, strict=True))


def main(images, width, classes, decays, loss):
    """Train both, print a line for each decay and the ratio of the times."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    features, multi, single = data(images, width, classes)
    labels = multi if loss == "bce" else single
    specs = [
        ProbeSpec("x", "l:pooled", Head("linear"), Loss(loss), Optimizer("lbfgs", None, 0.0, float(decay), iterations=1000),
                  Schedule(), 1, 64, 0)
        for decay in np.logspace(-8, -1, decays)
    ]  # fmt: skip
    started = time.perf_counter()
    fits = specs[0].optimizer.fit(specs, features, labels, classes)
    weights, short = [fit.weights for fit in fits], [not fit.converged for fit in fits]
    ours = time.perf_counter() - started
    print(f"featcache: {ours:.2f} s, {sum(short)} of {decays} not converged")
    other = 0
    for spec, found in zip(specs, weights, strict=True):
        decay = spec.optimizer.weight_decay
        started = time.perf_counter()
        weight, bias = theirs(loss, decay, features, labels)
        seconds = time.perf_counter() - started
        other += seconds
        mine = objective(loss, decay, found["fc0.weight"], found["fc0.bias"], features, labels)
        reached = objective(loss, decay, weight, bias, features, labels)
        print(f"decay {decay:.1e}: objective {mine:.8f}, scikit-learn {reached / mine - 1:+.1e} in {seconds:.1f} s")
    print(f"scikit-learn: {other:.2f} s, {other / ours:.1f} times as long")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 450), ("width", 1280), ("classes", 20), ("decays", 13)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--loss", choices=["bce", "ce"], default="bce")
    main(**vars(parser.parse_args()))
