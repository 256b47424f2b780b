"""`featcache finetune` from the command line to everything that reads its run; kills, ranks and bad input."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import trust
import tuning
import yaml
from folders import SUPPORT
from processes import free_port

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.tuned import backbone_path, read_logits

GRID = tuning.recipe({"ema": 0.9}, optimizer={"type": "sgd", "lr": [0.1, 0.01]}, label_fraction=0.5)
ARCH = ["--arch", "tuning:network"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trust.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the tiny network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pth"
    torch.save(tuning.network().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tuned(images, tiny, tmp_path_factory):
    """A finished run of two configurations."""
    place = tmp_path_factory.mktemp("runs") / "tuned"
    given = {"root": images, "arch": "tuning:network", "workers": 0, "run": place}
    return trust.quietly(lambda: featcache.finetune(tiny, "manifest", GRID, **given))[0]


def words(images, backbone, recipe, run):
    given = {"backbone": backbone, "dataset": "manifest", "root": images, "recipe": recipe, "run": run, "workers": 0}
    return ["finetune", *(str(w) for key, value in given.items() for w in (f"--{key}", value)), *ARCH]


def test_the_run_is_one_like_any_other(tuned, command, tmp_path):
    probes = list(dict.fromkeys(row["probe"] for row in tuned.scores))
    assert len(probes) == 2 and featcache.verify(tuned.path) == []
    assert {row["split"] for row in tuned.scores} == {"val", "test"}
    (row,) = [r for r in tuned.scores if (r["probe"], r["split"], r["metric"]) == (probes[0], "test", "map")]
    assert row["low"] < row["value"] < row["high"] and row["finetune.ema"] == "0.9" and row["label_fraction"] == "0.5"
    (sample,) = tuned.summary["samples"].values()
    assert sample["images"] == 11
    (first, *_) = featcache.compare(tuned.path, probes)
    assert first.metric == "map" and first.scores[0] == pytest.approx(row["value"])
    page = featcache.report(tuned.path, tmp_path / "page.html").read_text()
    assert all(probe in page for probe in probes)
    code, out, _ = command("compare", "--run", tuned.path, "--probe", probes[0], "--probe", probes[1])
    assert code == 0 and probes[1] in out


def test_extract_takes_the_fine_tuned_backbone(tuned, images, tmp_path):
    """Its features through the probe's head are the logits that were scored."""
    for probe in tuned.summary["backbones"]:
        store = trust.quietly(
            lambda probe=probe: featcache.extract(
                backbone_path(tuned.path, probe), "manifest", root=images, arch="tuning:network", size=tuning.SIZE,
                features="pooled", dtype="float32", workers=0, store=tmp_path / f"{probe}.zarr",
            )
        )[0]  # fmt: skip
        opened = featcache.open_store(store)
        assert opened.manifest.identity["weights_sha256"] == tuned.summary["backbones"][probe]
        weights = load_probe(tuned.path, probe).weights
        for role, logits in read_logits(tuned.path, probe).items():
            features = torch.from_numpy(np.array(opened[role]["last:pooled"]))
            torch.testing.assert_close(features @ weights["fc0.weight"].t() + weights["fc0.bias"], logits)


def test_backbone_and_head_are_exported_together(tuned, images, tmp_path):
    (probe, *_) = tuned.summary["backbones"]
    trust.quietly(lambda: featcache.export(run=tuned.path, probe=probe, arch="tuning:network", to=tmp_path / "m.pt2"))
    program = torch.export.load(tmp_path / "m.pt2").module()
    made = tuning.configuration(images, tuning.recipe(), tmp_path)
    from featcache.extraction.images import load_input

    network = made.tuner.network
    pixels = torch.stack([load_input(r, network.backbone.preprocessing) for r in made.task.data.splits["test"][:3]])
    logits = program(network.backbone.preprocessing.normalise(pixels))
    torch.testing.assert_close(logits, read_logits(tuned.path, probe)["test"][:3], rtol=1e-4, atol=1e-5)


def test_damage_is_found_and_mended(tuned, images, tiny, tmp_path):
    import shutil

    place = tmp_path / "run"
    shutil.copytree(tuned.path, place)
    before = {p.name: p.read_bytes() for p in place.rglob("*.safetensors")}
    probes = list(tuned.summary["backbones"])
    backbone, logits = place / "backbones" / f"{probes[0]}.safetensors", place / "logits" / f"{probes[1]}.safetensors"
    data = backbone.read_bytes()
    backbone.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    logits.unlink()
    assert {finding.where for finding in featcache.verify(place)} == {
        f"backbones/{probes[0]}.safetensors", f"logits/{probes[1]}.safetensors",
    }  # fmt: skip
    given = {"root": images, "arch": "tuning:network", "workers": 0, "run": place}
    _, said = trust.quietly(lambda: featcache.finetune(tiny, "manifest", GRID, **given))
    assert "damaged" in said and featcache.verify(place) == []
    assert {p.name: p.read_bytes() for p in place.rglob("*.safetensors")} == before


def test_what_is_finished_is_not_trained_again(tuned, images, tiny, command, tmp_path):
    content = GRID | {
        "probes": [*GRID["probes"], tuning.BASE | {"finetune": {"type": "full", "size": 32}, "epochs": 1}]
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(content))
    stamps = {path: path.stat().st_mtime_ns for path in tuned.path.glob("backbones/*")}
    code, _, err = command(*words(images, tiny, tmp_path / "more.yaml", tuned.path))
    assert code == 0 and len(list(tuned.path.glob("backbones/*"))) == 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    code, _, err = command(*words(images, tiny, tmp_path / "more.yaml", tuned.path))
    assert code == 0 and "is finished already" in err


def test_a_head_may_start_from_a_probe(images, tiny, tmp_path, command):
    """LP-FT: with a rate of next to nothing, the fine-tuned network scores what the probe scored."""
    given = {"arch": "tuning:network", "size": tuning.SIZE, "workers": 0, "features": "pooled", "dtype": "float32"}
    store = trust.quietly(lambda: featcache.extract(tiny, "manifest", root=images, store=tmp_path / "s.zarr", **given))[
        0
    ]
    grid = {"probes": [tuning.BASE | {"optimizer": {"type": "sgd", "lr": [0.5, 0.1]}, "epochs": 20}]}
    probes = trust.quietly(lambda: featcache.train_probes(grid, store=store, run=tmp_path / "probes"))[0]
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(tuning.recipe({"norm": "eval"}, optimizer={"type": "sgd", "lr": 1e-9}, epochs=1))
    )
    code, out, err = command(
        *words(images, tiny, tmp_path / "r.yaml", tmp_path / "run"), "--head-from", tmp_path / "probes"
    )
    assert code == 0, err
    run, best = featcache.open_run(tmp_path / "run"), probes.row(probes.scores[0]["probe"], "map", "test")
    from featcache.probes.runs.run import best as chosen

    (name,) = chosen(probes)
    start = load_probe(probes.path, name).weights["fc0.weight"]
    (tuned,) = run.summary["backbones"]
    torch.testing.assert_close(load_probe(run.path, tuned).weights["fc0.weight"], start, rtol=1e-5, atol=1e-6)
    assert run.row(tuned, "map", "test")["value"] == pytest.approx(probes.row(name, "map", "test")["value"], abs=1e-4)
    assert run.summary["finetuned"]["start"] == name and best is not None
    compared = featcache.compare([probes.path, run.path], [name, tuned])
    assert abs(compared[0].difference) < 1e-4


def test_the_dry_run_says_rates_and_steps(images, tiny, tmp_path, command):
    content = tuning.recipe(
        {"head_lr": 10, "layer_decay": 0.5}, optimizer={"type": "adamw", "lr": 0.2, "weight_decay": 0.1}
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    code, out, err = command(*words(images, tiny, tmp_path / "r.yaml", tmp_path / "run"), "--dry-run", "--measure")
    assert code == 2 and "no numbered blocks" in err
    content["probes"][0]["finetune"]["layer_decay"] = 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    code, out, err = command(*words(images, tiny, tmp_path / "r.yaml", tmp_path / "run"), "--dry-run", "--measure")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert ["backbone", "2", "882", "0.2", "0.1"] in rows and ["head", "1", "24", "2", "0.1"] in rows
    assert ["head", "1", "3", "2", "0"] in rows
    assert "6 steps in all; about" in out and not (tmp_path / "run").exists()


BAD = [
    ({"finetune": None}, {}, "probes[0]: has no finetune section; write finetune: {type: full}, or run train-probes"),
    ({"finetune": {"type": "ful"}}, {}, "finetune.type: 'ful' is not one of full; did you mean 'full'?"),
    ({"finetune": {"type": "full", "head_lrs": 1}}, {}, "head_lrs: unknown field; did you mean 'head_lr'?"),
    ({"head_lr": 10}, {}, "did you mean 'finetune.head_lr'"),
    ({"batch_size": 1}, {}, "probes[0].batch_size: one image at a time has no variance for batch norms"),
    ({"finetune": {"type": "full", "micro_batch": 1}}, {}, "probes[0].finetune: one image at a time has no variance"),
    ({"features": "layer9:pooled"}, {}, "probes[0].features: feature 'layer9:pooled': the backbone has no layer 'layer9'"),
    ({"features": "layer9:cls", "head": "mlp"}, {}, "the backbone has no layer 'layer9'"),
    ({"head": "mlp"}, {}, "probes[0].features: a head of type mlp reads a map; take 5:spatial"),
    ({"optimizer": "lbfgs"}, {}, "the optimizer lbfgs sees all images at once"),
    ({"precision": "bf16"}, {}, "write the mixed precision as finetune.amp"),
    ({"finetune": {"type": "full", "size": 32, "drop_path": 0.1}}, {}, "has no residual branches to drop"),
    ({"finetune": {"type": "full", "mixed": "both"}}, {}, "finetune.mixed: both needs mixup or cutmix"),
    ({"finetune": {"type": "full", "repeats": 9}}, {}, "repeats: 9 copies of an image do not fit into batches of 8"),
    ({"shots": 100}, {}, "probes[0].shots: 100 images of each class are asked for, and class"),
    ({}, {"splits": {"train": "trian"}}, "'trian'"),
    ({}, {"select": {"metric": "top1"}}, "select.metric: 'top1' does not fit multi-label labels"),
    ({}, {"store": "x.zarr"}, "store: fine-tuning reads images; leave it out"),
    ({}, {"search": "halving"}, "search: compares probes of one pass over a store"),
]  # fmt: skip


@pytest.mark.parametrize(("group", "top", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_recipes_are_one_line(images, tiny, tmp_path, command, group, top, message):
    content = tuning.recipe(**group) | top
    if group.get("finetune", 1) is None:
        del content["probes"][0]["finetune"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    code, _, err = command(*words(images, tiny, tmp_path / "r.yaml", tmp_path / "run"))
    assert code == 2 and message in err, err
    assert "Traceback" not in err and not (tmp_path / "run" / "scores.csv").exists()


def test_bad_runs_to_start_from(images, tiny, tuned, tmp_path, store, command):
    """store: of other images, by another network, from conftest.py."""
    grid = {"probes": [tuning.BASE | {"epochs": 1}]}
    trust.quietly(lambda: featcache.train_probes(grid, store=store, run=tmp_path / "other"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tuning.recipe()))
    own = words(images, tiny, tmp_path / "r.yaml", tmp_path / "run")
    code, _, err = command(*own, "--head-from", tmp_path / "other")
    assert code == 2 and "its probes are of dataset voc2007, not manifest" in err
    code, _, err = command(*own, "--select", "best map")
    assert code == 2 and "--select chooses the probe of --head-from" in err
    code, _, err = command(*own, "--head-from", tmp_path / "nothing")
    assert code == 2 and "not found" in err
    code, _, err = command(*own, "--head-from", tuned.path)
    assert code == 2 and "is of another backbone (weights sha256" in err
    code, _, err = command("train-probes", "--grid", tmp_path / "r.yaml", "--store", store, "--run", tmp_path / "x")
    assert (
        code == 2
        and "probes[0].finetune: trains the backbone, which a store does not hold: run featcache finetune" in err
    )
    code, _, err = command("attribute", "--run", tuned.path)
    assert code == 2 and "was fine-tuned on images and has no store; extract with one of its backbones" in err


def program(arguments, **more):
    """The real program, saving its state after every step."""
    code = "import featcache.finetuning.configuration as c; c.SAVE_SECONDS = 0; from featcache.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **more,
    )  # fmt: skip


def files(run):
    return {
        path.relative_to(run): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.suffix in (".safetensors", ".csv")
    }


@pytest.mark.process
def test_kill_9_at_any_moment_changes_no_byte(images, tiny, tmp_path):
    content = tuning.recipe(
        {"ema": 0.9, "mixup": 0.5, "randaugment": 5},
        optimizer={"type": "adamw", "lr": [0.01, 0.1]},
        epochs=4,
        keep="best",
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with program(words(images, tiny, tmp_path / "r.yaml", tmp_path / "whole")) as whole:
        assert whole.wait(120) == 0, whole.stdout.read()
    expected = files(tmp_path / "whole")
    chance, kills = random.Random(0), 0
    for _ in range(4):
        process = program(words(images, tiny, tmp_path / "r.yaml", tmp_path / "run"))
        states, patience = set(), chance.randint(1, 6)
        while kills < 3 and process.poll() is None:
            # A kill while the files are written, or between two steps.
            with contextlib.suppress(FileNotFoundError):
                # The number of a file that is gone is given again.
                written = map(os.stat, (tmp_path / "run" / "partial").glob("*.safetensors*"))
                states |= {(entry.st_ino, entry.st_mtime_ns) for entry in written}
            time.sleep(0.002)
            if len(states) >= patience:
                process.kill()
                break
        kills += process.wait(120) == -signal.SIGKILL
        process.stdout.close()
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills >= 2
    assert files(tmp_path / "run") == expected


@pytest.mark.process
def test_two_ranks_take_the_steps_of_one(images, tmp_path):
    """In parts of two images batches of four are the same for two ranks as for one; sums differ in their last bits."""
    content = tuning.recipe({"micro_batch": 2, "mixup": 0.5, "ema": 0.5}, epochs=3, batch_size=4)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    own = words(images, "random", tmp_path / "r.yaml", tmp_path / "two")
    own[own.index("tuning:network")] = "tuning:plain_network"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "--"]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "featcache", *own], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = tuning.finetune(images, content, tmp_path / "one", arch="tuning:plain_network")
    two = featcache.open_run(tmp_path / "two")
    assert featcache.verify(two.path) == []
    (probe,) = one.summary["backbones"]
    for place in (backbone_path, lambda run, p: run / "logits" / f"{p}.safetensors"):
        first, second = (safetensors.torch.load_file(place(run.path, probe)) for run in (one, two))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)
    assert json.loads((two.path / "run.json").read_text())["probes"] == 1


def test_labels_are_needed(tmp_path):
    with pytest.raises(BadInput):
        featcache.finetune("random", "folder", tuning.recipe(), root=tmp_path, arch="tuning:network")
