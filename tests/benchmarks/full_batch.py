"""Full-batch linear probes and support vector machines against scikit-learn, at equal optimality.

    python tests/benchmarks/full_batch.py [decays] [path] [softmax] [folds] [svm]

Each row prints CPU seconds of one thread for both, which other programs disturb less than wall time, and their ratio.
Features are like those of a network: not negative, correlated, of a spectrum that falls with a power.

    decays    13 weight decays, 450 x 1,280, 20 classes, bce and ce
    path      45 weight decays, 5,000 x 2,048, 20 classes, bce
    softmax   10 weight decays, ce; by default 4,000 x 512 and 200 classes: --full takes 20,000 x 1,024 and 1,000
    folds     45 weight decays, 10 folds and all images, 300 x 768, 10 classes, ce: pipelines/dinov2/logistic.yaml
    svm       20 classes, 19 costs, 3 folds and all images, 5,011 x 2,048

scikit-learn solves one problem after the other. Of `path`, `softmax`, `folds` and `svm` it solves a sample, spread over decays or
costs, and its time is scaled up to all of them; ours is always the whole. Of its solvers for logistic regression the
faster one counts for each problem, among those that come within 1e-6 of our objective, or both if none does.
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
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from featcache.probes.solvers.convex import Columns, Eigenbasis, Problem, fit_convex, solve

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from parts import Head, Loss


def data(images, width, classes, positive=0.07):
    """Features float32 [N, D], labels int8 [N, C] and int64 [N]."""
    random = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.8
    turn = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
    features = torch.relu(3 * (torch.randn(images, width, generator=random) * spectrum) @ turn + 0.1)
    scores = features @ torch.randn(width, classes, generator=random)
    scores = (scores - scores.mean(0)) / scores.std(0) + torch.randn(images, classes, generator=random)
    return features, (scores > scores.quantile(1 - positive, dim=0)).to(torch.int8), scores.argmax(1)


def timed(function, *arguments, **fields):
    """Return CPU seconds of a call, and its result."""
    started = time.process_time()
    result = function(*arguments, **fields)
    return time.process_time() - started, result


def objective(decay, weight, bias, x, labels):
    """The mean loss and the decay, in float64. labels: int64 [N] of a softmax, or float64 [N] of one class."""
    logits = x @ weight.T + bias
    if labels.dtype == torch.int64:
        value = F.cross_entropy(torch.from_numpy(logits), labels)
    else:
        value = F.binary_cross_entropy_with_logits(torch.from_numpy(logits[:, 0]), labels)
    return float(value) + decay / 2 * float(np.square(weight).sum())


def logistic(kind, images, width, classes, decays, sample, solvers, loss):
    """A row of logistic regression. sample: numbers of decays and classes that scikit-learn solves."""
    features, multi, single = data(images, width, classes)
    labels, terms = (multi, images * classes) if loss == "bce" else (single, images)
    problems = [Problem(Loss(loss), float(decay), 1000) for decay in decays]
    ours, fits = timed(fit_convex, problems, Head("linear"), features, labels, classes)
    farthest = max(fit.optimality.distance for fit in fits)
    print(f"{kind}, {loss}: featcache {ours:.1f} s, all within {farthest:.0e} of their optima", flush=True)
    x, theirs = features.double().numpy(), 0.0
    parts = range(sample[1]) if loss == "bce" else [None]
    for place in np.linspace(0, len(decays) - 1, sample[0]).astype(int):
        decay, weights = decays[place], fits[place].weights
        for c in parts:
            one = slice(None) if c is None else slice(c, c + 1)
            target = single if c is None else multi[:, c].double()
            # The mean over classes divides what one class minimises.
            share = decay if c is None else decay * classes
            mine = objective(share, weights["fc0.weight"][one].double().numpy(), weights["fc0.bias"][one].double().numpy(),
                             x, target)  # fmt: skip
            tries = []
            for solver in solvers:
                model = LogisticRegression(C=1 / (terms * decay), tol=1e-7, max_iter=2000, solver=solver)
                seconds, _ = timed(model.fit, x, target.numpy())
                reached = objective(share, model.coef_, model.intercept_, x, target)
                tries.append((abs(reached / mine - 1) > 1e-6, seconds, solver, reached / mine - 1))
            best = min(tries)
            theirs += best[1]
            print(f"  decay {decay:.0e}: {best[2]} {best[1]:.2f} s, objective {best[3]:+.0e} from ours", flush=True)
    whole = theirs * (len(decays) * (classes if loss == "bce" else 1)) / (sample[0] * len(parts))
    print(f"{kind}, {loss}: scikit-learn {whole:.0f} s, {whole / ours:.1f} times as long", flush=True)


def folds(images=300, width=768, classes=10, parts=10, sampled=5):
    """The row of DINOv2's logistic regression by folds. scikit-learn solves some decays on one fold."""
    features, _, single = data(images, width, classes)
    decays = np.logspace(np.log10(7.80538e-12), np.log10(0.780538), 45)
    held_out = {f"{part + 1}/{parts}": torch.arange(part, images, parts) for part in range(parts)}
    problems = [Problem(Loss("ce"), float(decay), 1000, fold) for fold in (None, *held_out) for decay in decays]
    ours, fits = timed(fit_convex, problems, Head("linear"), features, single, classes, held_out)
    farthest = max(fit.optimality.distance for fit in fits)
    print(f"folds: featcache {ours:.1f} s, {len(fits)} problems, all within {farthest:.0e} of their optima", flush=True)
    rows, theirs = np.arange(images) % parts != 0, 0.0
    x, target = features.double().numpy()[rows], single[rows]
    for place in np.linspace(0, len(decays) - 1, sampled).astype(int):
        model = LogisticRegression(C=1 / (len(x) * decays[place]), tol=1e-7, max_iter=2000)
        seconds, _ = timed(model.fit, x, target.numpy())
        weights = {name: tensor.double().numpy() for name, tensor in fits[len(decays) + place].weights.items()}
        mine = objective(decays[place], weights["fc0.weight"], weights["fc0.bias"], x, target)
        reached = objective(decays[place], model.coef_, model.intercept_, x, target)
        theirs += seconds
        print(
            f"  decay {decays[place]:.0e}: {seconds:.2f} s, objective {reached / mine - 1:+.0e} from ours", flush=True
        )
    whole = theirs * len(problems) / sampled
    print(f"folds: scikit-learn {whole:.0f} s, {whole / ours:.1f} times as long", flush=True)


def svm(classes=20, images=5011, width=2048, sampled=2):
    """The row of VOC's support vector machines: OpenMixup's costs, class weights, folds and LinearSVC."""
    features, multi, _ = data(images, width, classes)
    features = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    costs = np.array([1.0, 10, 100, *(0.5**power for power in range(4, 20))])
    targets = 2 * multi.double() - 1
    folds = torch.ones(images, classes, 4, dtype=torch.bool)
    for c in range(classes):
        for fold, (_, out) in enumerate(StratifiedKFold(3).split(features, multi[:, c])):
            folds[out, c, fold] = False

    def sweep():
        columns = Columns(
            "squared_hinge", targets, torch.from_numpy(1 / costs), torch.where(targets > 0, 2.0, 1.0), folds
        )
        return solve(Eigenbasis(features, "penalised"), columns)

    ours, found = timed(sweep)
    print(f"svm: featcache {ours:.1f} s, {found.steps.numel()} problems, all within {float(found.distance.max()):.0e}",
          flush=True)  # fmt: skip
    x, theirs = features.double().numpy(), 0.0
    for p, cost in enumerate(costs):
        spent, off = 0.0, 0.0
        for c in range(sampled):
            for fold, times in ((0, 3), (3, 1)):
                rows = folds[:, c, fold].numpy()
                model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-4, max_iter=2000, random_state=0)
                seconds, _ = timed(model.fit, x[rows], targets[rows, c].numpy())
                spent += times * seconds
                if fold == 0:
                    ap = [average_precision_score(multi[~rows, c], d[~rows])
                          for d in (model.decision_function(x), found.decisions[c, 0, p].numpy())]  # fmt: skip
                    off = max(off, abs(ap[0] - ap[1]))
        precise = []
        if p % 3 == 0 or cost > 1:
            model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-8, max_iter=10_000, dual=False)
            exact = model.fit(x, targets[:, 0].numpy()).decision_function(x)
            precise = [np.abs(found.decisions[0, 3, p].numpy() - exact).max() / np.abs(exact).max()]
        theirs += spent * classes / sampled
        print(f"  cost {cost:.1e}: LinearSVC {spent * classes / sampled:.1f} s, AP differs by {off:.0e}; decisions from "
              f"those at tol 1e-8 {', '.join(f'{value:.0e}' for value in precise) or '-'}", flush=True)  # fmt: skip
    print(f"svm: LinearSVC {theirs:.0f} s, {theirs / ours:.1f} times as long", flush=True)


def main(rows, full):
    """Run rows."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    both, alone = ["lbfgs", "newton-cholesky"], ["lbfgs"]
    with threadpool_limits(1):
        for row in rows:
            if row == "decays":
                logistic(row, 450, 1280, 20, np.logspace(-8, -1, 13), (13, 3), both, "bce")
                logistic(row, 450, 1280, 20, np.logspace(-8, -1, 13), (13, 1), alone, "ce")
            elif row == "path":
                logistic(row, 5000, 2048, 20, 1 / (5000 * np.logspace(-6, 5, 45)), (6, 1), both, "bce")
            elif row == "softmax":
                sizes = (20_000, 1024, 1000) if full else (4000, 512, 200)
                logistic(row, *sizes, np.logspace(-6, -1, 10), (4, 1), alone, "ce")
            elif row == "folds":
                folds()
            else:
                svm()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["decays", "path", "softmax", "folds", "svm"]
    parser.add_argument("rows", nargs="*", default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--full", action="store_true", help="softmax with 1,000 classes")
    chosen = parser.parse_args()
    if unknown := set(chosen.rows) - set(names):
        parser.error(f"no such row: {', '.join(unknown)}")
    main(chosen.rows, chosen.full)
