"""Sweeps: streamed equals a plain loop in the same order, killed equals undisturbed, many processes equal one."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from extracting import SIZE
from loop import train_block
from parts import Head, Loss, Optimizer, Schedule
from processes import start_training as start

import featcache
from featcache.errors import BadInput
from featcache.probes.engine.sweep import rung_epoch, rungs
from featcache.probes.engine.training import Training, state_path
from featcache.probes.grids.grid import parse_grid
from featcache.probes.inputs.batches import MiniBatches, epoch_order
from featcache.probes.inputs.input import Input
from featcache.probes.inputs.streamed import Streamed
from featcache.probes.runs.probe_file import Origin, find_probes, load_probe, load_probes
from featcache.probes.spec import ProbeSpec
from featcache.probes.weights import initial_weights
from featcache.store import manifest

LINEAR = {
    "name": "lin", "features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 4, "batch_size": 16,
    "optimizer": {"type": "sgd", "lr": [0.1, 1.0]},
}  # fmt: skip
DEEP = {
    "name": "mlp", "features": "spatial", "head": {"type": "mlp", "hidden": 16}, "loss": "bce", "epochs": 3,
    "batch_size": [16, 7], "optimizer": {"type": "adam", "lr": [0.001, 0.01]},
}  # fmt: skip
BCOS = {
    "name": "bcos", "features": "spatial", "head": {"type": "bcos", "layers": 2, "hidden": 8}, "loss": "bce",
    "epochs": 2, "batch_size": 16, "optimizer": {"type": "sgd", "lr": 0.3},
}  # fmt: skip
# A buffer of a few rows: features are streamed.
SMALL = 200_000


@pytest.fixture(scope="module")
def store(scenes, checkpoint, tmp_path_factory):
    """A finished store as the shared one, but with chunks of 4 rows, so that a small split has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "CHUNK_ROWS", 4)
        return featcache.extract(
            checkpoint, "voc", root=scenes, size=SIZE, dtype="float32", workers=0, batch_size=8,
            store=tmp_path_factory.mktemp("chunked") / "digits.zarr",
        )  # fmt: skip


def probes_of(run):
    return list(load_probes(run.path, find_probes(run.path)))


def weights_of(run):
    return {probe.spec.id: probe.weights for probe in probes_of(run)}


def assert_equal(a, b, exactly=True):
    assert a.keys() == b.keys()
    for name in a:
        for key, tensor in a[name].items():
            assert torch.equal(tensor, b[name][key]) if exactly else torch.allclose(tensor, b[name][key], atol=1e-5)


def test_streamed_pieces_hold_every_row_once_and_depend_on_the_seed_alone(store):
    opened = featcache.open_store(store)
    for _ in range(2):
        source = Streamed(Input("layer4:spatial"), opened, ["train", "val"], 16)
        seen = [[p.rows for p in source.pieces(0, seed, epoch)] for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
        assert len(seen[0]) > 2
        orders = [torch.cat(pieces) for pieces in seen]
        assert all(sorted(order.tolist()) == list(range(60)) for order in orders)
        assert torch.equal(orders[0], orders[1])
        assert not torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[3])
    whole = torch.from_numpy(np.concatenate([opened[s]["layer4:spatial"][:] for s in ("train", "val")])).flatten(2)
    for piece in source.pieces(0, 0, 0):
        assert torch.equal(piece.values[piece.order], whole[piece.rows])
    pooled = next(iter(Streamed(Input("layer4:spatial", pooled=True), opened, ["train"], 16).pieces(0, 0, 0)))
    torch.testing.assert_close(pooled.values[pooled.order], whole[:40][pooled.rows].mean(2))


@pytest.mark.parametrize("size", [1, 7, 16, 60, 100])
def test_mini_batches_cross_the_borders_of_pieces(store, size):
    source = Streamed(Input("layer4:pooled"), featcache.open_store(store), ["train", "val"], 16)
    batches = MiniBatches(size)
    rows = [r for piece in source.pieces(0, 3, 1) for _, r in batches.cut(piece)]
    assert torch.equal(torch.cat(rows), torch.cat([p.rows for p in source.pieces(0, 3, 1)]))
    assert {len(r) for r in rows[:-1]} <= {size} and len(rows[-1]) == (60 % size or size)


def test_a_streamed_probe_equals_a_plain_loop_over_the_same_order(store, tmp_path):
    """And equals itself trained without its neighbours."""
    grid = {"probes": [DEEP | {"batch_size": 7}, BCOS]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r", memory=SMALL)
    buffers = json.loads((run.path / "run.json").read_text())["buffers"]
    (rows,) = buffers.values()
    assert rows and rows < 40
    opened = featcache.open_store(store)
    maps = torch.from_numpy(opened["train"]["spatial"][:]).flatten(2)
    labels = torch.from_numpy(opened["train"].labels)
    for probe in probes_of(run):
        training = Training([probe.spec], maps.shape[1], len(opened.classes), labels)
        for epoch in range(probe.spec.epochs):
            source = Streamed(Input("layer4:spatial"), opened, ["train"], rows)
            order = torch.cat([p.rows for p in source.pieces(0, 0, epoch)])
            training.begin_epoch()
            for chosen in order.split(probe.spec.batch_size):
                training.feed(maps[chosen].float(), labels[chosen])
            training.end_epoch()
        (alone,) = training.finish()
        assert_equal({"x": probe.weights}, {"x": alone.weights}, exactly=False)
        assert probe.losses == pytest.approx(alone.losses, abs=1e-6)


@pytest.mark.process
@pytest.mark.parametrize("memory", [None, SMALL / 1e9], ids=["in memory", "streamed"])
def test_killed_anywhere_and_started_again_gives_the_same_bits(store, tmp_path, memory):
    grid = tmp_path / "grid.yaml"
    many = [LINEAR | {"epochs": 60, "keep": "best"}, DEEP | {"epochs": 25}, BCOS | {"epochs": 20}]
    grid.write_text(yaml.safe_dump({"probes": many}))
    more = ["--memory", memory] if memory else []
    whole = start(grid, store, tmp_path / "whole", *more)
    assert whole.wait() == 0, whole.stderr.read()
    moments, states = random.Random(0), []
    for _ in range(5):
        process = start(grid, store, tmp_path / "killed", *more)
        # Killed at any moment after its first states are on disk, with the next ones under way.
        while not list((tmp_path / "killed").glob("partial/*.safetensors")) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        states.append(len(list((tmp_path / "killed").glob("partial/*.safetensors"))))
    last = start(grid, store, tmp_path / "killed", *more)
    assert last.wait() == 0, last.stderr.read()
    assert any(states), states
    for p in (whole, last):
        p.stderr.close()
    a, b = (featcache.open_run(tmp_path / name) for name in ("whole", "killed"))
    assert_equal(weights_of(a), weights_of(b))
    for name in ("scores.csv", "history.csv"):
        assert (a.path / name).read_text() == (b.path / name).read_text()
    assert not (b.path / "partial").exists()


# The real program. A process that has trained a block says so, and leaves the next one to the others.
TELLING = """
import os, sys, time
from featcache.cli import main
from featcache.probes.engine.sweep import Sweep
keep = Sweep._keep
def telling(self, probes, origin):
    keep(self, probes, origin)
    if probes:
        print("refits" if probes[0].spec.refit else "probes", "of rank", os.environ["RANK"], file=sys.stderr)
        time.sleep(0.3)
Sweep._keep = telling
main()
"""


@pytest.mark.process
def test_two_processes_share_the_blocks_and_the_refits(store, tmp_path, monkeypatch):
    """And leave the bytes that one process leaves."""
    grid = tmp_path / "grid.yaml"
    exact = {"name": "exact", "features": "pooled", "head": "linear", "loss": "bce", "views": 0,
             "optimizer": {"type": "lbfgs", "weight_decay": [0.01, 0.1]}}  # fmt: skip
    grid.write_text(yaml.safe_dump({"refit": ["train", "val"], "probes": [LINEAR, DEEP, BCOS, exact]}))
    words = ["train-probes", "--grid", grid, "--store", store, "--run", tmp_path / "two"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--",
              sys.executable, "-c", TELLING]  # fmt: skip
    # Which is what torchrun gives each process unless it is told otherwise.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("probes by") == 1, "one process prints the table"
    for rank in (0, 1):
        assert f"refits of rank {rank}" in done.stderr, "each has taken some"
    again = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True)
    assert again.returncode == 0 and "is finished already" in again.stderr and "train:" not in again.stderr
    assert "gone" not in again.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = featcache.train_probes(grid, store=store, run=tmp_path / "one")
    torch.set_num_threads(threads)
    assert sum(bool(probe.spec.refit) for probe in probes_of(one)) == 5
    two = featcache.open_run(tmp_path / "two")
    assert_equal(weights_of(one), weights_of(two))
    assert (one.path / "scores.csv").read_bytes() == (two.path / "scores.csv").read_bytes()


def test_adding_lines_trains_only_the_new_probes(store, tmp_path, capsys):
    grid = {"probes": [LINEAR]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (run.path / "probes").iterdir()}
    old = weights_of(run)
    longer = {"probes": [LINEAR | {"optimizer": {"type": "sgd", "lr": [0.1, 1.0, 3.0]}}]}
    capsys.readouterr()
    featcache.train_probes(longer, store=store, run=tmp_path / "r")
    assert "4 of 6 probes are trained already" in capsys.readouterr().err
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (run.path / "probes").iterdir()}
    assert len(weights_of(run)) == 6 and {name: after[name] for name in before} == before
    assert_equal({name: weights_of(run)[name] for name in old}, old)


def spec(**fields):
    given = {
        "name": "x", "features": "layer4:pooled", "head": Head("linear"), "loss": Loss("bce"),
        "optimizer": Optimizer("sgd", 0.1, 0.9), "schedule": Schedule(), "epochs": 6, "batch_size": 16, "seed": 0,
    } | fields  # fmt: skip
    return ProbeSpec(**given)


def trainable():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 12, generator=generator)
    return features, (features[:, :3] > 0).to(torch.int8)


def run_epoch(training, features, labels):
    training.begin_epoch()
    for rows in epoch_order(len(features), 0, training.epoch).split(training.batch_size):
        training.feed(features[rows], labels[rows])
    training.end_epoch()


def test_the_best_epoch_is_kept_and_patience_ends_a_probe():
    features, labels = trainable()
    specs = [spec(seed=n, keep="best", patience=2) for n in range(3)]
    training = Training(specs, 12, 3, labels)
    # Scores as a validation would give them: probe 0 peaks at epoch 2, probe 1 rises, probe 2 is never finite.
    given = [[0.1, 0.1, np.nan], [0.5, 0.2, np.nan], [0.4, 0.3, np.nan], [0.4, 0.4, np.nan], [0.3, 0.5, np.nan]]
    taken = {}
    for scores in given:
        run_epoch(training, features, labels)
        left = {s.seed: n for n, s in enumerate(training.specs)}
        training.validated(torch.tensor([scores[seed] for seed in left], dtype=torch.float64))
        taken |= {p.spec.seed: (training.epoch, p) for p in training.take_out(training.impatient(), "patience")}
    assert {seed: epoch for seed, (epoch, _) in taken.items()} == {2: 3, 0: 4}
    peak = taken[0][1]
    assert (peak.epoch, peak.stopped, peak.scores) == (2, "patience", [0.1, 0.5, 0.4, 0.4])
    (shorter,) = train_block([spec(seed=0, epochs=2)], features, labels, 3, 0)
    assert_equal({"x": peak.weights}, {"x": shorter.weights})
    (rising,) = training.finish()
    assert rising.epoch == 5 and rising.stopped is None
    (whole,) = train_block([spec(seed=1, epochs=5)], features, labels, 3, 0)
    assert_equal({"x": rising.weights}, {"x": whole.weights})


@pytest.mark.parametrize("optimizer", [Optimizer("sgd", 0.1, 0.9), Optimizer("adam", 0.01)])
def test_a_restored_state_goes_on_to_the_same_bits(tmp_path, optimizer):
    features, labels = trainable()
    specs = [spec(seed=n, optimizer=optimizer, keep="best") for n in range(4)]
    training = Training(specs, 12, 3, labels)
    for epoch in range(3):
        run_epoch(training, features, labels)
        training.validated(torch.rand(4, generator=torch.Generator().manual_seed(epoch), dtype=torch.float64))
    (tmp_path / "partial").mkdir()
    training.save(tmp_path, Origin("store", "run"))
    other = Training.restored(state_path(tmp_path, training.name), lambda spec: 12, 3, labels)
    for t in (training, other):
        for _ in range(2):
            run_epoch(t, features, labels)
    for a, b in zip(training.finish(), other.finish(), strict=True):
        assert_equal({"x": a.weights}, {"x": b.weights})
        assert (a.epoch, a.losses, a.spec) == (b.epoch, b.losses, b.spec)


def test_divergence_is_marked_at_its_step():
    features, labels = trainable()
    wild, calm = spec(optimizer=Optimizer("sgd", 3e38, 0.9), loss=Loss("ce")), spec(seed=1, loss=Loss("ce"))
    trained = train_block([wild, calm], features, labels, 3, 0)
    layer = torch.nn.Linear(12, 3)
    layer.load_state_dict({n.removeprefix("fc0."): w for n, w in initial_weights(wild, 12, 3).items()})
    optimizer, losses = torch.optim.SGD(layer.parameters(), 3e38, 0.9), []
    for rows in torch.cat([epoch_order(50, 0, epoch) for epoch in range(6)]).split(50)[0].split(16):
        optimizer.zero_grad()
        some = labels[rows].sum(1, keepdim=True).clamp(min=1)
        loss = -(labels[rows] / some * layer(features[rows]).log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trained[0].diverged == [np.isfinite(loss) for loss in losses].index(False) > 0
    assert trained[1].diverged is None


def test_halving_drops_the_poor_and_trains_the_best_to_the_end(store, tmp_path):
    rates = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0, 3.0]
    group = LINEAR | {"loss": "bce", "epochs": 9, "optimizer": {"type": "sgd", "lr": rates}}
    grid = {"search": {"type": "halving", "factor": 3, "first": 0.12}, "probes": [group]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    probes = probes_of(run)
    # Rungs at epochs 2 and 4: nine, then three, then one.
    assert sorted(len(p.losses) for p in probes) == [2] * 6 + [4] * 2 + [9]
    assert sum(p.stopped == "halving" for p in probes) == 8
    (winner,) = [p for p in probes if p.stopped is None]
    at_rung = {p.spec.optimizer.lr: p.scores[1] for p in probes}
    assert at_rung[winner.spec.optimizer.lr] >= sorted(at_rung.values())[-3]
    plain = featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / "plain")
    assert_equal({"x": winner.weights}, {"x": load_probe(plain.path, winner.spec.id).weights})


def test_a_run_with_a_search_takes_no_other_probes(store, tmp_path):
    grid = {"search": "halving", "probes": [LINEAR]}
    first = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    for probes in ([LINEAR, LINEAR | {"name": "more", "seed": 7}], [LINEAR | {"loss": "bce"}]):
        with pytest.raises(
            BadInput, match=r"was made with search .*4 probes .*, not .* probes .*; choose another --run"
        ):
            featcache.train_probes(grid | {"probes": probes}, store=store, run=tmp_path / "r")
    assert featcache.train_probes(grid, store=store, run=tmp_path / "r").scores == first.scores


@pytest.mark.slow
@pytest.mark.process
def test_probes_that_left_the_grid_are_not_trained_on(store, tmp_path):
    """Killed while their block had a state, and gone from the grid when it goes on."""
    grid = tmp_path / "grid.yaml"
    group = LINEAR | {"epochs": 2000, "loss": "bce"}
    grid.write_text(yaml.safe_dump({"probes": [group | {"seed": [0, 1, 2]}]}))
    process = start(grid, store, tmp_path / "r")
    while not list((tmp_path / "r").glob("partial/*.safetensors")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    process.stderr.close()
    assert list((tmp_path / "r").glob("partial/*.safetensors"))
    left = {"probes": [group | {"seed": 1}]}
    run = featcache.train_probes(left, store=store, run=tmp_path / "r")
    assert len(weights_of(run)) == len(parse_grid(left).specs) < 6
    assert_equal(weights_of(run), weights_of(featcache.train_probes(left, store=store, run=tmp_path / "whole")))


def test_halving_needs_room_for_all(store, tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.probes.resolve.free_bytes", lambda device: 10_000)
    grid = {"search": "halving", "probes": [LINEAR]}
    with pytest.raises(BadInput, match="search: halving holds all 4 probes at once, .* and 1e-05 GB are free on cpu"):
        featcache.train_probes(grid, store=store, run=tmp_path / "r")


@pytest.mark.parametrize("head", [Head("linear"), Head("mlp", 2, 32), Head("bcos", 2, 32, "none", False, b=2.0)])
def test_bf16_rounds_the_factors_of_products_and_nothing_else(head):
    """Small steps are not lost, as they would be in weights of bfloat16; and alone equals in company."""
    features, labels = trainable()
    features = features if head.type == "linear" else features[:, :, None].expand(-1, -1, 3) + 0.1
    rounded = [spec(seed=n, head=head, precision="bf16", optimizer=Optimizer("sgd", 1e-3, 0.9)) for n in range(3)]
    together = train_block(rounded, features, labels, 3, 0)
    exact = train_block([replace(s, precision="float32") for s in rounded], features, labels, 3, 0)
    start = initial_weights(rounded[0], 12, 3)["fc0.weight"]
    moved, expected = (t[0].weights["fc0.weight"] - start for t in (together, exact))
    assert not torch.equal(moved, expected)
    assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.995
    assert (moved != 0).float().mean() > 0.99
    (alone,) = train_block(rounded[1:2], features, labels, 3, 0)
    assert_equal({"x": alone.weights}, {"x": together[1].weights}, exactly=False)


def test_precisions_that_cannot_be_are_refused(store, tmp_path):
    for field, message in (("tf32", "tf32 is of NVIDIA GPUs"), ("bf61", "'bf61' is not one of .*did you mean 'bf16'")):
        with pytest.raises(BadInput, match=message):
            featcache.train_probes({"probes": [LINEAR | {"precision": field}]}, store=store, run=tmp_path / "r")
    with pytest.raises(BadInput, match="precision bf16 is not for lbfgs"):
        group = LINEAR | {"precision": "bf16", "optimizer": {"type": "lbfgs"}}
        featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_lbfgs_probes_train_beside_others_and_are_not_streamed(store, tmp_path):
    grid = {"probes": [LINEAR, LINEAR | {"name": "l", "optimizer": {"type": "lbfgs", "weight_decay": [0.1, 1.0]}}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    assert len(find_probes(run.path)) == 8
    with pytest.raises(BadInput, match="lbfgs needs all of layer4:pooled in memory"):
        featcache.train_probes(grid, store=store, run=tmp_path / "s", memory=1000)
    with pytest.raises(BadInput, match="the optimizer lbfgs has none"):
        search = {"type": "halving", "factor": 3, "first": 0.3}
        featcache.train_probes(grid | {"search": search}, store=store, run=tmp_path / "s")


@pytest.mark.parametrize("loss", ["bce", "ce", "squared_hinge"])
def test_a_full_batch_probe_says_how_far_from_its_optimum_it_is(store, tmp_path, capsys, loss):
    """In its file, and in a line where it ended short. A mini-batch probe says nothing of the kind."""
    short = {"type": "lbfgs", "weight_decay": 0.01, "iterations": 1}
    enough = {"type": "lbfgs", "weight_decay": 0.01}
    groups = [LINEAR | {"name": name, "optimizer": o} for name, o in (("short", short), ("enough", enough))]
    grid = {"probes": [group | {"loss": loss} for group in [*groups, LINEAR]]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    for probe in probes_of(run):
        solver, optimality = probe.spec.optimizer, probe.optimality
        if solver.type != "lbfgs":
            assert optimality is None
            continue
        assert (probe.stopped is None) == (solver.iterations == 1000)
        if probe.stopped is None:
            assert optimality.distance <= 1e-5 and optimality.gradient <= 1
            best = probe
        else:
            assert optimality.gradient > 1
            far = probe
    gap = (far.weights["fc0.weight"] - best.weights["fc0.weight"]).norm() / far.weights["fc0.weight"].norm()
    assert 0 < gap <= 1.1 * far.optimality.distance
    away = f"up to {far.optimality.distance:.1e} of its weights from the optimum"
    assert (
        f"warning: probe {far.spec.id} had not converged after 1 Newton steps (lbfgs, {away})"
        in capsys.readouterr().err
    )


def test_attentive_probes_read_tokens_and_maps(store, tmp_path):
    group = LINEAR | {"features": "spatial", "head": {"type": "attentive", "heads": 4}, "loss": "bce"}
    run = featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / "r")
    assert all(row["value"] > 0 for row in run.scores if row["metric"] == "map")
    with pytest.raises(BadInput, match="3 attention heads do not divide layer4:spatial, which is 512 wide"):
        group = group | {"head": {"type": "attentive", "heads": 3}}
        featcache.train_probes({"probes": [group]}, store=store, run=tmp_path / "s")


def test_rungs():
    from types import SimpleNamespace

    assert rungs(SimpleNamespace(first=0.1, factor=3)) == pytest.approx([0.1, 0.3, 0.9])
    assert rungs(None) == []
    assert [rung_epoch(600, f) for f in rungs(SimpleNamespace(first=0.1, factor=3))] == [60, 180, 540]
    assert [rung_epoch(20, f) for f in rungs(SimpleNamespace(first=0.1, factor=3))] == [2, 6, 18]
    assert [rung_epoch(10, f) for f in (0.01, 0.1, 0.3)] == [1, 1, 3]


def test_a_begun_run_stays_with_how_it_read(store, tmp_path, monkeypatch):
    grid = {"probes": [DEEP]}
    first = featcache.train_probes(grid, store=store, run=tmp_path / "r", memory=SMALL)
    expected = weights_of(first)
    (tmp_path / "r/run.json").write_text(
        json.dumps({k: first.summary[k] for k in ("store_id", "seed", "splits", "select", "search", "buffers")})
    )
    next((tmp_path / "r/probes").iterdir()).unlink()
    # Two probes alone are another stack than those two among four.
    again = weights_of(featcache.train_probes(grid, store=store, run=tmp_path / "r"))
    assert_equal(again, expected, exactly=False)
