"""transformers' vision models by `hf:FOLDER_OR_NAME`, from a folder or from the local cache of the Hugging Face hub.

Nothing is downloaded, and no code of a repository runs. transformers builds the model and translates the names of its
tensors, which differ between its versions.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones.architecture import Architecture, Fields, Tokens, last_blocks, with_forward
from featcache.backbones.checkpoints.encoder import few, grouped
from featcache.backbones.checkpoints.strict import load_strictly
from featcache.backbones.input.stated import stated_input
from featcache.backbones.outputs import outputs
from featcache.backbones.reductions import CHANNELS_FIRST
from featcache.errors import BadInput, nearest

PREFIX = "hf:"
CONFIG = "config.json"
# The model types that are known to run, and to lay their tokens out, as is written here. Others need not: ViT-MAE's model
# hides random patches, and SigLIP 2's NaFlex takes patches in place of images.
TYPES = (
    "vit", "deit", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "siglip_vision_model",
    "clip", "clip_vision_model", "vjepa2", "sam", "sam_vision_model",
)  # fmt: skip
# Fields of a config.json that do not change what the network computes.
IDLE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id"}


def transformers_architecture(name: str) -> Architecture:
    """Return the Architecture of `hf:FOLDER_OR_NAME`, with the input that the folder states.

    Its own name is the model's type and the hash of its configuration, whatever the folder is called. Raises BadInput
    without transformers, or for a folder that holds no model of a known type.
    """
    word = name.removeprefix(PREFIX)
    folder = find_folder(word)
    if folder is None:
        raise _nowhere(f"--arch {name}")
    return _architecture(folder)


def load_transformers(path: Any, name: str) -> tuple[Architecture, nn.Module, str] | None:
    """Load the weights of a folder or cached name as transformers does: (architecture, network, load report).

    path: what --backbone names; None is returned if it is a file. Raises BadInput for weights that do not fit, or if --arch
    names another model than the folder holds.
    """
    if Path(path).is_file():
        return None
    folder = find_folder(str(path))
    if folder is None:
        raise _nowhere(f"--backbone {path}")
    architecture = _architecture(folder)
    asked = architecture.name if name == architecture.name else transformers_architecture(name).name
    if asked != architecture.name:
        raise BadInput(f"--arch {name} is {asked}, but {path} holds {architecture.name}")
    network, info = _pretrained(folder, path)
    missing, unexpected = (sorted(info[f"{key}_keys"]) for key in ("missing", "unexpected"))
    lacks_pooler = bool(missing) and all(key.startswith("pooler.") for key in missing)
    own = {key.split(".")[0] for key in network.state_dict()}
    base = f"{network.base_model_prefix}."
    strange = [k for k in unexpected if k.removeprefix(base).split(".")[0] in own and not k.endswith("position_ids")]
    misshapen = sorted(str(key) for key, *_ in info["mismatched_keys"])
    if (missing and not lacks_pooler) or strange or misshapen:
        listed = (("missing", missing), ("unexpected", strange), ("wrong shape", misshapen))
        problems = [f"{what}: {few(keys)}" for what, keys in listed if keys]
        raise BadInput(f"checkpoint {path} does not fit {architecture.name}; {'; '.join(problems)}")
    if lacks_pooler:
        # transformers would draw one.
        trunk = partial(_trunk, ("pooler.",), network.config.image_size)
        architecture = replace(architecture, classifier=("pooler.",), trunk=trunk)
    # Its own tensors: this looks for values that are not finite.
    loaded = load_strictly(network, network.state_dict(), architecture.classifier, path, architecture.name)
    report = "\n".join(
        (
            f"{path}",
            f"  architecture: {architecture.name}, as {CONFIG} and --arch say",
            f"  loaded: {loaded.used} tensors, {loaded.parameters / 1e6:.2f} M values",
            f"  left out: {grouped([*(k for k in loaded.left_out if k not in missing), *unexpected], '')}",
            f"  missing: {'the pooler, which features do without' if lacks_pooler else 'none'}",
        )
    )
    return architecture, network, report


def find_folder(word: str) -> Path | None:
    """Return the folder of a model: the one that a path names, or a cached snapshot's; None if there is neither."""
    if Path(word).is_dir():
        return Path(word)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", word):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        file = try_to_load_from_cache(word, CONFIG)
    except ValueError:
        # It cannot be the name of a repository.
        return None
    return Path(file).parent if isinstance(file, str) else None


def _nowhere(option: str) -> BadInput:
    return BadInput(
        f"{option}: there is no such folder, and no model of that name in the local cache; nothing is downloaded here: "
        "fetch a model of the hub with hf download NAME"
    )


def _architecture(folder: Path) -> Architecture:
    written = _read_config(folder)
    transformers = _import()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        build = partial(transformers.AutoModel.from_config, config, trust_remote_code=False)
        with torch.device("meta"):
            network = build()
    except Exception as error:
        # transformers raises whatever a configuration makes it stumble over.
        raise BadInput(f"{folder / CONFIG} is not a configuration that transformers takes: {_line(error)}") from None
    vision = written.get("vision_config") or written
    text = json.dumps({k: v for k, v in vision.items() if k not in IDLE}, sort_keys=True)
    name = f"{PREFIX}{written['model_type']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    size = config.crop_size if config.model_type == "vjepa2" else config.image_size
    if not isinstance(size, int):
        raise BadInput(f"{folder / CONFIG}: its images of {size} pixels are no squares, which features need")
    stated, origins, notices = stated_input(folder, {})
    fields: Fields = {"size": size} | stated
    guessed = {f: "a guess: no preprocessor_config.json says it" for f in ("mean", "std", "interpolation")}
    classifier = ("predictor.",) if config.model_type == "vjepa2" else ()
    tokens = _tokens(network, config)
    note = [f"loader: transformers {transformers.__version__}, {type(network).__name__}", _layout(tokens, config, size)]
    note += [f"the weights' own transform: {line}" for line in notices]
    made = Architecture(
        name=name, build=build, trunk=partial(_trunk, classifier, size), classifier=classifier, aliases={},
        signature=max((key for key in network.state_dict() if not key.startswith(classifier)), key=len), tokens=tokens,
        origins={field: origin for field, origin in (guessed | origins).items() if origin},
        fit=partial(_fit, size, int(config.patch_size)), nhwc=tokens is None, note="\n".join(note),
        **fields,
    )  # fmt: skip
    return _with_layers(made, network, size)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json. Raises BadInput unless it is a known type of model."""
    try:
        stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{folder} holds no {CONFIG}: it is no folder that transformers' save_pretrained wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{folder / CONFIG} cannot be read: {_line(error)}") from None
    kind = stated.get("model_type") if isinstance(stated, dict) else None
    if kind not in TYPES:
        hint = nearest(kind, TYPES) if isinstance(kind, str) else ""
        raise BadInput(
            f"{folder / CONFIG}: model type {kind!r} is not known here{hint} (known: {', '.join(TYPES)}); "
            "a function of your own can build it: --arch package.module:function"
        )
    if "quantization_config" in stated:
        raise BadInput(f"{folder / CONFIG}: the weights are quantised; give those that they were made of")
    return stated


def _import() -> Any:
    try:
        import transformers
    except ImportError:
        raise BadInput(f"--arch {PREFIX}... needs the package transformers: pip install 'featcache[hf]'") from None
    return transformers


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and tables off the terminal; the load report says the same."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _pretrained(folder: Path, path: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model with its weights, and what transformers says of its tensors."""
    transformers = _import()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        with _silent(transformers):
            pair: tuple[Any, dict[str, Any]] = transformers.AutoModel.from_pretrained(
                folder, config=getattr(config, "vision_config", config), local_files_only=True, trust_remote_code=False,
                weights_only=True, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:
        # Damaged files and tensors of other shapes raise many kinds of errors.
        raise BadInput(f"checkpoint {path}: transformers cannot load it: {_line(error)}") from None
    return pair


def _line(error: BaseException) -> str:
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def _trunk(classifier: tuple[str, ...], native: int, network: Any) -> nn.Module:
    """Return the model with images for its only input; `final` is its last hidden state, tokens [B, N, D] or a map."""
    for part in classifier:
        setattr(network, part.removesuffix("."), None)
    network.final = nn.Identity()
    kind = network.config.model_type
    if kind == "sam_vision_model":
        # Its blocks yield [B, H, W, C], its neck [B, C, H, W].
        neck = network.vision_encoder.neck
        for module in (network.final, network.vision_encoder, neck, *neck.children()):
            module.data_format = CHANNELS_FIRST
    if kind == "vjepa2":
        for block in network.encoder.layer:
            block.output = nn.Identity()
            with_forward(block, _tapped(type(block).forward))
    plain, resizes = type(network).forward, "interpolate_pos_encoding" in signature(network.forward).parameters

    def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
        more = {"interpolate_pos_encoding": True} if resizes and images.shape[2:] != (native, native) else {}
        if kind == "vjepa2":
            # A still image is a video of one frame, which the model repeats to fill a tubelet.
            states = plain(self, images[:, None], skip_predictor=True).last_hidden_state
        elif kind == "clip_vision_model":
            # CLIP's own forward puts the final norm on the class token alone.
            states = self.pre_layrnorm(self.embeddings(images, **more))
            states = self.post_layernorm(self.encoder(inputs_embeds=states).last_hidden_state)
        else:
            states = plain(self, images, **more).last_hidden_state
        result: torch.Tensor = self.final(states)
        return result

    return with_forward(network, forward)


def _tapped(plain: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the forward of a block that yields (tokens, ...), so that its module `output` yields the tokens alone."""

    def forward(self: Any, *inputs: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        tokens, *others = plain(self, *inputs, **more)
        return (self.output(tokens), *others)

    return forward


def _fit(native: int, patch: int, network: Any, size: int) -> str:
    """Have a model take images of another size than its own, or raise BadInput."""
    if size == native:
        return ""
    kind = network.config.model_type
    if kind == "sam_vision_model":
        raise BadInput(f"--size {size}: SAM's encoder takes images of {native} pixels alone: --size {native}")
    if kind == "vjepa2":
        for module in network.modules():
            if hasattr(module, "grid_size"):
                # It numbers the patches of a row for the rotary positions.
                module.grid_size = size // patch
    return f"made to fit {size} pixels by transformers"


def _with_layers(architecture: Architecture, network: nn.Module, size: int) -> Architecture:
    """Add what a run tells: `last`, and a transformer's last blocks."""
    modules = outputs(architecture.trunk(network).eval(), architecture, size)
    final = modules.pop("final")
    last = next((path for path, output in modules.items() if output.output is final.output), "final")
    (blocks, *_) = [path for path, m in network.named_modules() if isinstance(m, nn.ModuleList)]
    if architecture.tokens is None or last == "final":
        return replace(architecture, aliases={"last": last})
    paths = [f"{blocks}.{n}" for n in range(len(network.get_submodule(blocks)))]  # type: ignore[arg-type]  # a list of modules
    paths = [path if modules[path].kind else f"{path}.output" for path in paths]
    return replace(architecture, aliases=last_blocks(paths, last))


def _tokens(network: nn.Module, config: Any) -> Tokens | None:
    """Return the layout of the tokens, as the configuration and the names of the tensors say; None for maps."""
    if config.model_type == "sam_vision_model":
        return None
    names = {key.split(".")[-1] for key in network.state_dict()}
    cls = bool(names & {"cls_token", "class_embedding"})
    prefix = cls + ("distillation_token" in names) + int(getattr(config, "num_register_tokens", 0))
    return Tokens(prefix, cls, int(config.patch_size))


def _layout(tokens: Tokens | None, config: Any, size: int) -> str:
    """Return a line for people on the layout of what the model yields for images of its own size."""
    if tokens is None:
        return "layout: maps"
    registers, side = int(getattr(config, "num_register_tokens", 0)), size // tokens.patch
    parts = ["the class token"] if tokens.cls else []
    parts += [f"{registers} registers"] if registers else []
    parts += ["the distillation token"] if tokens.prefix > tokens.cls + registers else []
    return f"tokens: {', '.join([*parts, f'{side} x {side} patches of {tokens.patch} pixels'])}"
