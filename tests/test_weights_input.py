"""The input of the weights at hand: torchvision's, timm's, OpenCLIP's, what files say, and what is a guess."""

import json
import math
from dataclasses import replace

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from open_clip.pretrained import _PRETRAINED
from torchvision import models
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import InterpolationMode

from featcache.backbones import ARCHITECTURES, vit
from featcache.backbones.load import load_backbone
from featcache.backbones.preprocessing import OWN, preprocessing_of
from featcache.backbones.recognise import _without_memory
from featcache.backbones.stated_input import timm_input

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def input_of(path, **options):
    """The weights' own transform of a checkpoint, and what is said of it."""
    backbone = load_backbone(path, **{"resize": OWN} | options)
    return backbone.preprocessing, "\n".join(backbone.preprocessing_grounds)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_the_default_is_torchvisions_transform(name):
    weights = models.get_model_weights(name).DEFAULT
    preset, (found, _) = weights.transforms(), preprocessing_of(ARCHITECTURES[name], resize=OWN)
    assert ([found.size], [found.short], found.resize) == (preset.crop_size, preset.resize_size, "crop")
    assert (list(found.mean), list(found.std)) == (preset.mean, preset.std)
    assert found.interpolation == preset.interpolation.value


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return models.resnet50().state_dict()


def saved(folder, content, name="x.pth"):
    torch.save(content, folder / name)
    return folder / name


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
        assert found.short == 256 and said.startswith("short side: torchvision's IMAGENET1K_V1 assumed (--short-side 232")
    moco = {"state_dict": {f"module.encoder_{x}.{k}": v for x in "qk" for k, v in own.items()}}
    found, said = input_of(saved(tmp_path, moco))
    assert found.short == 256 and "as self-supervised methods evaluate; a guess" in said
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
    names, odd = timm_names(), []
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
        resize, crop, how = geometry(timm.data.create_transform(**data))
        assert how == InterpolationMode(made.interpolation), name
        if made.resize == "squash":
            assert tuple(resize) == tuple(crop) == (made.size, made.size), name
        else:
            assert (resize, tuple(crop)) == (made.short, (made.size, made.size)), name
    assert len(names) > 1500 and len(odd) < 0.02 * len(names), odd


def test_a_name_of_timm_takes_its_transform():
    for name in ("test_vit.r160_in1k", "test_resnet.r160_in1k"):
        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        made = load_backbone("random", arch=f"timm:{name}", resize=OWN).preprocessing
        assert (made.size, made.short) == (160, math.floor(160 / data["crop_pct"])) and made.mean == data["mean"]
    said = load_backbone("random", arch="timm:resnet18", resize=OWN).preprocessing_grounds
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


def test_the_published_vits_of_timm():
    """By tensors alone: every published input that is another than the one taken must have been called a guess."""
    right = total = 0
    for arch in (*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")):
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
            assert same or "a guess" in made.said.get("mean", ""), tag
    assert total > 250 and right > 0.9 * total, (right, total)
