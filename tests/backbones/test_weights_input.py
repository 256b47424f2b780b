"""The input of the weights at hand: torchvision's, timm's, OpenCLIP's, what files say, and what is a guess."""

import json
import math
from dataclasses import replace

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from layouts import picture
from open_clip.pretrained import _PRETRAINED
from torchvision import models
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import InterpolationMode

from featcache.backbones import ARCHITECTURES
from featcache.backbones.families import vit
from featcache.backbones.input.preprocessing import OWN, preprocessing_of
from featcache.backbones.input.stated import timm_input
from featcache.backbones.load import load_backbone
from featcache.backbones.recognise import _without_memory
from featcache.store.manifest import read_manifest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


# Of sides that every rule rounds differently.
PHOTO = picture(1, height=601, width=803)


def same_pixels(preprocessing, transform):
    """Whether an image becomes what a public transform makes of it."""
    got = preprocessing.normalise(preprocessing.apply(PHOTO)[None])[0]
    torch.testing.assert_close(got, transform(PHOTO), rtol=0, atol=2e-6)


def input_of(path, **options):
    """The weights' own transform of a checkpoint, and what is said of it."""
    backbone = load_backbone(path, **{"resize": OWN} | options)
    return backbone.preprocessing, "\n".join(backbone.preprocessing_report)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_the_default_is_torchvisions_transform(name):
    weights = models.get_model_weights(name).DEFAULT
    preset, (found, _) = weights.transforms(), preprocessing_of(ARCHITECTURES[name], resize=OWN)
    assert ([found.size], [found.short], found.resize) == (preset.crop_size, preset.resize_size, "crop")
    assert (list(found.mean), list(found.std)) == (preset.mean, preset.std)
    assert found.interpolation == preset.interpolation.value
    same_pixels(found, preset)


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return models.resnet50().state_dict()


def saved(folder, content, name="x.pth"):
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.process
def test_which_of_torchvisions_weights(resnet50, tmp_path):
    """V1 has short side 256 and V2 232, and their tensors have the same shapes."""
    found, said = input_of(saved(tmp_path, resnet50))
    assert found.short == 232
    assert said == "short side: torchvision's IMAGENET1K_V2 assumed (--short-side 256 for IMAGENET1K_V1)"
    for name, short in (("resnet50-0676ba61.pth", 256), ("tv-resnet50-11ad3fa6.pth", 232)):
        found, said = input_of(saved(tmp_path, resnet50, name))
        assert found.short == short and "by the file's name" in said
    # Someone's own: without torchvision's classifier, or in the wrapper of a training script.
    own = {k: v for k, v in resnet50.items() if not k.startswith("fc.")}
    script = {"state_dict": {f"module.{k}": v for k, v in resnet50.items()}}
    for content in (own, script, own | {"fc.weight": torch.zeros(20, 2048), "fc.bias": torch.zeros(20)}):
        found, said = input_of(saved(tmp_path, content))
        assert found.short == 256 and said.startswith(
            "short side: torchvision's IMAGENET1K_V1 assumed (--short-side 232"
        )
    moco = {"state_dict": {f"module.encoder_{x}.{k}": v for x in "qk" for k, v in own.items()}}
    found, said = input_of(saved(tmp_path, moco))
    assert found.short == 256 and "a guess: 256 for a crop of 224" in said
    assert load_backbone("random", arch="resnet50", resize="crop").preprocessing.short == 256
    # What the user says, or the dataset's protocol does not need, is not a guess.
    assert input_of(tmp_path / "x.pth", short_side=250)[1] == input_of(tmp_path / "x.pth", resize="squash")[1] == ""
    # The ratio stays at another size.
    assert input_of(saved(tmp_path, resnet50), size=448)[0].short == 464


def test_the_size_tells_the_weights(tmp_path):
    with _without_memory():
        shapes = models.vit_b_16(image_size=384).state_dict()
    tensors = {k: torch.zeros(v.shape) for k, v in shapes.items()}
    found, said = input_of(saved(tmp_path, tensors))
    assert (found.size, found.short, found.interpolation, said) == (384, 384, "bicubic", "")


def timm_names():
    return [n for n in timm.list_pretrained() if len(set(timm.get_pretrained_cfg(n).input_size[1:])) == 1]


def geometry(transform):
    """(short side or (both sides), crop, interpolation) of a torchvision-like transform for testing."""
    resize = next(t for t in transform.transforms if isinstance(t, Resize))
    crop = next((t for t in transform.transforms if isinstance(t, CenterCrop)), None)
    return resize.size, crop and crop.size, resize.interpolation


def test_every_pretrained_cfg_of_timm():
    """Compared with what timm makes of its configurations; those that pad or squash before the crop say so."""
    names, odd, seen = timm_names(), [], set()
    for name in names:
        config = timm.get_pretrained_cfg(name).to_dict()
        data = timm.data.resolve_data_config(pretrained_cfg=config)
        fields, notices = timm_input(data)
        made, _ = preprocessing_of(replace(ARCHITECTURES["resnet18"], **fields), resize=OWN)
        assert (made.mean, made.std) == (data["mean"], data["std"]), name
        assert (made.size, made.interpolation) == (data["input_size"][1], data["interpolation"]), name
        if notices:
            odd.append(name)
            continue
        transform = timm.data.create_transform(**data)
        resize, crop, how = geometry(transform)
        assert how == InterpolationMode(made.interpolation), name
        if made.resize == "squash":
            assert tuple(resize) == tuple(crop) == (made.size, made.size), name
        else:
            assert (resize, tuple(crop)) == (made.short, (made.size, made.size)), name
        if made not in seen and made.size < 300:
            same_pixels(made, transform)
        seen.add(made)
    assert len(names) > 1500 and len(odd) < 0.02 * len(names), odd


def test_a_name_of_timm_takes_its_transform():
    for name in ("test_vit.r160_in1k", "test_resnet.r160_in1k"):
        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        made = load_backbone("random", arch=f"timm:{name}", resize=OWN).preprocessing
        assert (made.size, made.short) == (160, math.floor(160 / data["crop_pct"])) and made.mean == data["mean"]
    said = load_backbone("random", arch="timm:resnet18", resize=OWN).preprocessing_report
    assert "a guess; --arch timm:resnet18.TAG" in "".join(said)


def test_efficientnet_lite_as_timm_has_it():
    # The sizes of the other two are those of the full networks there.
    for version in range(3):
        config = timm.get_pretrained_cfg(f"tf_efficientnet_lite{version}").to_dict()
        found = ARCHITECTURES[f"efficientnet_lite{version}"]
        assert found.size == config["input_size"][1]
        assert found.short_side == math.floor(found.size / config["crop_pct"])


def with_classes(tensors, config):
    """A ViT's tensors with the classifier of a configuration."""
    named = {k: v for k, v in ARCHITECTURES["vit"].named(dict(tensors)).items() if k != "head.weight"}
    head = torch.empty(config.num_classes, tensors["blocks.0.attn.qkv.weight"].shape[1], device="meta")
    return named | ({"head.weight": head} if config.num_classes else {})


@pytest.mark.process
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_published_vits_of_timm(step):
    """By tensors alone: every published input that is another than the one taken must have been called a guess."""
    right = total = 0
    archs = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
    for arch in archs[::step]:
        tags = [n for n in timm.list_pretrained(f"{arch}.*")]
        if not tags:
            continue
        with torch.device("meta"):
            tensors = timm.create_model(arch, num_classes=timm.get_pretrained_cfg(tags[0]).num_classes).state_dict()
        for tag in tags:
            config = timm.get_pretrained_cfg(tag)
            if vit.SIGNATURE not in tensors or (made := vit.infer(with_classes(tensors, config), {})) is None:
                continue
            total += 1
            same = (made.mean, made.std) == (tuple(config.mean), tuple(config.std))
            right += same
            assert same or "a guess" in made.origins.get("mean", ""), tag
    assert total > 150 / step and right > 0.85 * total, (right, total)


def small_vit(**more):
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.models.vision_transformer.VisionTransformer(**sizes | more).state_dict()


def siglip():
    return small_vit(class_token=False, global_pool="map")


def test_openclips_towers_as_openclip_prepares_them(tmp_path):
    """A SigLIP and a CLIP built by timm: with OpenCLIP's keys and as timm's files."""
    towers = {
        "ViT-B-16-SigLIP/webli": siglip(),
        "MobileCLIP2-L-14/dfndr2b": small_vit(pre_norm=True),
    }
    for name, tensors in towers.items():
        model, tag = name.split("/")
        config = _PRETRAINED[model][tag]
        found, _ = input_of(saved(tmp_path, {f"visual.trunk.{k}": v for k, v in tensors.items()}))
        assert (found.mean, found.std) == (config["mean"], config["std"])
        assert (found.interpolation, found.resize == "squash") == (
            config["interpolation"], config["resize_mode"] == "squash",
        )  # fmt: skip
        transform = open_clip.image_transform(
            64, is_train=False, **{k: config[k] for k in ("resize_mode", "mean", "std")}
        )
        resize = next(t for t in transform.transforms if isinstance(t, Resize)).size
        assert resize == ((64, 64) if found.resize == "squash" else 64) and found.short == 64
        bare, said = input_of(saved(tmp_path, tensors))
        assert (bare.mean, bare.std) == (found.mean, found.std) and "mean" not in said
    backbone = load_backbone(saved(tmp_path, small_vit(pre_norm=True)))
    assert backbone.trunk.blocks[0].norm1.eps == 1e-5 and backbone.arch.endswith("_eps1e-05")


@pytest.mark.parametrize(
    "name", ["clip_rn50", "clip_rn50x4_no_attnpool", "clip_vit_b32", "clip_vit_l14", "clip_vit_b16_gelu"]
)
def test_clips_own_transform(name):
    found, _ = preprocessing_of(ARCHITECTURES[name], resize=OWN)
    transform = open_clip.image_transform(found.size, is_train=False)
    assert geometry(transform) == (found.short, (found.size, found.size), InterpolationMode(found.interpolation))
    assert (found.mean, found.std) == CLIP


def test_a_guess_is_said_and_the_user_ends_it(tmp_path):
    path = saved(tmp_path, small_vit())
    found, said = input_of(path)
    assert (found.mean, found.std) == IMAGENET and "mean, std: a guess: ImageNet's" in said and "AugReg" in said
    found, said = input_of(path, mean=HALF[0], std=HALF[1], short_side=64)
    assert (found.mean, found.std, found.short, said) == (*HALF, 64, "")
    tensors = small_vit(embed_dim=384)
    moco = {"state_dict": {f"module.{x}_encoder.{k}": v for x in ("base", "momentum") for k, v in tensors.items()}}
    found, said = input_of(saved(tmp_path, moco))
    assert (found.mean, found.interpolation, found.short) == (IMAGENET[0], "bilinear", 73) and "mean" not in said


def test_slip_is_no_clip(tmp_path):
    """SLIP's ViTs lie under visual.*, as OpenAI's CLIP, but are timm's, trained with ImageNet's mean."""
    found, said = input_of(saved(tmp_path, {f"visual.{k}": v for k, v in small_vit(embed_dim=384).items()}))
    assert (found.mean, found.std, found.short, found.interpolation) == (*IMAGENET, 64, "bilinear")
    assert "a guess: as of SLIP" in said


TIMM = {
    "architecture": "vit_tiny", "num_classes": 0,
    "pretrained_cfg": {
        "input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    },
}  # fmt: skip
HUGGING_FACE = {
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 3, "do_resize": True,
    "size": {"shortest_edge": 70}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64},
}  # fmt: skip
OPEN_CLIP = {
    "model_cfg": {"vision_cfg": {"image_size": 64}},
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("config.json", TIMM, (64, 71, "crop", "bilinear", *HALF)),
        ("config.json", TIMM["pretrained_cfg"], (64, 71, "crop", "bilinear", *HALF)),
        ("preprocessor_config.json", HUGGING_FACE, (64, 70, "crop", "bicubic", (0.5, 0.4, 0.3), (0.2,) * 3)),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 64, "resample": 2},
            (64, 64, "squash", "bilinear", *HALF),
        ),
        (
            "preprocessor_config.json",
            {"do_normalize": False, "size": {"height": 80, "width": 80}},
            (80, 80, "squash", "bicubic", (0, 0, 0), (1, 1, 1)),
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 64}, "crop_pct": 0.875},
            (64, 73, "crop", "bicubic", *HALF),
        ),
        ("open_clip_config.json", OPEN_CLIP, (64, 64, "squash", "bicubic", *HALF)),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_what_lies_beside_the_weights(tmp_path, name, config, expected, folder):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(small_vit(), path)
    (tmp_path / name).write_text(json.dumps(config))
    found, said = input_of(tmp_path if folder else path)
    assert (found.size, found.short, found.resize, found.interpolation, found.mean, found.std) == expected
    assert f"std: from {name}" in said and "mean, std: a guess" not in said


def test_timms_own_file_is_read_back(tmp_path):
    """As timm writes it for the hub."""
    network = timm.create_model("test_vit", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8})
    timm.models.save_for_hf(network, tmp_path, safe_serialization="both")
    found, _ = input_of(tmp_path)
    assert (found.size, found.short, found.mean) == (160, 200, (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        ("{", "config.json is not used: "),
        ("[1]", None),
        ('{"learning_rate": 1}', None),
        ('{"pretrained_cfg": {"mean": [1, 2], "std": [1, 1, 1]}}', "config.json is not used: its mean is not three numbers"),
        ('{"mean": [123.6, 116.2, 103.5]}', "config.json is not used: its mean is not three numbers in 0..1"),
        ('{"mean": "abc"}', "config.json is not used: "),
        ('{"mean": 3}', "config.json is not used: "),
        ('{"mean": [0.5, 0.5, 0.5], "input_size": [3, "a", "a"]}', "config.json is not used: its size is 'a'"),
        ('{"mean": [0.5, 0.5, 0.5], "interpolation": "lanczos"}', "says interpolation lanczos, which is not known here"),
        ("[" * 100000, "config.json is not used: "),
        ("\x00\xff", "config.json is not used: "),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_config_is_a_notice(tmp_path, text, notice):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    backbone = load_backbone(saved(tmp_path, small_vit()))
    assert (notice in backbone.load_report) if notice else ("config.json" not in backbone.load_report)
    assert backbone.preprocessing.interpolation == "bicubic" and "\n\n" not in backbone.load_report


MMPRETRAIN = """
auto_scale_lr = dict(base_batch_size=1024)
data_preprocessor = dict(
    mean=[127.5, 127.5, 127.5], num_classes=1000, std=[51.0, 51.0, 102.0], to_rgb=True)
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0])
model = dict(backbone=dict(type='VisionTransformer'), init=some.name, type='ImageClassifier')
"""


def test_the_checkpoints_own_meta(tmp_path):
    tensors = {f"backbone.{k}": v for k, v in small_vit().items()}
    found, said = input_of(saved(tmp_path, {"meta": {"cfg": MMPRETRAIN, "epoch": 3}, "state_dict": tensors}))
    assert (found.mean, found.std, found.bgr) == ((0.5,) * 3, (0.2, 0.2, 0.4), False)
    assert "mean, std: from the checkpoint's meta" in said
    # mmcls's form; channels as OpenCV reads them, in the network's order.
    text = "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 2.0], to_rgb=False)"
    found, _ = input_of(saved(tmp_path, {"meta": {"config": text}, "state_dict": tensors}))
    assert found.bgr and found.mean == pytest.approx(IMAGENET[0]) and found.describe()["bgr"] is True
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.tensor([1.0, 1.0, 2.0])
    expected = (pixels.flip(1) - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(found.normalise(pixels), expected, rtol=1e-5, atol=1e-4)
    # OpenMixup's form, of pixels in 0..1.
    text = "train = dict(pipeline=[dict(type='Normalize', mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])])"
    found, _ = input_of(saved(tmp_path, {"meta": {"config": text}, "state_dict": tensors}))
    assert (found.mean, found.std, found.bgr) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), False)
    # What is beside goes after what is inside, and differing is said.
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    backbone = load_backbone(saved(tmp_path, {"meta": {"cfg": MMPRETRAIN}, "state_dict": tensors}), resize=OWN)
    assert backbone.preprocessing.std == (0.2, 0.2, 0.4) and backbone.preprocessing.short == 71
    assert "config.json says another std, which is not used" in backbone.load_report
    for text in ("model = dict(", "x = " + "(" * 5000, 3):
        backbone = load_backbone(saved(tmp_path, {"meta": {"cfg": text}, "state_dict": tensors}), mean=(0, 0, 0))
        assert ("the checkpoint's meta is not used" in backbone.load_report) == isinstance(text, str)


def test_what_export_wrote_is_read_back(tmp_path, command):
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    saved(tmp_path, small_vit())
    (tmp_path / "other").mkdir()
    for name in ("a.safetensors", "b.pth"):
        assert command("export", tmp_path / "x.pth", "--to", tmp_path / "other" / name)[0] == 0
        assert input_of(tmp_path / "other" / name)[0] == input_of(tmp_path / "x.pth")[0]


def test_extract_says_it_and_keeps_it(tmp_path, command):
    """Whole images of one label are squashed for SigLIP and cropped for others; a multi-label protocol squashes all."""
    for number, split in enumerate(("train", "val", "test")):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            picture(number * 2 + (name == "b")).save(tmp_path / "data" / split / name / f"{number}{name}.png")
    path = saved(tmp_path, {f"visual.trunk.{k}": v for k, v in siglip().items()})
    words = ["extract", "--dataset", "folder", "--root", tmp_path / "data", "--workers", 0, "--features", "pooled"]
    code, _, err = command(*words, "--backbone", path, "--store", tmp_path / "a.zarr")
    assert code == 0 and "preprocessing: squash to 64x64 (bicubic), mean 0.5,0.5,0.5, std 0.5,0.5,0.5\n" in err
    assert read_manifest(tmp_path / "a.zarr").identity["preprocessing"]["resize"] == "squash"
    assert command(*words, "--backbone", path, "--resize", "crop", "--store", tmp_path / "b.zarr")[0] == 0
    assert read_manifest(tmp_path / "b.zarr").identity["preprocessing"]["short_side"] == 64
    path = saved(tmp_path, small_vit())
    code, _, err = command(*words, "--backbone", path, "--store", tmp_path / "c.zarr")
    assert code == 0 and "short side to 73, then centre crop 64x64 (bicubic), mean 0.485" in err
    assert "\n  mean, std: a guess: ImageNet's, as of DINO" in err and "(--mean, --std to differ)\n" in err
    # What is learnt of the weights later makes another store, and says which field.
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    code, _, err = command(*words, "--backbone", path, "--store", tmp_path / "c.zarr")
    assert code == 2 and "preprocessing.mean" in err and "preprocessing.short_side: 73 -> 71" in err
