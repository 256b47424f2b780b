"""What a step of fine-tuning is: an ordinary loop of torch, whatever is accumulated, averaged, scaled or killed."""

import copy
import csv
import math

import pytest
import torch
import trust
import tuning
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

import featcache
from featcache.device import multiplying
from featcache.finetuning import configuration as room
from featcache.finetuning import draws
from featcache.finetuning.drop_path import DropPath, set_drop_path
from featcache.finetuning.images import mix
from featcache.probes.tuning import Full


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return trust.write_images(root)


def assert_near(first, second, **limits):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **limits)


def plain_loop(made, optimizer, steps_of_average=None):
    """Train the network of a Configuration as one would write it, and return its tensors and their average."""
    network, spec = copy.deepcopy(made.tuner.network), made.spec
    network.train()
    optimizer = optimizer(network)
    loader = made._loaded(0, 0)
    average = {k: v.clone() for k, v in network.state_dict().items()}
    for epoch in range(spec.epochs):
        for batch in made._batches(epoch):
            pixels = next(loader)
            inputs = network.backbone.preprocessing.normalise(pixels)
            logits, labels = network(inputs), made.labels[torch.from_numpy(batch)]
            known = labels >= 0
            loss = F.binary_cross_entropy_with_logits(logits[known], (labels == 1).float()[known])
            optimizer.zero_grad()
            loss.backward()
            if spec.optimizer.clip:
                nn.utils.clip_grad_norm_(network.parameters(), spec.optimizer.clip)
            optimizer.step()
            for name, value in network.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 0.1)
                else:
                    average[name].copy_(value)
    return network.state_dict(), average


def split_parameters(network, head_lr, decay):
    """torch's parameter groups: the head's rate times head_lr, no decay of vectors."""
    groups = []
    for part, rate in ((network.trunk, 1.0), (network.head, head_lr)):
        for vectors in (False, True):
            own = [p for p in part.parameters() if (p.ndim <= 1) == vectors]
            groups.append({"params": own, "lr": 0.1 * rate, "weight_decay": 0.0 if vectors else decay})
    return groups


def test_it_is_an_ordinary_loop_with_sgd(images, tmp_path):
    content = tuning.recipe({"head_lr": 10}, optimizer={"type": "sgd", "lr": 0.1, "weight_decay": 0.01, "clip": 0.5})
    made = tuning.configuration(images, content, tmp_path)
    expected, _ = plain_loop(made, lambda n: torch.optim.SGD(split_parameters(n, 10, 0.01), momentum=0.9))
    assert_near(tuning.trained(images, content, tmp_path), expected, rtol=1e-5, atol=1e-6)


def test_it_is_an_ordinary_loop_with_adamw_and_an_average(images, tmp_path):
    content = tuning.recipe({"ema": 0.9}, optimizer={"type": "adamw", "lr": 0.1, "weight_decay": 0.01})
    # Without batch norm, before which a bias has no gradient but noise, on which Adam would go its way.
    made = tuning.configuration(images, content, tmp_path, arch="tuning:plain_network")
    _, expected = plain_loop(made, lambda n: torch.optim.AdamW(split_parameters(n, 1, 0.01)))
    weights = tuning.trained(images, content, tmp_path, arch="tuning:plain_network")
    assert_near(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "ce", "focal"])
def test_parts_add_up_to_the_whole_batch(images, tmp_path, loss):
    """20 images in batches of 7, 7 and 6, in parts of at most 2."""
    whole, parts = (
        tuning.trained(images, tuning.recipe({"micro_batch": size}, loss=loss), tmp_path, arch="tuning:plain_network")
        for size in (0, 2)
    )
    assert_near(whole, parts, rtol=1e-4, atol=1e-6)


def test_workers_change_nothing(images, tmp_path):
    content = tuning.recipe({"randaugment": 9, "color_jitter": 0.4, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0})
    alone, helped, other = (
        tuning.finetune(images, content, tmp_path / name, workers=workers, seed=seed)
        for name, workers, seed in (("a", 0, 0), ("b", 2, 0), ("c", 0, 1))
    )
    weights = [
        {path.name: path.read_bytes() for path in sorted(run.path.glob("[bpl]*/*.safetensors"))}
        for run in (alone, helped, other)
    ]
    assert weights[0] == weights[1] and weights[0] != weights[2]


def test_the_crops_are_those_of_extractions_views(images, tmp_path):
    """Epoch e sees view e + 1: the same pixels, at the same place of the dataset."""
    from featcache.datasets import read_dataset
    from featcache.extraction.images import read_input
    from featcache.extraction.views import plan_views

    made = tuning.configuration(images, tuning.recipe(seed=5), tmp_path)
    data = read_dataset("manifest", images)
    views = plan_views(data, 2, 5)
    order, pixels = made._batches(1)[0], next(made._loaded(1, 0))
    crops = views.augmentation.draw(made.sizes, 5, 2)
    for row, image in zip(order, pixels, strict=True):
        expected, _ = read_input(
            data.splits["train"][row], made.tuner.network.backbone.preprocessing, "pillow", crops[row].tolist()
        )
        assert torch.equal(expected, image)


def test_repeated_images_are_augmented_anew_and_lie_apart(images, tmp_path):
    """An epoch of 20 images, each three times in its batch, sees 7 of them."""
    content = tuning.recipe({"repeats": 3, "mixup": 0.5}, batch_size=10, epochs=2)
    made = tuning.configuration(images, content, tmp_path)
    seen = made._batches(0)
    assert [len(batch) for batch in seen] == [9, 6, 6] and made.steps == 3
    for batch in seen:
        rows = made._rows(batch)
        assert torch.equal(rows, rows[: len(rows) // 3].repeat(3)) and len(rows.unique()) == len(rows) // 3
    assert len(set().union(*(made._rows(batch).tolist() for batch in seen))) == 7
    # Two processes never have copies of one image alone.
    halves = [made._rows(part) for part in draws.parts(seen[0], 0, 3)]
    assert all(torch.equal(half, halves[0]) for half in halves)
    first, second, third = next(made._loaded(0, 0)).split(3)
    assert not any(
        torch.equal(a, b) for one, two in ((first, second), (second, third)) for a, b in zip(one, two, strict=True)
    )
    weights = tuning.trained(images, content, tmp_path / "all")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_an_operation_of_randaugment_is_left_out_at_times(images, tmp_path):
    kept = [
        tuning.recipe({"randaugment": 27, "randaugment_ops": 1, "randaugment_p": p, "crop_scale": [1, 1]})
        for p in (1, 1e-9)
    ]
    plain = tuning.recipe({"crop_scale": [1, 1]})
    changed, never, same = (next(tuning.configuration(images, r, tmp_path)._loaded(0, 0)) for r in (*kept, plain))
    assert torch.equal(never, same) and not torch.equal(changed, same)


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_a_mixed_image_has_both_labels(images, tmp_path, kind):
    """The gradient is that of cross-entropy with the mixed target."""
    made = tuning.configuration(images, tuning.recipe(kind, loss="ce"), tmp_path)
    inputs = torch.rand(4, 3, 8, 8)
    torch.manual_seed(3)
    mixed, share = mix(inputs, Full(**kind))
    assert 0 < share < 1 and not torch.equal(mixed, inputs)
    if "mixup" in kind:
        torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs.roll(1, 0))
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.eye(3, dtype=torch.int8)[[0, 1, 2, 0]]
    loss, slope = made.tuner._loss(logits.detach().unsqueeze(1), labels, share)
    target = share * labels.float() + (1 - share) * labels.roll(1, 0).float()
    expected = F.cross_entropy(logits, target)
    expected.backward()
    torch.testing.assert_close(loss.squeeze(), expected.detach())
    torch.testing.assert_close(slope.squeeze(1), logits.grad)


def test_both_labels_of_a_mixed_image_can_be_present(images, tmp_path):
    made = tuning.configuration(images, tuning.recipe({"cutmix": 1.0, "mixed": "both"}), tmp_path)
    logits, labels = torch.randn(4, 3), torch.eye(3, dtype=torch.int8)[[0, 1, 2, 0]]
    loss, _ = made.tuner._loss(logits.unsqueeze(1), labels, 0.7)
    target = torch.maximum(labels, labels.roll(1, 0)).float()
    torch.testing.assert_close(loss.squeeze(), F.binary_cross_entropy_with_logits(logits, target))


def test_without_batch_norm_statistics_stay(images, tmp_path):
    stayed = tuning.trained(images, tuning.recipe({"norm": "eval"}), tmp_path)
    moved = tuning.trained(images, tuning.recipe(), tmp_path)
    assert torch.equal(stayed["trunk.1.running_mean"], torch.zeros(6))
    assert not torch.equal(moved["trunk.1.running_mean"], torch.zeros(6))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_near(images, tmp_path, amp):
    exact, near = (tuning.trained(images, tuning.recipe({"amp": kind}), tmp_path) for kind in ("none", amp))
    for name in ("trunk.0.weight", "head.layers.fc0.weight"):
        torch.testing.assert_close(near[name], exact[name], rtol=0.1, atol=0.02)
        assert not torch.equal(near[name], exact[name])


def test_a_loss_scale_that_is_too_large_is_halved_and_the_step_left_out(images, tmp_path):
    made = tuning.configuration(images, tuning.recipe({"amp": "fp16"}), tmp_path)
    tuner, before = made.tuner, made.tuner.network.head_weights()
    for parameter in tuner.update.parameters:
        parameter.grad = torch.full_like(parameter, math.inf)
    assert not tuner._gradients_are_usable() and tuner.scale == 2.0**15
    for parameter in tuner.update.parameters:
        parameter.grad = torch.full_like(parameter, 2.0**15)
    assert tuner._gradients_are_usable() and float(tuner.update.parameters[0].grad.max()) == 1
    assert all(torch.equal(before[k], v) for k, v in tuner.network.head_weights().items())


def test_a_configuration_that_diverges_is_marked(images, tmp_path):
    content = tuning.recipe(optimizer={"type": "sgd", "lr": [0.1, 1e30]})
    given = {"root": images, "arch": "tuning:network", "workers": 0, "run": tmp_path / "run"}
    run, said = trust.quietly(lambda: featcache.finetune("random", "manifest", content, **given))
    (wild,) = run.summary["diverged"]
    assert f"warning: {wild} (lr 1e+30) diverged in epoch 1, at step 2; its scores are empty" in said
    assert [row["value"] for row in run.scores if row["probe"] == wild] == [None] * sum(
        r["probe"] == wild for r in run.scores
    )
    assert not (run.path / "backbones" / f"{wild}.safetensors").exists()
    assert tuning.finetune(images, content, tmp_path / "run").scores[0]["probe"] == run.scores[0]["probe"]


def test_what_images_are_trained_on_is_said(images, tmp_path):
    """The sizes of the recipe, not those of the weights."""
    given = {"root": images, "arch": "tuning:network", "workers": 0, "run": tmp_path / "run"}
    content = tuning.recipe({"size": 40, "train_size": 32, "interpolation": "bicubic"}, epochs=1)
    said = trust.quietly(lambda: featcache.finetune("random", "manifest", content, **given))[1]
    assert "40x40 (bicubic)" in said and "; in training 32x32" in said and "224x224" not in said


def test_the_best_epoch_is_kept(images, tmp_path):
    content = tuning.recipe(keep="best", patience=2, epochs=6, optimizer={"type": "sgd", "lr": 0.5})
    run = tuning.finetune(images, content, tmp_path / "run")
    history = run.table("history.csv", val_map=float, epoch=int)
    scores = [row["val_map"] for row in history]
    best = scores.index(max(scores)) + 1
    (row,) = [r for r in run.scores if r["split"] == "val" and r["metric"] == "map"]
    assert int(row["epoch"]) == best and row["value"] == pytest.approx(max(scores), abs=1e-6)
    assert len(scores) == 6 or len(scores) == best + 2


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "tuned", [{}, {"ema": 0.9, "mixup": 0.8, "amp": "fp16", "micro_batch": 3, "repeats": 2}], ids=str
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "lars"])
def test_a_state_holds_all_of_it(images, tmp_path, monkeypatch, tuned, optimizer):
    """Stopped after every single step, each time gone on from the file: the same bits."""
    content = tuning.recipe(tuned, optimizer={"type": optimizer, "lr": 0.05, "weight_decay": 0.01}, keep="best")
    expected = tuning.trained(images, content, tmp_path / "whole")
    monkeypatch.setattr(room, "SAVE_SECONDS", 0)
    (tmp_path / "probes").mkdir()
    for stop in range(10):  # noqa: B007
        made = tuning.configuration(images, content, tmp_path)
        save = made._save

        def saved_once(save=save):
            save()
            raise Killed

        made._save = saved_once
        try:
            with multiplying("float32"):
                made.train()
            break
        except Killed:
            assert made.state.exists()
    assert stop == 6 and not made.state.exists()
    for name, tensor in made.tuner.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_damaged_state_is_dropped_with_a_notice(images, tmp_path, monkeypatch):
    content = tuning.recipe()
    expected = tuning.finetune(images, content, tmp_path / "whole")
    (probe,) = expected.summary["backbones"]
    monkeypatch.setattr(room, "SAVE_SECONDS", 0)
    save = room.Configuration._save

    def saved_once(self):
        save(self)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(room.Configuration, "_save", saved_once)
        tuning.finetune(images, content, tmp_path / "run")
    state = tmp_path / "run" / "partial" / f"{probe}.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    given = {"root": images, "arch": "tuning:network", "workers": 0, "run": tmp_path / "run"}
    run, said = trust.quietly(lambda: featcache.finetune("random", "manifest", content, **given))
    assert f"partial/{probe}.safetensors: its checksum does not fit its content" in said and not state.exists()
    name = f"backbones/{probe}.safetensors"
    assert (run.path / name).read_bytes() == (expected.path / name).read_bytes()


def test_single_labels(images, tmp_path):
    """A class for each image, mixed and smoothed, chosen by top-1."""
    with open(images, newline="") as file:
        rows = [f"{row['path']},{row['labels'].split(';')[-1]},{row['split']}" for row in csv.DictReader(file)]
    (images.parent / "single.csv").write_text("\n".join(["path,label,split", *rows]))
    content = tuning.recipe({"mixup": 0.8, "cutmix": 1.0}, loss={"type": ["ce", "bce"], "label_smoothing": 0.1})
    content["probes"] += tuning.recipe({"mixup": 0.8, "mixed": "both"})["probes"]
    run = tuning.finetune(images.parent / "single.csv", content, tmp_path / "run")
    assert run.metric == "top1" and len(run.summary["backbones"]) == 3 and featcache.verify(run.path) == []


def timm_scales(name, decay, weight_decay):
    """{id of a parameter: (scale, decay)} by timm's own function, and the network."""
    import timm

    network = timm.create_model(name, num_classes=3)
    undecayed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    groups = param_groups_layer_decay(network, weight_decay, undecayed, layer_decay=decay)
    return network, {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_s3_tiny_224", "convnext_atto", "resnet18"],
)
def test_layers_decay_as_timms_do(images, tmp_path, name):
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.families.timm_models import timm_architecture
    from featcache.backbones.load import as_backbone
    from featcache.finetuning.groups import parameter_groups
    from featcache.finetuning.network import Network
    from featcache.probes.grids.grid import parse_grid

    network, expected = timm_scales(name, 0.65, 0.05)
    architecture = timm_architecture(f"timm:{name}")
    backbone = as_backbone(architecture, network, "")
    assert isinstance(backbone, Backbone)
    content = tuning.recipe(
        {"layer_decay": 0.65, "size": 0}, optimizer={"type": "adamw", "lr": 1, "weight_decay": 0.05}
    )
    (spec,) = parse_grid(content).specs
    made = Network(backbone, network, spec, 3)
    groups = {id(p): (g.scale, g.decay) for g in parameter_groups(made) for p in g.parameters if g.name != "head"}
    assert len(groups) > 50
    for name, parameter in made.layers.items():
        assert groups[id(parameter)] == pytest.approx(expected[id(parameter)]), name


def test_other_networks_layers_are_read_by_their_numbers():
    """torchvision's networks as timm's own rule for the same networks: so many parameters in each layer."""
    from collections import Counter

    import timm
    from torchvision import models

    from featcache.finetuning.depth import depths

    for name, classifier, other in (
        ("resnet18", "fc", "resnet18"), ("vit_b_32", "heads", "vit_base_patch32_224"), ("swin_t", "head", "swin_tiny_patch4_window7_224"),
    ):  # fmt: skip
        ours = models.get_model(name)
        setattr(ours, classifier, nn.Identity())
        theirs = timm.create_model(other)
        theirs.reset_classifier(0)
        (layers, head), (expected, last) = depths(ours, name), depths(theirs, other)
        assert Counter(layers.values()) == Counter(expected.values()) and head == last


def test_drop_path_rises_to_its_share_and_keeps_the_mean():
    import timm

    network = timm.create_model("vit_tiny_patch16_224", depth=4)
    assert set_drop_path(network, 0.3) == 4
    shares = [network.blocks[i].drop_path1.share for i in range(4)]
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3])
    drop = DropPath(0.3).train()
    torch.manual_seed(0)
    dropped = drop(torch.ones(20_000, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7]) and abs(float(dropped.mean()) - 1) < 0.02
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_resnets_drop_what_a_block_adds(source):
    """With all branches of the last block dropped, the block returns its input."""
    import timm
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18() if source == "torchvision" else timm.create_model("resnet18")
    images, before = torch.rand(2, 3, 32, 32), network.eval()(torch.rand(2, 3, 32, 32) * 0 + 0.5)
    names = set(network.state_dict())
    assert set_drop_path(network, 0.5) == 8 and set(network.state_dict()) == names
    assert torch.equal(network.eval()(torch.full((2, 3, 32, 32), 0.5)), before)
    last = network.layer4[1].train()
    last.drop_path.share = 1 - 1e-9
    maps = torch.rand(2, 512, 2, 2)
    assert torch.equal(last(maps.clone()), maps)
    assert network.layer1[0].drop_path.share == 0 and network(images).shape == (2, 1000)
