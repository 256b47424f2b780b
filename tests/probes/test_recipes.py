"""The recipes: what those of How-to-Probe expand to, row by row, and that they train."""

import pytest
from folders import CHECKOUT
from parts import every_field

import featcache
from featcache.probes.grids.grid import parse_grid, read_grid

PIPELINES = CHECKOUT / "pipelines"
PARITY = "how-to-probe"

# The 66 published configurations, by the names of their files, as those train. Of every one besides: hidden
# layers of 2048, B-cos layers with b = 2 and one response a unit, no weight decay. off: target of an absent class.
PUBLISHED = """
config                                                                             head    bias  norm  offset    loss  off  optim  lr     mom  schedule             epochs  batch  features  difficult
resnet50_std-linear-postavgpool-no-bias_bce_4xb64-linear-steplr-100e_in1k          linear  no    none  0         bce   1/C  sgd    30     0.9  step:60,80           100     512    pooled    -
resnet50_std-linear-postavgpool-no-bias_ce_4xb64-linear-steplr-100e_in1k           linear  no    none  0         ce    0    sgd    30     0.9  step:60,80           100     512    pooled    -
resnet50_std-linear-postavgpool-with-bias_bce_4xb64-linear-steplr-100e_in1k        linear  yes   none  0         bce   1/C  sgd    30     0.9  step:60,80           100     512    pooled    -
resnet50_std-linear-postavgpool-with-bias_ce_4xb64-linear-steplr-100e_in1k         linear  yes   none  0         ce    0    sgd    30     0.9  step:60,80           100     512    pooled    -
resnet50_std-2-linear-postavgpool-no-bias_bce_4xb64-linear-steplr-100e_in1k        mlp-2   no    bn    -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-2-linear-postavgpool-no-bias_ce_4xb64-linear-steplr-100e_in1k         mlp-2   no    bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-2-linear-postavgpool-with-bias_bce_4xb64-linear-steplr-100e_in1k      mlp-2   yes   bn    0         bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-2-linear-postavgpool-with-bias_ce_4xb64-linear-steplr-100e_in1k       mlp-2   yes   bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-3-linear-postavgpool-no-bias_bce_4xb64-linear-steplr-100e_in1k        mlp-3   no    bn    -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-3-linear-postavgpool-no-bias_ce_4xb64-linear-steplr-100e_in1k         mlp-3   no    bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-3-linear-postavgpool-with-bias_bce_4xb64-linear-steplr-100e_in1k      mlp-3   yes   bn    0         bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-3-linear-postavgpool-with-bias_ce_4xb64-linear-steplr-100e_in1k       mlp-3   yes   bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_bcos-linear-1-postavgpool_bce_4xb64-linear-steplr-100e_in1k               bcos-1  no    none  -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_bcos-linear-1-postavgpool_ce_4xb64-linear-steplr-100e_in1k                bcos-1  no    none  -ln(C-1)  ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_bcos-linear-2-postavgpool_bce_4xb64-linear-steplr-100e_in1k               bcos-2  no    bnu   -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_bcos-linear-2-postavgpool_ce_4xb64-linear-steplr-100e_in1k                bcos-2  no    bnu   -ln(C-1)  ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_bcos-linear-3-postavgpool_bce_4xb64-linear-steplr-100e_in1k               bcos-3  no    bnu   -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_bcos-linear-3-postavgpool_ce_4xb64-linear-steplr-100e_in1k                bcos-3  no    bnu   -ln(C-1)  ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
resnet50_std-linear-postavgpool-with-bias_bce_4xb64-coslr-100e_in1k                linear  yes   none  0         bce   1/C  adam   0.001  0    cosine:warm5@0.01    100     512    pooled    -
resnet50_std-linear-postavgpool-with-bias_ce_4xb64-coslr-100e_in1k                 linear  yes   none  0         ce    0    adam   0.001  0    cosine:warm5@0.01    100     512    pooled    -
bcosresnet50_std-linear-postavgpool-no-bias_bce_4xb64-linear-steplr-100e_in1k      linear  no    none  0         bce   1/C  sgd    30     0.9  step:60,80           100     512    pooled    -
bcosresnet50_std-linear-postavgpool-no-bias_ce_4xb64-linear-steplr-100e_in1k       linear  no    none  0         ce    0    sgd    30     0.9  step:60,80           100     512    pooled    -
bcosresnet50_std-linear-postavgpool-with-bias_bce_4xb64-linear-steplr-100e_in1k    linear  yes   none  0         bce   1/C  sgd    30     0.9  step:60,80           100     512    pooled    -
bcosresnet50_std-linear-postavgpool-with-bias_ce_4xb64-linear-steplr-100e_in1k     linear  yes   none  0         ce    0    sgd    30     0.9  step:60,80           100     512    pooled    -
bcosresnet50_std-2-linear-postavgpool-no-bias_bce_4xb64-linear-steplr-100e_in1k    mlp-2   no    bnu   -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-2-linear-postavgpool-no-bias_ce_4xb64-linear-steplr-100e_in1k     mlp-2   no    bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-2-linear-postavgpool-with-bias_bce_4xb64-linear-steplr-100e_in1k  mlp-2   yes   bnu   0         bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-2-linear-postavgpool-with-bias_ce_4xb64-linear-steplr-100e_in1k   mlp-2   yes   bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-3-linear-postavgpool-no-bias_bce_4xb64-linear-steplr-100e_in1k    mlp-3   no    bnu   -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-3-linear-postavgpool-no-bias_ce_4xb64-linear-steplr-100e_in1k     mlp-3   no    bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-3-linear-postavgpool-with-bias_bce_4xb64-linear-steplr-100e_in1k  mlp-3   yes   bnu   0         bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-3-linear-postavgpool-with-bias_ce_4xb64-linear-steplr-100e_in1k   mlp-3   yes   bn    0         ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_bcos-linear-1-postavgpool_bce_4xb64-linear-steplr-100e_in1k           bcos-1  no    none  -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_bcos-linear-1-postavgpool_ce_4xb64-linear-steplr-100e_in1k            bcos-1  no    none  -ln(C-1)  ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_bcos-linear-2-postavgpool_bce_4xb64-linear-steplr-100e_in1k           bcos-2  no    bnu   -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_bcos-linear-2-postavgpool_ce_4xb64-linear-steplr-100e_in1k            bcos-2  no    bnu   -ln(C-1)  ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_bcos-linear-3-postavgpool_bce_4xb64-linear-steplr-100e_in1k           bcos-3  no    bnu   -ln(C-1)  bce   1/C  sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_bcos-linear-3-postavgpool_ce_4xb64-linear-steplr-100e_in1k            bcos-3  no    bnu   -ln(C-1)  ce    0    sgd    30     0.9  step:60,80           100     512    spatial   -
bcosresnet50_std-linear-postavgpool-no-bias_bce_4xb64-coslr-100e_in1k              linear  no    none  0         bce   1/C  adam   0.001  0    cosine:warm5@0.01    100     512    pooled    -
bcosresnet50_std-linear-postavgpool-no-bias_ce_4xb64-coslr-100e_in1k               linear  no    none  0         ce    0    sgd    0.001  0    cosine:warm5@0.01    100     512    pooled    -
bcosresnet50_std-2-linear-postavgpool-no-bias_bce_4xb64-coslr-100e_in1k            mlp-2   no    bnu   -ln(C-1)  bce   1/C  adam   0.001  0    cosine:warm5@0.01    100     512    spatial   -
bcosresnet50_std-3-linear-postavgpool-no-bias_bce_4xb64-coslr-100e_in1k            mlp-3   no    bnu   -ln(C-1)  bce   1/C  adam   0.001  0    cosine:warm5@0.01    100     512    spatial   -
resnet50frozen-multilabellinearclshead_4xb16_coco14-448px                          linear  yes   none  0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     pooled    -
resnet50frozen-multilabelstd-2-linearclshead_4xb16_coco14-448px                    mlp-2   yes   bn    0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
resnet50frozen-multilabelstd-3-linearclshead_4xb16_coco14-448px                    mlp-3   yes   bn    0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
resnet50frozen-multilabelbcos-1-linearclshead_4xb16_coco14-448px                   bcos-1  no    none  0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
resnet50frozen-multilabelbcos-2-linearclshead_4xb16_coco14-448px                   bcos-2  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
resnet50frozen-multilabelbcos-3-linearclshead_4xb16_coco14-448px                   bcos-3  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
bcosresnet50frozen-multilabellinearclshead_4xb16_coco14-448px                      linear  no    none  0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     pooled    -
bcosresnet50frozen-multilabelstd-2-linearclshead_4xb16_coco14-448px                mlp-2   no    bnu   0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
bcosresnet50frozen-multilabelstd-3-linearclshead_4xb16_coco14-448px                mlp-3   no    bnu   0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
bcosresnet50frozen-multilabelbcos-1-linearclshead_4xb16_coco14-448px               bcos-1  no    none  0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
bcosresnet50frozen-multilabelbcos-2-linearclshead_4xb16_coco14-448px               bcos-2  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
bcosresnet50frozen-multilabelbcos-3-linearclshead_4xb16_coco14-448px               bcos-3  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   -
resnet50frozen-multilabellinearclshead_4xb16_voc07-224px                           linear  yes   none  0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     pooled    negative
resnet50frozen-multilabelstd-2-linearclshead_4xb16_voc07-224px                     mlp-2   yes   bn    0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
resnet50frozen-multilabelstd-3-linearclshead_4xb16_voc07-224px                     mlp-3   yes   bn    0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
resnet50frozen-multilabelbcos-1-linearclshead_4xb16_voc07-224px                    bcos-1  no    none  0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
resnet50frozen-multilabelbcos-2-linearclshead_4xb16_voc07-224px                    bcos-2  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
resnet50frozen-multilabelbcos-3-linearclshead_4xb16_voc07-224px                    bcos-3  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
bcosresnet50frozen-multilabellinearclshead_4xb16_voc07-224px                       linear  no    none  0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     pooled    negative
bcosresnet50frozen-multilabelstd-2-linearclshead_4xb16_voc07-224px                 mlp-2   no    bnu   0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
bcosresnet50frozen-multilabelstd-3-linearclshead_4xb16_voc07-224px                 mlp-3   no    bnu   0         bce   0    sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
bcosresnet50frozen-multilabelbcos-1-linearclshead_4xb16_voc07-224px                bcos-1  no    none  0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
bcosresnet50frozen-multilabelbcos-2-linearclshead_4xb16_voc07-224px                bcos-2  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
bcosresnet50frozen-multilabelbcos-3-linearclshead_4xb16_voc07-224px                bcos-3  no    bnu   0         bce   1/C  sgd    30     0.9  every:6,warm1@1e-07  50      64     spatial   negative
"""
NAMES, *ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]
CONFIGS = {row[0]: dict(zip(NAMES[1:], row[1:], strict=True)) for row in ROWS}

# What the default profile has in place of it, by the end of the files' names.
IN1K = "_4xb64-linear-steplr-100e_in1k"
CORRECTED = {
    f"{backbone}_std-{layers}-linear-postavgpool-no-bias_bce{IN1K}": {"offset": "0"}
    for backbone in ("resnet50", "bcosresnet50")
    for layers in (2, 3)
} | {
    f"bcosresnet50_std-{layers}-linear-postavgpool-{bias}-bias_ce{IN1K}": {"norm": "bnu"}
    for layers in (2, 3)
    for bias in ("no", "with")
} | {
    "bcosresnet50_std-2-linear-postavgpool-no-bias_bce_4xb64-coslr-100e_in1k": {"offset": "0"},
    "bcosresnet50_std-3-linear-postavgpool-no-bias_bce_4xb64-coslr-100e_in1k": {"offset": "0"},
    "bcosresnet50_std-linear-postavgpool-no-bias_ce_4xb64-coslr-100e_in1k": {"optim": "adam"},
} | {name: {"difficult": "-"} for name in CONFIGS if name.endswith("voc07-224px")}  # fmt: skip

RECIPES = {
    f"{dataset}_{recipe}resnet50": (backbone, suffix)
    for dataset, suffix in (("in1k", "in1k"), ("coco14", "coco14-448px"), ("voc07", "voc07-224px"))
    for recipe, backbone in (("", "resnet50"), ("bcos_", "bcosresnet50"))
}


def described(spec):
    """A probe in the table's words."""
    sections = ("head", "loss", "optimizer", "schedule")
    head, loss, optimizer, schedule = (every_field(name, getattr(spec, name)) for name in sections)
    assert head.type == "linear" or head.layers == 1 or head.hidden == 2048
    assert head.type != "bcos" or (head.b, head.max_out) == (2, 1)
    assert (head.temperature, head.pool, head.activation) == (1, "after", "relu")
    assert (loss.label_smoothing, loss.class_weights) == (0, "none")
    assert (optimizer.weight_decay, optimizer.nesterov, optimizer.clip, optimizer.lr_base) == (0, False, 0, 0)
    assert (spec.seed, spec.views, spec.keep, spec.patience, spec.precision) == (0, None, "last", 0, "float32")
    if schedule.type == "cosine":
        assert (schedule.per, schedule.final) == ("epoch", 0)
        when = f"cosine:warm{schedule.warmup_epochs:g}@{schedule.warmup_start:g}"
    else:
        assert (schedule.type, schedule.gamma, schedule.per) == ("step", 0.1, "epoch")
        when = f"step:{','.join(f'{m:g}' for m in schedule.milestones)}"
        if schedule.every:
            when = f"every:{schedule.every:g},warm{schedule.warmup_epochs:g}@{schedule.warmup_start:g}"
    return {
        "head": "linear" if head.type == "linear" else f"{head.type}-{head.layers}",
        "bias": "yes" if head.bias else "no",
        "norm": head.norm,
        "offset": str(head.offset) if isinstance(head.offset, str) else f"{head.offset:g}",
        "loss": loss.type,
        "off": loss.off_label if isinstance(loss.off_label, str) else f"{loss.off_label:g}",
        "optim": optimizer.type,
        "lr": f"{optimizer.lr:g}",
        "mom": f"{optimizer.momentum:g}",
        "schedule": when,
        "epochs": str(spec.epochs),
        "batch": str(spec.batch_size),
        "features": spec.features.removeprefix("last:"),
        "difficult": "-" if loss.difficult == "ignored" else loss.difficult,
    }


def wanted(recipe, parity):
    backbone, suffix = RECIPES[recipe]
    rows = {name: row for name, row in CONFIGS.items() if name.startswith(backbone) and name.endswith(suffix)}
    return rows if parity else {name: row | CORRECTED.get(name, {}) for name, row in rows.items()}


def grid_of(recipe, parity=None):
    return read_grid(PIPELINES / "how_to_probe" / f"{recipe}.yaml", parity)


def test_the_table_is_complete():
    assert len(CONFIGS) == 66 and CORRECTED.keys() <= CONFIGS.keys()
    counts = {recipe: len(wanted(recipe, PARITY)) for recipe in RECIPES}
    assert counts == {
        "in1k_resnet50": 20,
        "in1k_bcos_resnet50": 22,
        "coco14_resnet50": 6,
        "coco14_bcos_resnet50": 6,
        "voc07_resnet50": 6,
        "voc07_bcos_resnet50": 6,
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("parity", [None, PARITY], ids=["default", PARITY])
def test_recipes_are_the_published_configurations(recipe, parity):
    expected = sorted(sorted(row.items()) for row in wanted(recipe, parity).values())
    specs = grid_of(recipe, parity).specs
    assert sorted(sorted(described(spec).items()) for spec in specs) == expected
    for spec in specs:
        # Four GPUs, each with batch norms of its own.
        head = every_field("head", spec.head)
        assert head.norm_batch == (spec.batch_size // 4 if parity and head.norm != "none" else 0)


def test_splits_and_choosing():
    for recipe in RECIPES:
        default, parity = grid_of(recipe), grid_of(recipe, PARITY)
        assert default.chosen_on == parity.chosen_on == "val"
        assert default.metric == parity.metric == ("top1" if recipe.startswith("in1k") else "map")
        if recipe.startswith("voc07"):
            assert default.splits == {"train": ("train",), "val": ("val",), "test": ("test",)}
            assert parity.splits == {"train": ("train", "val"), "val": ("test",), "test": ("test",)}
        else:
            assert default.splits == parity.splits and "test" not in default.content["splits"]


def short(recipe, parity, epochs):
    """A recipe's content with fewer epochs."""
    content = grid_of(recipe, parity).content
    return content | {"probes": [group | {"epochs": epochs} for group in content["probes"]]}


@pytest.mark.process
def test_the_voc_recipe_trains(store, tmp_path):
    runs = {}
    for parity in (None, PARITY):
        content = short("voc07_resnet50", parity, 2)
        assert [s.id for s in parse_grid(content).specs] == [s.id for s in parse_grid(content, parity=parity).specs]
        runs[parity] = featcache.train_probes(content, store=store, run=tmp_path / str(parity))
    default, parity = runs[None], runs[PARITY]
    assert default.summary["rows"] == {"train": 40, "val": 20, "test": 20} and default.summary["parity"] is None
    assert parity.summary["rows"] == {"train": 60, "val": 20, "test": 20} and parity.summary["parity"] == PARITY
    assert {r["loss.difficult"] for r in default.scores} == {"ignored"}
    assert {r["loss.difficult"] for r in parity.scores} == {"negative"}
    for run in runs.values():
        assert {(r["head.type"], r["head.layers"]) for r in run.scores} == {
            ("linear", "1"), ("mlp", "2"), ("mlp", "3"), ("bcos", "1"), ("bcos", "2"), ("bcos", "3")
        }  # fmt: skip
        again = read_grid(run.path / "grid.yaml")
        assert {s.loss.difficult for s in again.specs} == {r["loss.difficult"] for r in run.scores}
        assert again.splits["val"] == (("test",) if run is parity else ("val",))
    for row in parity.scores:
        if row["split"] == "val":
            assert row["value"] == parity.row(row["probe"], row["metric"], "test")["value"]


def test_parity_from_the_command_line(store, tmp_path, command):
    path = PIPELINES / "how_to_probe" / "voc07_bcos_resnet50.yaml"
    (tmp_path / "g.yaml").write_text(f"include: {path}\nexclude: [{{head: mlp}}, {{head: {{layers: [2, 3]}}}}]\n")
    words = ["train-probes", "--grid", tmp_path / "g.yaml", "--store", store, "--run", tmp_path / "r"]
    code, out, err = command(*words, "--parity", PARITY)
    assert code == 0 and "best 2 of 2 probes" in out, err
    code, _, err = command(*words)
    assert code == 2 and "was made with splits" in err
    code, _, err = command(*words, "--parity", "how-to-prob")
    assert code == 2 and "parity: the grid has no profile 'how-to-prob'; did you mean 'how-to-probe'?" in err


@pytest.mark.slow
@pytest.mark.parametrize("parity", [None, PARITY], ids=["default", PARITY])
def test_the_voc_recipe_at_full_length(store, tmp_path, parity):
    grid = PIPELINES / "how_to_probe" / "voc07_resnet50.yaml"
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r", parity=parity)
    losses = run.summary["probes"], run.summary["diverged"]
    assert losses[0] == 6 and len(losses[1]) < 6
    healthy = [r for r in run.scores if r["split"] == "train" and r["metric"] == "map" and r["value"] is not None]
    assert max(r["value"] for r in healthy) > run.summary["chance"]["train"]["map"] + 0.1
