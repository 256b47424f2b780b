"""The probe engine on a GPU that is not there: torch's fake tensors refuse what mixes devices, and compute nothing."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from featcache.probes.engine.training import Training
from featcache.probes.grids.grid import parse_grid

# Not the attentive one, whose gradients are autograd's, and that asks for a real device.
HEADS = ["linear", {"type": "mlp", "hidden": 16}, {"type": "mlp", "hidden": 16, "activation": "gelu", "norm": "bnu"},
         {"type": "bcos", "layers": 2, "hidden": 16, "max_out": 2}]  # fmt: skip
LOSSES = [{"type": "bce", "off_label": "1/C", "class_weights": "balanced"}, {"type": "ce", "label_smoothing": 0.1},
          "focal", "asymmetric", "squared_hinge"]  # fmt: skip
RULES = ["sgd", "adam", "adamw", "lars"]
ROWS, DIM, POSITIONS, CLASSES = 12, 8, 9, 4


@pytest.mark.process
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_step_stays_on_the_device(head):
    """Of every head with every rule, a stack of all losses; what it says is on the device, and its weights."""
    kinds = ["multi", "single"]
    for (number, rule), labels, precision in itertools.product(enumerate(RULES), kinds, ["float32", "bf16"]):
        optimizer = {"type": rule, "lr": [0.1, 0.2], "weight_decay": 0.1, "clip": 1 if number % 2 else 0}
        group = {"head": head, "loss": LOSSES, "optimizer": optimizer, "features": "layer4:spatial", "epochs": 2}
        specs = parse_grid({"probes": [group | {"precision": precision, "batch_size": 6}]}).specs
        with FakeTensorMode(allow_non_fake_inputs=True):
            there = torch.device("cuda")
            shape = (ROWS, CLASSES) if labels == "multi" else (ROWS,)
            training = Training(specs, DIM, CLASSES, torch.ones(shape, device=there).to(torch.int64))
            training.begin_epoch()
            features = torch.ones((6, DIM) if head == "linear" else (6, DIM, POSITIONS), device=there)
            training.feed(features, torch.ones(shape, device=there).to(torch.int64)[:6])
            assert training.logits(features).device.type == "cuda"
            assert {w.device.type for w in training._stack.weights.values()} == {"cuda"}


def test_a_full_gpu_is_one_line(monkeypatch, command):
    """As CUDA's allocator words it."""

    def allocate(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3 GiB is free"
        )

    monkeypatch.setattr("featcache.probes.runs.verify.verify", allocate)
    code, _, err = command("verify", "s.zarr")
    assert code == 2
    assert err == (
        "Error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB): take a machine with more memory\n"
    )
