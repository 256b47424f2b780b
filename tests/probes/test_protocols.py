"""The recipes of published protocols: row by row what was published, named in docs/protocols.md, and they train."""

import itertools
import re
import shlex
from dataclasses import replace

import click
import pytest
import torch
from folders import CHECKOUT
from layouts import picture
from torch import nn

import featcache
from featcache.cli import cli
from featcache.datasets import DATASETS
from featcache.feature import parse_beside
from featcache.probes.grids.grid import parse_grid, read_grid
from featcache.probes.inputs.batches import epoch_order
from featcache.probes.knn import knn_grid
from featcache.probes.runs.probe_file import find_probes, load_probes

PIPELINES = CHECKOUT / "pipelines"
# Recipes of protocols, as docs/protocols.md and this file name them; how_to_probe and voc07_linear have tests of their own.
FOLDERS = ("openmixup", "vissl", "dino", "dinov2", "mae", "simsiam", "moco_v3", "i_jepa", "capi", "attentive")
RECIPES = sorted(
    path.relative_to(PIPELINES).as_posix() for folder in FOLDERS for path in (PIPELINES / folder).glob("*.yaml")
)
LINEAR = [name for name in RECIPES if not re.search("finetune_|semi_|svm|knn", name)]
BRACKETS = str.maketrans("", "", "[]")
POOLS = "feat1:grid(10,10,4) feat2:grid(16,8,0) feat3:grid(13,5,0) feat4:grid(8,3,0) feat5:grid(6,1,0)"

# What was published, one row for each recipe. rate: at the batch size, after any scaling; of the biases' and the norms'
# decay only what differs from the weights'. step: epochs of the milestones, each a tenth. short, size: pixels of the test
# transform.
PUBLISHED = """
recipe                                     data             features         head       optim  rate     wd    nesterov  smooth  schedule       epochs  batch  short  size
openmixup/imagenet_linear_step             imagenet         last:pooled      linear     sgd    30       0      no       0       step:60,80     100     256    256    224
openmixup/imagenet100_linear_step          imagenet100      last:pooled      linear     sgd    30       0      no       0       step:60,80     100     256    256    224
openmixup/imagenet_swav                    imagenet         last:pooled      linear     sgd    0.3      1e-06  no       0       cosine         100     256    256    224
openmixup/imagenet_simsiam                 imagenet         last:pooled      linear     lars   1.6      0      no       0       cosine         90      4096   256    224
openmixup/imagenet_mocov3_r50              imagenet         last:pooled      linear     sgd    0.4      0      no       0       cosine         90      1024   256    224
openmixup/imagenet_mocov3_vit_small        imagenet         last:cls         linear     sgd    12       0      no       0       cosine         90      1024   256    224
openmixup/imagenet_mae                     imagenet         last:cls         plain-bn   lars   6.4      0      no       0       cosine@10      90      16384  256    224
openmixup/imagenet_vit_small_linear_cos    imagenet         last:cls         linear     sgd    12       0      no       0.1     cosine         90      1024   256    224
openmixup/imagenet_vit_small_linear_step   imagenet         last:cls         linear     sgd    12       0      no       0.1     step:60,80     90      1024   256    224
openmixup/imagenet100_vit_small_linear_cos imagenet100      last:cls         linear     sgd    12       0      no       0.1     cosine         90      1024   256    224
openmixup/imagenet100_vit_small_linear_step imagenet100     last:cls         linear     sgd    12       0      no       0.1     step:60,80     90      1024   256    224
openmixup/imagenet_mhead                   imagenet         POOLS            plain-bn   sgd    0.01     0.0001 yes      0       step:30,60     90      256    256    224
openmixup/place205_mhead                   places205        POOLS            plain-bn   sgd    0.01     0.0001 yes      0       step:7,14,21   28      256    256    224
openmixup/inaturalist2018_mhead            inaturalist2018  POOLS            plain-bn   sgd    0.01     0.0001 yes      0       step:24,48,72  84      256    256    224
openmixup/cifar10_r18_linear_cos           cifar10          last:pooled      linear     sgd    0.1      0      no       0       cosine         100     256    256    224
openmixup/cifar10_r18_linear_step          cifar10          last:pooled      linear     sgd    0.1      0      no       0       step:60,80     100     256    256    224
openmixup/cifar10_r50_linear_cos           cifar10          last:pooled      linear     sgd    0.1      0      no       0       cosine         100     256    256    224
openmixup/cifar100_r18_linear_cos          cifar100         last:pooled      linear     sgd    1        0      no       0       cosine         100     256    256    224
openmixup/cifar100_r18_linear_step         cifar100         last:pooled      linear     sgd    1        0      no       0       step:60,80     100     256    256    224
openmixup/cifar100_r50_linear_cos          cifar100         last:pooled      linear     sgd    0.1      0      no       0       cosine         100     256    256    224
openmixup/cifar100_deit_small_linear       cifar100         last:cls         linear     sgd    1        0      no       0.1     cosine         100     512    256    224
openmixup/stl10_r50_linear_cos             stl10            last:pooled      linear     sgd    1        0      no       0       cosine         100     256    -      96
openmixup/stl10_r50_linear_step            stl10            last:pooled      linear     sgd    1        0      no       0       step:60,80     100     256    -      96
openmixup/stl10_deit_small_linear          stl10            last:cls         linear     sgd    0.1      0      no       0.1     cosine         100     512    -      96
simsiam/linear                             imagenet         last:pooled      linear     lars   1.6      0      no       0       cosine         90      4096   256    224
moco_v3/linear_r50                         imagenet         last:pooled      linear     sgd    0.4      0      no       0       cosine         90      1024   256    224
moco_v3/linear_vit                         imagenet         last:cls         linear     sgd    12       0      no       0       cosine         90      1024   256    224
mae/linear                                 imagenet         last:cls         plain-bn   lars   6.4      0      no       0       cosine@10      90      16384  256    224
vissl/imagenet                             imagenet         POOLS,+2         bn,linear  sgd    0.01     0.0005 yes      0       step:8,16,24   28      256    256    224
vissl/places205                            places205        POOLS,+2         bn,linear  sgd    0.01     0.0005 yes      0       step:4,8,12    14      256    256    224
vissl/inaturalist2018                      inaturalist2018  POOLS,+2         bn,linear  sgd    0.01     0.0005 yes      0       step:24,48,72  84      256    256    224
dino/linear                                imagenet         last4:cls,last:cls+patch_mean linear sgd 0.004 0   no       0       cosine         100     1024   256    224
attentive/v_jepa                           imagenet         last:tokens      attentive  adamw  0.001    0.001  no       0       cosine         20      1024   256    224
attentive/efficient                        imagenet         last:spatial     efficient  lars   1.6      0      no       0       cosine@10      90      4096   256    224
"""
NAMES, *ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]
TABLE = {row[0]: dict(zip(NAMES[1:], row[1:], strict=True)) for row in ROWS}
# Those that resize images as torchvision and Pillow do by default; MMSelfSup's are among them, and OpenMixup's are not.
BILINEAR = {
    "simsiam/linear", "moco_v3/linear_r50", "moco_v3/linear_vit", "vissl/imagenet", "vissl/places205",
    "vissl/inaturalist2018", "openmixup/imagenet_swav", "openmixup/imagenet_simsiam", "openmixup/imagenet_mocov3_r50",
    "openmixup/imagenet_mocov3_vit_small", "openmixup/imagenet_mae",
}  # fmt: skip
# Those whose configurations are a grid.
GRIDS = {"dinov2/linear", "dinov2/logistic", "capi/grid", "i_jepa/linear", "attentive/grid"}


def grid_of(recipe):
    return read_grid(PIPELINES / f"{recipe}.yaml")


def commands_of(recipe):
    """The command lines in the comment at the top of a recipe, without `featcache` and the brackets of what may be left out."""
    lines = (PIPELINES / f"{recipe}.yaml").read_text().splitlines()
    return [
        shlex.split(line.lstrip("# ").translate(BRACKETS))[1:] for line in lines if line.startswith("#   featcache ")
    ]


def option(words, name):
    return words[words.index(name) + 1] if name in words else "-"


def described(spec):
    """A probe in the table's words."""
    head, optimizer, schedule = spec.head, spec.optimizer, spec.schedule
    kind = {"bn_linear": "bn" if getattr(head, "affine", True) else "plain-bn"}.get(head.type, head.type)
    if schedule.type == "cosine":
        when = "cosine" + (f"@{schedule.warmup_epochs:g}" if schedule.warmup_epochs else "")
    else:
        assert (schedule.type, schedule.gamma, schedule.per) == ("step", 0.1, "epoch")
        when = f"step:{','.join(f'{m:g}' for m in schedule.milestones)}"
    return {
        "head": kind,
        "optim": optimizer.type,
        "rate": f"{optimizer.rate(spec.batch_size):g}",
        "wd": f"{optimizer.weight_decay:g}",
        "nesterov": "yes" if getattr(optimizer, "nesterov", False) else "no",
        "smooth": f"{spec.loss.label_smoothing:g}",
        "schedule": when,
        "epochs": str(spec.epochs),
        "batch": str(spec.batch_size),
    }


def expected_features(text):
    names = text.replace("POOLS", POOLS.replace(" ", ";")).replace("+2", "feat5:pooled;feat5:pooled")
    if "POOLS" in text:
        return names.replace(",feat5:pooled", ";feat5:pooled").split(";")
    return text.split(",")


@pytest.mark.parametrize("recipe", TABLE)
def test_a_recipe_is_the_published_configuration(recipe):
    row = dict(TABLE[recipe])
    specs = grid_of(recipe).specs
    features = [spec.features.replace(" ", "") for spec in specs]
    assert sorted(set(features)) == sorted(set(expected_features(row["features"])))
    for spec in specs:
        got = described(spec)
        assert got["head"] in row["head"].split(",")
        assert {name: value for name, value in got.items() if name != "head"} == {
            name: row[name] for name in got if name != "head"
        }
        assert spec.loss.type == "ce" and (spec.keep, spec.seed, spec.precision) == ("last", 0, "float32")
        if spec.head.type in ("linear", "bn_linear"):
            assert (spec.head.init_std, spec.head.bias) == (0.01, True)
        if spec.optimizer.type in ("sgd", "lars"):
            assert spec.optimizer.momentum == 0.9
        assert spec.optimizer.clip == (1 if recipe == "attentive/v_jepa" else 0)
        if spec.optimizer.type == "lars":
            # MMSelfSup has the rule of the paper, the others MoCo v3's.
            form = "paper" if recipe.startswith("openmixup/") else "moco_v3"
            assert (spec.optimizer.form, spec.optimizer.trust) == (form, 0.001)
    extract, train = commands_of(recipe)
    assert option(extract, "--dataset") == row["data"] and row["data"] in DATASETS
    assert (option(extract, "--short-side"), option(extract, "--size")) == (row["short"], row["size"])
    interpolation = "bilinear" if recipe in BILINEAR else "bicubic"
    assert row["short"] == "-" or option(extract, "--interpolation") == interpolation
    assert option(train, "--store") == option(extract, "--store")


# What --parity openmixup makes of OpenMixup's files: the batch with which dist_train_linear.sh starts them on 8 GPUs, and the
# features that theirs have.
LAUNCHED = """
imagenet_linear_step       512   last:pooled
imagenet100_linear_step    512   last:pooled
imagenet_mhead             512   FOUR
place205_mhead             512   FOUR
inaturalist2018_mhead      512   FOUR
cifar10_r18_linear_cos     512   last:pooled
cifar10_r18_linear_step    512   last:pooled
cifar10_r50_linear_cos     512   last:pooled
cifar100_r18_linear_cos    512   last:pooled
cifar100_r18_linear_step   512   last:pooled
cifar100_r50_linear_cos    512   last:pooled
cifar100_deit_small_linear 1024  last:cls
stl10_r50_linear_cos       512   last:pooled
stl10_r50_linear_step      512   last:pooled
stl10_deit_small_linear    1024  last:cls
"""
PARITY = {name: (int(batch), names) for name, batch, names in (line.split() for line in LAUNCHED.strip().splitlines())}


@pytest.mark.parametrize("recipe", PARITY)
def test_parity_is_what_the_published_command_starts(recipe):
    """Nothing else differs from the recipe's default profile."""
    path, (batch, names) = PIPELINES / f"openmixup/{recipe}.yaml", PARITY[recipe]
    default, parity = read_grid(path), read_grid(path, "openmixup")
    features = POOLS.split()[1:] if names == "FOUR" else [names]
    assert [spec.features for spec in parity.specs] == features and len(parity.groups) == len(parity.specs)
    kept = [spec for spec in default.specs if spec.features in features]
    assert list(parity.specs) == [replace(spec, batch_size=batch) for spec in kept]
    assert parity.splits == default.splits and batch == 2 * default.specs[0].batch_size


def test_all_linear_recipes_that_are_launched_otherwise_have_a_profile():
    """The files for 8 GPUs, and MMSelfSup's, are launched as they are named."""
    profiled = {name for name in TABLE if "profiles" in grid_of(name).content}
    assert profiled == {f"openmixup/{name}" for name in PARITY}


def test_the_recipe_of_nearest_neighbours_is_the_commands_grid(images, tmp_path):
    store = featcache.extract(
        "random", "folder", root=images, arch="resnet18", size=32, workers=0, store=tmp_path / "s.zarr"
    )
    given = {"weights": "openmixup", "splits": {"train": "train", "test": "val"}, "metric": "top1"}
    grid, _ = knn_grid(
        store, "last:pooled", None, None, draws=(None, 1, 0), distance=None, leave_one_out=False, **given
    )
    ours, recipe = parse_grid(grid), grid_of("openmixup/imagenet_knn")
    assert ours.specs == recipe.specs and ours.splits == recipe.splits and ours.selection == recipe.selection
    assert ours.reports_all and recipe.reports_all


def test_every_recipe_is_in_the_table():
    assert {f"{name}.yaml" for name in TABLE.keys() | GRIDS} == set(LINEAR)


def test_mae_normalises_as_mae_does():
    for recipe in ("openmixup/imagenet_mae", "mae/linear"):
        (spec,) = grid_of(recipe).specs
        assert (spec.head.affine, spec.head.eps) == (False, 1e-6)


def test_dinov2_has_52_heads_of_four_inputs():
    specs = grid_of("dinov2/linear").specs
    assert len({spec.id for spec in specs}) == 52
    rates = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    for features in ("last:cls", "last:cls + patch_mean", "last4:cls", "last4:cls + patch_mean"):
        own = [spec for spec in specs if spec.features == features]
        assert [spec.optimizer.lr for spec in own] == rates
        assert {spec.optimizer.rate(spec.batch_size) / spec.optimizer.lr for spec in own} == {4.0}
    assert {(s.epochs, s.batch_size, s.schedule.type, s.schedule.per, s.optimizer.weight_decay) for s in specs} == {
        (10, 1024, "cosine", "step", 0.0)
    }


def test_dinov2_regresses_with_45_values_of_c():
    specs = grid_of("dinov2/logistic").specs
    values = sorted(1 / (1_281_167 * spec.optimizer.weight_decay) for spec in specs)
    assert values == pytest.approx((10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist(), rel=1e-5)
    extract, _ = commands_of("dinov2/logistic")
    assert (option(extract, "--short-side"), option(extract, "--size")) == ("224", "224")


def test_i_jepa_has_16_heads_as_vissl_trains_them():
    specs = grid_of("i_jepa/linear").specs
    wanted = itertools.product(
        ("last4:patch_mean", "last:patch_mean"), ("bn_linear", "linear"), (0.1, 0.01), (5e-4, 0.0)
    )
    assert {(s.features, s.head.type, s.optimizer.lr, s.optimizer.weight_decay) for s in specs} == set(wanted)
    assert {
        (s.optimizer.type, s.optimizer.form, s.optimizer.rate(16384) / s.optimizer.lr, s.epochs) for s in specs
    } == {("lars", "moco_v3", 64, 50)}
    assert {(s.schedule.milestones, s.schedule.gamma, s.batch_size) for s in specs} == {((15, 30, 45), 0.1, 16384)}


def test_capi_has_30_heads_of_each_representation():
    specs = grid_of("capi/grid").specs
    count = {features: sum(spec.features == features for spec in specs) for features in {s.features for s in specs}}
    assert count == dict.fromkeys(("last:cls", "last:patch_mean", "last:cls + patch_mean", "last:spatial"), 30)
    assert {(s.optimizer.type, s.optimizer.beta2, s.optimizer.undecayed) for s in specs} == {("adamw", 0.95, "biases")}
    assert {s.optimizer.weight_decay for s in specs} == {5e-4, 1e-3, 5e-2}
    assert {s.schedule.warmup_epochs for s in specs} == {1}


@pytest.mark.parametrize("recipe", [name.removesuffix(".yaml") for name in LINEAR])
def test_the_commands_of_a_recipe_are_commands(recipe):
    """Options and features are known, the grid is this one, and extraction writes what it reads."""
    extract, train = commands_of(recipe)
    written = {part for name in re.split(r",(?![^(]*\))", option(extract, "--features")) for part in [name.strip()]}
    for words in (extract, train):
        # Raises for an option or a value that the command does not know.
        cli.get_command(click.Context(cli), words[0]).make_context(words[0], list(words[1:]))
    assert option(train, "--grid") == f"pipelines/{recipe}.yaml"
    aliases = {
        "last": "L",
        **{f"last-{n}": f"L-{n}" for n in range(1, 4)},
        **{f"feat{n}": f"F{n}" for n in range(1, 6)},
    }
    aliases["feat5"] = "L"
    known = {str(f) for name in written for f in parse_beside(name, aliases)}
    for spec in grid_of(recipe).specs:
        read = {str(f) for f in parse_beside(spec.features, aliases)}
        assert read <= known, (read, known)


# docs/protocols.md


def page():
    return (CHECKOUT / "docs/protocols.md").read_text()


def test_every_recipe_is_named_in_the_page_and_every_named_one_exists():
    text = page()
    named = set(re.findall(r"pipelines/([\w/]+\.yaml)", text))
    assert named <= set(RECIPES), sorted(named - set(RECIPES))
    assert [recipe for recipe in RECIPES if recipe.partition("/")[2] not in text] == []


# Fine-tuning, as OpenMixup's files evaluate. rate, wd: of the backbone; decay: of the rate, layer by layer; warm: epochs;
# final: the smallest rate by the largest; clip: of the gradient; augment: RandAugment's magnitude of 30, where theirs is of 10.
TUNED = """
recipe                  optim  rate    wd    decay  warm  final     epochs  batch  drop  clip  ema      loss  mixup  augment  erase  amp   norm   repeats
rsb_a3                  lamb   0.008   0.02  1      5     0.000125  100     2048   0     0     0        bce   0.1    18       0      fp16  sync   1
convnext_t_rsb_a3       lamb   0.008   0.02  1      5     0.000125  100     2048   0.1   0     0        bce   0.1    18       0      fp16  train  1
r50_rsb_a2              lamb   0.005   0.02  1      5     0.0002    300     2048   0.05  0     0.9999   bce   0.1    21       0      fp16  sync   3
r101_rsb_a2             lamb   0.005   0.02  1      5     0.0002    300     2048   0.1   0     0        bce   0.1    21       0      fp16  sync   3
r152_rsb_a2             lamb   0.005   0.02  1      5     0.0002    300     2048   0.15  0     0        bce   0.1    21       0      fp16  sync   3
r200_rsb_a2             lamb   0.005   0.02  1      5     0.0002    300     2048   0.2   0     0        bce   0.1    21       0      fp16  sync   3
convnext_t_spark        adamw  0.0004  0.01  0.7    5     0.0025    400     4096   0.1   0     0.9999   ce    0.8    27       0.25   fp16  train  1
convnext_s_spark        adamw  0.004   0.05  1      5     0.00025   300     4096   0.4   0     0.9999   ce    0.8    27       0.25   fp16  train  1
convnext_b_spark        adamw  0.004   0.05  1      5     0.00025   300     4096   0.5   0     0.9999   ce    0.8    27       0.25   fp16  train  1
r50                     adamw  0.005   0.05  1      20    0.0002    100     2048   0     0     0        ce    0      0        0      fp16  train  1
r50_swin_192            adamw  0.005   0.05  1      20    0.0002    100     2048   0     0     0        ce    0.8    27       0.25   fp16  train  1
r50_swin_224            adamw  0.005   0.05  1      20    0.0002    100     2048   0     0     0        ce    0.8    27       0.25   fp16  train  1
swin_192                adamw  0.005   0.05  0.9    20    0.0002    100     2048   0.1   5     0        ce    0.8    27       0.25   none  train  1
swin_224                adamw  0.005   0.05  0.9    20    0.0002    100     2048   0.1   5     0        ce    0.8    27       0.25   none  train  1
vit_base_mae            adamw  0.004   0.05  0.65   5     0.00025   100     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
vit_large_mae           adamw  0.002   0.05  0.65   5     0.0005    100     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
vit_huge_mae            adamw  0.002   0.05  0.65   5     0.0005    50      1024   0.3   5     0        ce    0.8    27       0.25   fp16  train  1
vit_base_simmim         adamw  0.01    0.05  0.65   20    0.0001    100     1024   0.1   5     0.99996  ce    0.8    27       0.25   fp16  train  1
vit_large_simmim_ep100  adamw  0.01    0.05  0.65   20    0.0001    100     1024   0.1   5     0.99996  ce    0.8    27       0.25   fp16  train  3
vit_large_simmim_ep150  adamw  0.01    0.05  0.65   20    0.0001    150     1024   0.1   5     0.99996  ce    0.8    27       0.25   fp16  train  3
vit_small_simmim_ep100  adamw  0.01    0.05  0.65   20    0.0001    100     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
vit_small_simmim_ep200  adamw  0.01    0.05  0.65   20    0.0001    200     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
vit_base_cae            adamw  0.008   0.05  0.65   5     0.000125  100     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
deit_small_swin         adamw  0.008   0.05  0.65   5     0.000125  100     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
beit_base               adamw  0.004   0.05  0.65   5     0.00025   100     1024   0.1   5     0        ce    0.8    27       0.25   fp16  train  1
"""
TUNED_NAMES, *TUNED_ROWS = [line.split() for line in TUNED.strip().splitlines()]
TUNING = {row[0]: dict(zip(TUNED_NAMES[1:], row[1:], strict=True)) for row in TUNED_ROWS}


@pytest.mark.parametrize("recipe", TUNING)
def test_a_recipe_of_fine_tuning_is_the_published_one(recipe):
    (spec,) = grid_of(f"openmixup/finetune_{recipe}").specs
    optimizer, tuning = spec.optimizer, spec.finetune
    assert {
        "optim": optimizer.type, "rate": f"{optimizer.lr:g}", "wd": f"{optimizer.weight_decay:g}",
        "decay": f"{tuning.layer_decay:g}", "warm": f"{spec.schedule.warmup_epochs:g}", "final": f"{spec.schedule.final:g}",
        "epochs": str(spec.epochs), "batch": str(spec.batch_size), "drop": f"{tuning.drop_path:g}",
        "clip": f"{optimizer.clip:g}", "ema": f"{tuning.ema:g}", "loss": spec.loss.type, "mixup": f"{tuning.mixup:g}",
        "augment": str(tuning.randaugment), "erase": f"{tuning.erasing:g}", "amp": tuning.amp, "norm": tuning.norm,
        "repeats": str(tuning.repeats),
    } == TUNING[recipe]  # fmt: skip
    assert spec.schedule.type == "cosine" and not tuning.decay_all and optimizer.lr_base == 0
    assert (tuning.cutmix > 0) == (tuning.mixup > 0) and tuning.color_jitter == 0
    assert tuning.interpolation == "bicubic"
    assert (tuning.randaugment_p, tuning.randaugment_ops) == ((0.5, 2) if tuning.randaugment else (1, 2))
    assert spec.loss.type == "bce" or spec.loss.label_smoothing == (0.1 if tuning.mixup else 0)


@pytest.mark.parametrize("recipe", [name for name in TUNING if "rsb" in name])
def test_resnet_strikes_back_takes_both_labels_as_present_and_openmixup_their_shares(recipe):
    path = PIPELINES / f"openmixup/finetune_{recipe}.yaml"
    assert [read_grid(path, parity).specs[0].finetune.mixed for parity in (None, "openmixup")] == ["both", "shares"]


def test_every_recipe_of_fine_tuning_is_in_the_table():
    assert {f"openmixup/finetune_{name}.yaml" for name in TUNING} == {name for name in RECIPES if "finetune_" in name}


@pytest.mark.parametrize(("recipe", "decay"), [("semi_imagenet_1percent", 5e-4), ("semi_imagenet_10percent", 1e-4)])
def test_semi_supervised_recipes_are_the_published_nine(recipe, decay):
    grid, parity = (read_grid(PIPELINES / f"openmixup/{recipe}.yaml", name) for name in (None, "openmixup"))
    specs = grid.specs
    assert grid.specs == parity.specs and grid.reports_all and grid.splits["test"] == ("val",)
    assert not parity.reports_all and parity.chosen_on == "val" and parity.splits["val"] == parity.splits["test"]
    assert {(s.finetune.norm, s.finetune.decay_all, s.finetune.interpolation) for s in specs} == {
        ("sync", True, "bicubic")
    }
    assert {s.optimizer.momentum for s in specs} == {0.9}
    assert {(s.optimizer.lr, s.finetune.head_lr) for s in specs} == {
        (r, h) for r in (0.1, 0.01, 0.001) for h in (1, 10, 100)
    }
    assert {
        (s.optimizer.weight_decay, s.epochs, s.batch_size, s.schedule.milestones, s.schedule.gamma) for s in specs
    } == {(decay, 20, 256, (12, 16), 0.2)}


# They train.


def write_images(root, splits):
    for split, count in splits.items():
        for number in range(count):
            path = root / split / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number + 100 * len(split), 64, 64).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root, {"train": 24, "val": 9})
    return root


@pytest.fixture(scope="module")
def resnet_store(images, tmp_path_factory):
    """All five layers of an untrained ResNet-50 at 224 pixels, from one pass over the images."""
    return featcache.extract(
        "random", "folder", root=images, arch="resnet50", size=224, features=[*POOLS.split(), "pooled"], dtype="float32",
        workers=0, store=tmp_path_factory.mktemp("resnet") / "r.zarr",
    )  # fmt: skip


@pytest.fixture(scope="module")
def vit_store(images, tmp_path_factory):
    return featcache.extract(
        "random", "folder", root=images, arch="vit_tiny_patch16", size=32,
        features="last4:cls,last4:patch_mean,tokens,spatial", dtype="float32", workers=0,
        store=tmp_path_factory.mktemp("vit") / "v.zarr",
    )  # fmt: skip


def shortened(recipe):
    """A recipe's content with two epochs of small batches."""
    content = grid_of(recipe).content
    short = {"epochs": 2, "batch_size": 8}
    return content | {"probes": [g | (short if "epochs" in g else {}) for g in content["probes"]]}


@pytest.mark.process
@pytest.mark.parametrize(
    "recipe",
    ["openmixup/imagenet_linear_step", "openmixup/imagenet_simsiam", "openmixup/imagenet_mhead", "vissl/imagenet"],
)
def test_recipes_of_a_resnet_train(resnet_store, tmp_path, recipe):
    run = featcache.train_probes(shortened(recipe), store=resnet_store, run=tmp_path / "r")
    assert run.summary["probes"] == len(grid_of(recipe).specs)
    assert {row["split"] for row in run.scores} == {"train", "test"}, "the published validation images are the test"


@pytest.mark.process
@pytest.mark.parametrize(
    "recipe",
    ["openmixup/imagenet_mae", "dino/linear", "dinov2/linear", pytest.param("dinov2/logistic", marks=pytest.mark.slow), "i_jepa/linear", "capi/grid",
     "attentive/grid", "attentive/v_jepa", "attentive/efficient"],
)  # fmt: skip
def test_recipes_of_a_vit_train(vit_store, tmp_path, recipe):
    run = featcache.train_probes(shortened(recipe), store=vit_store, run=tmp_path / "r")
    assert run.summary["probes"] == len(grid_of(recipe).specs)


@pytest.mark.parametrize("recipe", [name.removesuffix(".yaml") for name in LINEAR])
def test_every_recipe_can_be_planned(recipe):
    plan = featcache.plan_probes(PIPELINES / f"{recipe}.yaml", store="nowhere.zarr")
    assert plan.probes == len(grid_of(recipe).specs) and "nowhere.zarr" in plan.missing


# Several layers.


def test_pools_are_those_of_the_published_table(resnet_store):
    opened = featcache.open_store(resnet_store)
    shapes = {str(name): tuple(spec["shape"]) for name, spec in opened.manifest.features.items()}
    want = [(64, 12, 12), (256, 6, 6), (512, 4, 4), (1024, 3, 3), (2048, 2, 2), (2048,)]
    assert list(shapes.values()) == want
    assert sum(torch.tensor(shape).prod() for shape in want[:5]) == 44_032


def test_padding_counts_and_channels_come_first():
    from featcache.backbones.load import load_backbone

    backbone = load_backbone("random", arch="resnet50", size=224)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (pooled,) = parse_beside("feat1:grid(10,10,4)", backbone.aliases, backbone.layers)
    (whole,) = parse_beside("feat1:spatial", backbone.aliases, backbone.layers)
    with torch.inference_mode():
        results = backbone(images, [pooled, whole])
    assert results[str(whole)].shape == (2, 64, 112, 112)
    expected = nn.AvgPool2d(10, 10, 4, count_include_pad=True)(results[str(whole)])
    torch.testing.assert_close(results[str(pooled)], expected)


class MultiHead(nn.Module):
    """Published: each pooled map through a batch norm without weights, flattened, a linear layer; losses summed."""

    def __init__(self, shapes, classes):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[0], affine=False) for shape in shapes)
        self.layers = nn.ModuleList(nn.Linear(torch.tensor(shape).prod(), classes) for shape in shapes)

    def forward(self, maps):
        return [layer(norm(m).flatten(1)) for norm, layer, m in zip(self.norms, self.layers, maps, strict=True)]


def test_one_probe_for_each_layer_is_the_summed_loss(resnet_store, tmp_path):
    run = featcache.train_probes(shortened("openmixup/imagenet_mhead"), store=resnet_store, run=tmp_path / "r")
    opened = featcache.open_store(resnet_store)
    probes = {p.spec.features: p for p in load_probes(run.path, find_probes(run.path))}
    names = [str(opened.manifest.feature(name)) for name in POOLS.split()]
    maps = [torch.from_numpy(opened["train"][name][:]).double() for name in names]
    labels = torch.from_numpy(opened["train"].labels)
    model = MultiHead([m.shape[1:] for m in maps], 3).double().train()
    from featcache.probes.weights import initial_weights

    with torch.no_grad():
        for name, layer in zip(names, model.layers, strict=True):
            start = initial_weights(probes[name].spec, layer.in_features, 3)
            layer.weight.copy_(start["fc0.weight"])
            layer.bias.copy_(start["fc0.bias"])
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True)
    for epoch in range(2):
        for rows in epoch_order(24, 0, epoch).split(8):
            optimizer.zero_grad()
            outputs = model([m[rows] for m in maps])
            sum(nn.functional.cross_entropy(out, labels[rows]) for out in outputs).backward()
            optimizer.step()
    for name, layer, norm in zip(names, model.layers, model.norms, strict=True):
        weights = probes[name].weights
        torch.testing.assert_close(weights["fc0.weight"].double(), layer.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(weights["bn.running_mean"].double(), norm.running_mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights["bn.running_var"].double(), norm.running_var, rtol=1e-4, atol=1e-6)
