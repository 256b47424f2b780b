"""A grid that trains in a second on the small store of conftest.py."""

GRID = {
    "probes": [
        {"name": "lin", "features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 4, "batch_size": 16,
         "optimizer": {"type": "sgd", "lr": [0.1, 1.0]}, "seed": [0, 1]},
        {"name": "mlp", "features": "spatial", "head": {"type": "mlp", "hidden": 8}, "loss": "bce", "epochs": 2,
         "batch_size": 16, "optimizer": {"type": "adam", "lr": "1e-3"}, "schedule": "cosine"},
    ]
}  # fmt: skip
