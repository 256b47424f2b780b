"""transformers' vision models by `hf:FOLDER`: features equal the models' own outputs."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import featcache
from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.feature import parse_features

SIDE, PATCH, WIDTH = 32, 8, 32
VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
VIDEO = {"frames_per_clip": 2, "tubelet_size": 2, "pred_hidden_size": 48, "pred_num_attention_heads": 2}
SAM = {"mlp_dim": 64, "global_attn_indexes": [1], "window_size": 2, "output_channels": 16}
# {name: (configuration, tokens before the patches, whether the first is a class token)}.
MODELS = {
    "vit": (transformers.ViTConfig(**VIT), 1, True),
    "deit": (transformers.DeiTConfig(**VIT), 2, True),
    "vit_msn": (transformers.ViTMSNConfig(**VIT), 1, True),
    "ijepa": (transformers.IJepaConfig(**VIT), 0, False),
    "dinov2": (transformers.Dinov2Config(**VIT), 1, True),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig(**VIT, num_register_tokens=4), 5, True),
    "dinov3_vit": (transformers.DINOv3ViTConfig(**VIT, num_register_tokens=4), 5, True),
    "siglip": (transformers.SiglipConfig(vision_config=VIT, text_config=TEXT), 0, False),
    "clip": (transformers.CLIPConfig(vision_config=VIT, text_config=TEXT), 1, True),
    "vjepa2": (
        transformers.VJEPA2Config(**VIT | VIDEO | {"hidden_size": 48}, crop_size=SIDE, pred_num_hidden_layers=1), 0, False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model with random weights once: saved(name) -> (model, folder)."""
    made = {}

    def save(name, config=None):
        if name not in made:
            folder = tmp_path_factory.mktemp("hf") / name
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(config or MODELS[name][0]).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) / 5)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return save


def load(folder, **more):
    return load_backbone(folder, **{"arch": f"hf:{folder}", "resize": "own"} | more)


def run(backbone, images, names):
    with torch.no_grad():
        return list(backbone(images, parse_features(names, backbone.aliases, backbone.layers)).values())


def outputs_of(model, images):
    """What transformers' own model returns for images [B, 3, H, W]."""
    model = getattr(model, "vision_model", model)
    more = {"output_hidden_states": True}
    if model.config.model_type == "vjepa2":
        with torch.no_grad():
            return model(images[:, None].expand(-1, 2, -1, -1, -1), skip_predictor=True, **more)
    if images.shape[-1] != SIDE and model.config.model_type not in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        more["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return model(images, **more)


@pytest.mark.parametrize("side", [SIDE, 48])
@pytest.mark.parametrize("name", MODELS)
def test_features_equal_the_models_own_outputs(saved, name, side):
    model, folder = saved(name)
    _, prefix, cls = MODELS[name]
    backbone = load(folder, size=side)
    images = torch.randn(2, 3, side, side)
    if name == "vjepa2" and side != SIDE:
        # Its own positions are those of the configuration's size.
        config = transformers.VJEPA2Config.from_dict(model.config.to_dict() | {"crop_size": side})
        other = transformers.AutoModel.from_config(config).eval()
        other.load_state_dict(model.state_dict())
        model = other
    own = outputs_of(model, images)
    last = own.last_hidden_state
    if name == "clip":
        # The class token after the norm is CLIP's pooled output; its last hidden state is before it.
        last = model.vision_model.post_layernorm(last).detach()
        assert torch.equal(run(backbone, images, "cls")[0], own.pooler_output)
    block = backbone.aliases["last-1"].split("+")[0]
    tokens, map_, pooled, mean, before = run(
        backbone, images, f"tokens,spatial,pooled,last-1:patch_mean,{block}:tokens"
    )
    grid = side // PATCH
    assert torch.equal(tokens, last) and tokens.shape[1] == prefix + grid * grid
    assert torch.equal(map_, last[:, prefix:].transpose(1, 2).unflatten(2, (grid, grid)))
    assert torch.equal(pooled, last[:, prefix:].mean(1)) and torch.equal(before, own.hidden_states[-2])
    norm = backbone.trunk.get_submodule(backbone.aliases["last"])
    with torch.no_grad():
        expected = norm(own.hidden_states[-2])[:, prefix:].mean(1)
    assert torch.allclose(mean, expected, atol=1e-6)
    assert backbone.class_token == cls and backbone.arch.startswith(f"hf:{name}-")
    if cls:
        assert torch.equal(run(backbone, images, "cls")[0], last[:, 0])
    assert f"loader: transformers {transformers.__version__}" in backbone.load_report
    assert ("the class token" in backbone.load_report) == cls and f"patches of {PATCH} pixels" in backbone.load_report
    assert ("4 registers" in backbone.load_report) == (prefix == 5)


def test_sams_maps_have_their_channels_first(saved):
    config = transformers.SamVisionConfig(**{k: v for k, v in VIT.items() if k != "intermediate_size"}, **SAM)
    model, folder = saved("sam_vision_model", config)
    backbone, images = load(folder), torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        own = model(images, output_hidden_states=True)
    last, block = run(backbone, images, "spatial,vision_encoder.layers.1:spatial")
    assert torch.equal(last, own.last_hidden_state) and last.shape[1] == 16
    assert torch.equal(block, own.hidden_states[2].permute(0, 3, 1, 2)) and block.shape[1] == WIDTH
    assert torch.equal(run(backbone, images, "vision_encoder.neck:spatial")[0], last)
    with pytest.raises(BadInput, match="SAM's encoder takes images of 32 pixels alone: --size 32"):
        load(folder, size=64)


def test_the_input_is_that_of_the_preprocessor(saved, tmp_path):
    _, folder = saved("siglip")
    assert "mean, std: a guess: no preprocessor_config.json" in "".join(load(folder).preprocessing_report)
    for name, unit in (("a", {}), ("b", {"rescale_factor": 1 / 127.5}), ("c", {"do_rescale": False})):
        scale = 255 * unit.get("rescale_factor", 1 / 255) if unit.get("do_rescale", True) else 255
        stated = {
            "image_mean": [0.5 * scale] * 3, "image_std": [0.25 * scale] * 3, "resample": 3, "do_normalize": True,
            "size": {"height": 40, "width": 40},
        }  # fmt: skip
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(stated | unit))
        backbone = load(tmp_path / name)
        found = backbone.preprocessing
        assert (found.size, found.resize, found.interpolation) == (40, "squash", "bicubic")
        assert found.mean == pytest.approx((0.5,) * 3) and found.std == pytest.approx((0.25,) * 3)
        assert "mean, std: from preprocessor_config.json" in "".join(backbone.preprocessing_report)
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    video = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": {"shortest_edge": 36}, "crop_size": SIDE}
    (tmp_path / "a" / "video_preprocessor_config.json").write_text(json.dumps(video | {"do_center_crop": True}))
    found = load(tmp_path / "a").preprocessing
    assert (found.size, found.short, found.mean) == (SIDE, 36, (0.1,) * 3)


def test_the_name_is_the_configurations_and_no_path(saved, tmp_path):
    _, folder = saved("dinov2")
    here = load(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    config = json.loads((folder / "config.json").read_text())
    moved = config | {"transformers_version": "4.40.0", "_name_or_path": "x/y", "torch_dtype": "float16"}
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(moved))
    there = load(tmp_path / "elsewhere")
    assert (here.arch, here.weights_sha256) == (there.arch, there.weights_sha256)
    assert load(folder, arch=here.arch).arch == here.arch, "as a store's identity has it"
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert load(tmp_path / "elsewhere").arch != here.arch
    with pytest.raises(BadInput, match="but .* holds hf:dinov2-"):
        load(tmp_path / "elsewhere", arch=f"hf:{folder}")


def test_a_cached_model_by_its_name(saved, tmp_path, monkeypatch):
    _, folder = saved("dinov2")
    repository = tmp_path / "models--lab--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    shutil.copytree(folder, repository / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = load_backbone("lab/tiny", arch="hf:lab/tiny")
    assert backbone.weights_sha256 == load(folder).weights_sha256
    with pytest.raises(BadInput, match="nothing is downloaded here: fetch a model of the hub with hf download NAME"):
        load_backbone("lab/other", arch="hf:lab/other")


def test_weights_of_other_forms(saved, tmp_path):
    model, folder = saved("vit")
    whole = load(folder)
    assert "pooler" in whole.layers
    images = torch.randn(2, 3, SIDE, SIDE)
    # A classifier's checkpoint has no pooler; a file of torch.save, in half precision.
    classifier = transformers.ViTForImageClassification(model.config)
    classifier.vit.load_state_dict(model.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path / "classifier")
    weights = tmp_path / "classifier" / "model.safetensors"
    torch.save({k: v.half() for k, v in load_file(weights).items()}, tmp_path / "classifier" / "pytorch_model.bin")
    weights.unlink()
    backbone = load(tmp_path / "classifier")
    assert "left out: classifier.bias, classifier.weight" in backbone.load_report
    assert "missing: the pooler" in backbone.load_report and "pooler" not in backbone.layers
    assert backbone.weights_sha256 == load(tmp_path / "classifier").weights_sha256
    (got,), (expected,) = run(backbone, images, "tokens"), run(whole, images, "tokens")
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=0.05)
    # A state dict of the model, as export and finetune write it.
    torch.save(model.state_dict(), tmp_path / "x.pth")
    plain = load_backbone(tmp_path / "x.pth", arch=f"hf:{folder}")
    assert (plain.arch, plain.weights_sha256) == (whole.arch, whole.weights_sha256)
    drawn = load_backbone("random", arch=f"hf:{folder}")
    assert drawn.arch == whole.arch and drawn.weights_sha256 != whole.weights_sha256
    assert torch.isfinite(run(drawn, images, "tokens")[0]).all()


def test_bad_folders_are_one_line(saved, tmp_path):
    _, folder = saved("vit")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (tmp_path / "empty").mkdir()

    def changed(name, weights=None, **fields):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | fields))
        save_file(tensors if weights is None else weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        return tmp_path / name

    lacking = {k: v for k, v in tensors.items() if k != "layernorm.bias" and "layers.1.mlp.fc1.bias" not in k}
    cases = {
        tmp_path / "nowhere": "there is no such folder",
        tmp_path / "empty": "holds no config.json",
        changed("type", model_type="vit_mae"): "model type 'vit_mae' is not known here",
        changed("code", model_type="mine", auto_map={"AutoModel": "evil.Model"}): "model type 'mine' is not known here",
        changed("depth", num_hidden_layers=4): "does not fit hf:vit-[0-9a-f]{8}; missing: ",
        changed("shallow", num_hidden_layers=2): "does not fit hf:vit-[0-9a-f]{8}; unexpected: ",
        changed("shape", patch_size=4): "wrong shape: embeddings.patch_embeddings.projection.weight",
        changed("lacking", lacking): "missing: .*layernorm.bias",
        changed("nan", {k: v * float("nan") for k, v in tensors.items()}): "not finite: ",
        changed("side", image_size="x"): "is not a configuration that transformers takes",
        changed("quantised", quantization_config={}): "the weights are quantised",
        changed("oblong", image_size=[32, 64]): "no squares",
    }
    (tmp_path / "code" / "evil.py").write_text("raise SystemExit('code ran')")
    damaged = changed("damaged")
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    (text := changed("text")).joinpath("config.json").write_text("{")
    for path, message in (cases | {damaged: "transformers cannot load it", text: "config.json cannot be read"}).items():
        with pytest.raises(BadInput, match=message) as caught:
            load(path)
        assert "\n" not in caught.value.message, path
    with pytest.raises(BadInput, match="--weights-key teacher"):
        load(folder, weights_key="teacher")


@pytest.mark.process
def test_from_the_folder_to_explained_and_exported_probes(saved, scenes, tmp_path, command):
    _, folder = saved("dinov2_with_registers")
    network = ("--backbone", folder, "--arch", f"hf:{folder}")
    data = ("--dataset", "voc", "--root", scenes)
    options = ("--size", SIDE, "--workers", 0, "--features", "pooled,spatial,cls,last-1:patch_mean", "--store")
    code, _, err = command("extract", *network, *data, *options, tmp_path / "s.zarr")
    assert code == 0 and "hf:dinov2_with_registers-" in err
    code, _, err = command("extract", *network, *data, *options, tmp_path / "s.zarr")
    assert code == 0 and "is finished already" in err
    grid = {
        "splits": {"train": "train", "val": "val", "test": "test"}, "select": {"metric": "map", "split": "val"},
        "probes": [{"features": "last:spatial", "head": {"type": "mlp", "layers": 2, "hidden": 8}, "loss": "bce", "epochs": 1, "optimizer": {"type": "adam", "lr": 1e-3}, "batch_size": 16}],
    }  # fmt: skip
    featcache.train_probes(grid, store=tmp_path / "s.zarr", run=tmp_path / "run")
    explained = ("--method", "input_x_gradient", "--limit", 4, "--sanity")
    code, out, err = command("attribute", "--run", tmp_path / "run", *network, *data, *explained)
    assert code == 0 and "random backbone" in out + err, err
    probe = featcache.open_run(tmp_path / "run").scores[0]["probe"]
    exported = ("--run", tmp_path / "run", "--probe", probe, "--backbone", folder)
    for target in ("merged.pth", "merged.pt2"):
        code, _, err = command("export", *exported, "--to", tmp_path / target)
        assert code == 0, err
    images = torch.rand(2, 3, SIDE, SIDE)
    program = torch.export.load(tmp_path / "merged.pt2").module()
    assert program(images).shape[0] == 2
