"""A thousand mixed probes in one call of train-probes against 25 of them one by one in plain PyTorch.

    featcache demo --data-only
    featcache extract --backbone WEIGHTS --dataset voc --root featcache-demo/data --store demo.zarr --features pooled
    python tests/benchmarks/thousand_probes.py demo.zarr

The probes are linear and differ in loss, optimiser, rate, decay, bias and seed, 30 epochs each. The plain loop is
nn.Linear, a DataLoader that shuffles, autograd and torch.optim; then scikit-learn's average precision on the three
splits and torch.save. train-probes scores by nine metrics with intervals, calibration and seeds.
"""

import argparse
import tempfile
import time

import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import featcache
from featcache.probes.grids.grid import parse_grid

EPOCHS, BATCH = 30, 64
GRID = {
    "probes": [
        {
            "features": "pooled", "head": {"type": "linear", "bias": [True, False]}, "loss": ["bce", "ce"],
            "optimizer": {"type": kind, "lr": {"log": [low, high, 25]}, "weight_decay": [0, 1e-4]},
            "schedule": "cosine", "epochs": EPOCHS, "batch_size": BATCH, "seed": [0, 1, 2] if kind == "sgd" else [0, 1],
        }
        for kind, low, high in (("sgd", 0.01, 10), ("adam", 1e-4, 0.1))
    ]
}  # fmt: skip


def plain(spec, splits, path):
    """Train, score and save one probe the ordinary way. splits: [(features, labels)], of which the first trains."""
    features, labels = splits[0]
    torch.manual_seed(spec.seed)
    layer = torch.nn.Linear(features.shape[1], labels.shape[1], bias=spec.head.bias)
    rule, o = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[spec.optimizer.type], spec.optimizer
    more = {"momentum": o.momentum} if o.type == "sgd" else {}
    optimizer = rule(layer.parameters(), o.lr, weight_decay=o.weight_decay, **more)
    loader = DataLoader(TensorDataset(features, labels), BATCH, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            if spec.loss.type == "bce":
                loss = F.binary_cross_entropy_with_logits(layer(x), y)
            else:
                loss = F.cross_entropy(layer(x), y / y.sum(1, keepdim=True).clamp(min=1))
            loss.backward()
            optimizer.step()
            schedule.step()
    for x, y in splits:
        with torch.no_grad():
            average_precision_score(y.numpy(), layer(x).numpy())
    torch.save(layer.state_dict(), path)


def main():
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store")
    arguments = parser.parse_args()
    specs = parse_grid(GRID).specs
    store = featcache.open_store(arguments.store)
    splits = [
        (store[s]["pooled"].to_torch().float(), torch.from_numpy(store[s].labels).clamp(min=0).float())
        for s in ("train", "val", "test")
    ]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        featcache.train_probes(GRID, store=arguments.store, run=f"{folder}/run")
        together = time.perf_counter() - started
        started = time.perf_counter()
        for spec in specs[:: len(specs) // 25][:25]:
            plain(spec, splits, f"{folder}/plain.pt")
        apart = time.perf_counter() - started
    print(f"{len(specs)} probes trained, scored and saved in one call: {together:.1f} s")
    print(f"25 of them one by one in plain PyTorch: {apart:.1f} s; that is {apart / 25 * len(specs):.0f} s for all")


if __name__ == "__main__":
    main()
