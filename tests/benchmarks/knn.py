"""k nearest neighbours against the product that they need, and against scikit-learn: seconds, ratios and memory.

    python tests/benchmarks/knn.py [--images 10000] [--training 50000] [--width 2048] [--device cuda] [--rounds 3]

Features are like those of a network: not negative, correlated, of a spectrum that falls with a power; float16, as in a
store. The search serves k = 10, 20, 100 and 200 at once, by the cosine. In every round the contestants run in turn on
the same images: a plain float32 product of all similarities, which is the peak; the search; and scikit-learn's
KNeighborsClassifier (brute, cosine, n_jobs=2), which predicts for one k at a time: here for 20. Ratios are also given in
processor time, which others on the machine disturb less; for that, --threads 1 is best.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from featcache.device import multiplying
from featcache.probes.heads.knn import Knn
from featcache.probes.losses.ce import Ce
from featcache.probes.neighbours.memory import SearchMemory
from featcache.probes.neighbours.search import Draw, Search, candidates
from featcache.probes.neighbours.votes import vote

KS = (10, 20, 100, 200)


class Rows:
    """Features in memory in the place of TrainingRows, which reads them from a store."""

    def __init__(self, values):
        self.values, (self.count, self.width) = values, values.shape
        self.norms = torch.cat([part.double().norm(dim=1) for part in values.split(4096)])

    def tiles(self):
        yield from zip(range(0, self.count, 8192), self.values.split(8192), strict=True)

    def pick(self, rows):
        return self.values[rows]


def features(counts, width):
    """float16 features of some numbers of images."""
    random = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
    made = []
    for count in counts:
        parts = [torch.randn(min(4096, count - at), width, generator=random) for at in range(0, count, 4096)]
        made.append(torch.cat([torch.relu(3 * (part * spectrum) @ turn + 0.1).half() for part in parts]))
    return made


def timed(function, device):
    """(seconds, seconds of the processor, result) of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter(), time.process_time()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1], result


def product(images, factors, memory):
    """All similarities as plain float32 products, in the parts that the search takes."""
    with multiplying("float32"):
        out = torch.empty(memory.images, len(factors), device=images.device)
        for part in images.split(memory.images):
            torch.mm(part, factors.t(), out=out[: len(part)])


def main(images, training, width, classes, device, rounds, room, scikit, threads):
    """Print a line for every round, and the best ratios."""
    torch.set_num_threads(threads or torch.get_num_threads())
    device = torch.device(device)
    rows, queries = features((training, images), width)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, classes, training)).to(device)
    memory = SearchMemory.of(room * 1e9, device, training, width, 2, candidates(max(KS)))
    print(f"{images} images, {training} of {width} to choose from, k {KS}; {memory}")
    held = Rows(rows.to(device))
    heads = [Knn(k=k) for k in KS]

    def search():
        finder = Search(held, "cosine", [Draw(None, KS)], memory)
        hits = []
        for part in queries.split(memory.images):
            (found,) = finder(part.to(device).float())
            logits = [vote(head, Ce(), found.similarities, labels[found.rows], classes) for head in heads]
            hits.append(torch.stack(logits).argmax(2))
        return torch.cat(hits, 1).cpu()

    # The largest size that the process has from here on.
    Path("/proc/self/clear_refs").write_text("5")
    votes = search()
    (peak,) = (line for line in Path("/proc/self/status").read_text().split("\n") if line.startswith("VmHWM"))
    print(f"largest size of the process: {int(peak.split()[1]) / 2**20:.2f} GiB", end="")
    print(f", and {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU" if device.type == "cuda" else "")
    factors = torch.cat([part.float() / part.float().norm(dim=1, keepdim=True) for part in held.values.split(8192)])
    left = torch.nn.functional.normalize(queries.float()).to(device)
    product(left[: memory.images], factors, memory)
    shares, ratios = [], []
    for _ in range(rounds):
        plain = timed(lambda: product(left, factors, memory), device)[:2]
        ours = timed(search, device)[:2]
        again = timed(lambda: product(left, factors, memory), device)[:2]
        best = [min(pair) for pair in zip(plain, again, strict=True)]
        shares.append([a / b for a, b in zip(best, ours, strict=True)])
        rate = 2 * images * training * width / best[0] / 1e9
        print(
            f"product {plain[0]:.3f} and {again[0]:.3f} s ({rate:.0f} GFLOP/s), search and votes {ours[0]:.3f} s",
            end="",
        )
        if scikit:
            *theirs, classes_of = timed(lambda: by_scikit(held.values, queries, labels), device)
            ratios.append([a / b for a, b in zip(theirs, ours, strict=True)])
            same = (torch.from_numpy(classes_of) == votes[KS.index(20)]).float().mean()
            print(f", scikit-learn {theirs[0]:.2f} s for k 20 ({same:.4f} equal)", end="")
        print(f"; load {os.getloadavg()[0]:.1f}", flush=True)
    told("share of the product's peak, by the clock and by processor time", shares)
    if ratios:
        told("times as fast as scikit-learn for one k", ratios)
        told(f"times as fast as scikit-learn for all {len(KS)} k", [[len(KS) * r for r in pair] for pair in ratios])


def told(what, pairs):
    """Print the best of pairs of ratios, and all."""
    best = [max(column) for column in zip(*pairs, strict=True)]
    print(f"{what}: best {best[0]:.2f}, {best[1]:.2f} of {', '.join(f'{a:.2f} {b:.2f}' for a, b in pairs)}")


def by_scikit(rows, images, labels):
    """The classes that scikit-learn gives images, by the votes of the nearest 20 with the weights exp(s / 0.07)."""
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    model = KNeighborsClassifier(20, weights=weights, metric="cosine", algorithm="brute", n_jobs=2)
    model.fit(rows.cpu().float().numpy(), labels.cpu().numpy())
    return model.predict(images.float().numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = (("images", 10_000), ("training", 50_000), ("width", 2048), ("classes", 100), ("rounds", 3))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", dest="room", type=float, default=2.0, metavar="GB")
    parser.add_argument("--threads", type=int, help="of both contestants; scikit-learn has its two")
    parser.add_argument("--no-scikit", dest="scikit", action="store_false")
    main(**vars(parser.parse_args()))
