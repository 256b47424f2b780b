"""timm's networks by name (Wightman, 2019): `timm:NAME`, with timm's own description of the input."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from featcache.backbones.architecture import Architecture, Checkpoint, Fields, Origins, last_blocks, with_forward
from featcache.backbones.families.vit_input import is_open_clips, open_clip
from featcache.backbones.input.stated import timm_input
from featcache.backbones.outputs import find_last, outputs, tokens_of
from featcache.backbones.reductions import MAP, SEQUENCE
from featcache.errors import BadInput, nearest

PREFIX = "timm:"


def timm_architecture(name: str) -> Architecture:
    """Return the Architecture of `timm:NAME`. Raises BadInput without timm, or if it has no such network."""
    try:
        import timm
    except ImportError:
        raise BadInput(f"--arch {name} needs the package timm: pip install 'featcache[timm]'") from None
    known = name.removeprefix(PREFIX)
    if known.partition(".")[0] not in timm.list_models():
        raise BadInput(f"--arch {name}: timm has no such network{nearest(known, timm.list_models())}")
    build = partial(timm.create_model, known, pretrained=False)
    with torch.device("meta"):
        network: Any = build()
    config = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined]  # timm's own use of it
    fields, notices = timm_input(config)
    classifier = network.pretrained_cfg.get("classifier") or ()
    classifier = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
    architecture = Architecture(
        name=name,
        build=build,
        trunk=_trunk,
        signature=next(key for key in network.state_dict() if not key.startswith(classifier)),
        classifier=classifier,
        aliases={},
        nhwc=getattr(network, "output_fmt", "NCHW") == "NHWC",
        fit=partial(_fit, name, fields.get("size")),
        origins=_guesses(timm, known, network.pretrained_cfg.get("tag"), fields),
        customs=_customs,
        note="; ".join(f"the weights' own transform {line}" for line in notices),
        # The input of some networks is no square.
        **{"size": config["input_size"][1]} | fields,
    )
    return _with_layers(architecture, _trunk(network).eval())


def _customs(architecture: Architecture, checkpoint: Checkpoint | None) -> tuple[Fields, Origins]:
    if checkpoint is not None and is_open_clips(architecture, checkpoint.encoder.prefix.split(".")):
        return open_clip(architecture, checkpoint.encoder.tensors)
    return {}, {}


def _guesses(timm: Any, name: str, tag: str | None, fields: Fields) -> dict[str, str]:
    """Return the fields that differ between tags, if the name has none: {field: what is guessed}."""
    if "." in name or not tag:
        return {}
    others = [tagged for tagged in timm.list_pretrained(f"{name}.*") if tagged != f"{name}.{tag}"]
    inputs = [timm_input(timm.get_pretrained_cfg(tagged).to_dict())[0] for tagged in others]
    differing = [field for field in fields if any(other.get(field) != fields[field] for other in inputs)]
    return dict.fromkeys(differing, f"those of timm's tag {tag}, a guess; --arch {PREFIX}{name}.TAG for another's")


def _trunk(network: Any) -> nn.Module:
    """Return the features before pooling and classifier, under timm's names; `final` is what forward_features returns."""
    network.reset_classifier(0)
    network.final = nn.Identity()
    return with_forward(network, lambda self, images: self.final(self.forward_features(images)))


def _with_layers(architecture: Architecture, trunk: nn.Module) -> Architecture:
    """Add what a run tells: `last`, the layout of tokens; timm's feature stages or a transformer's last blocks."""
    modules = outputs(trunk, architecture, architecture.size)
    final = modules.pop("final")
    if final.kind not in (MAP, SEQUENCE):
        raise BadInput(f"--arch {architecture.name}: its forward_features returns no map and no tokens")
    last = find_last(modules)
    if last is None or modules[last].output is not final.output:
        # Something that is no module, such as a permutation, comes after the last one.
        last = "final"
    aliases = {"last": last}
    if final.kind == MAP:
        information: Any = getattr(trunk, "feature_info", ())
        stages = [stage["module"] for stage in information if stage["module"] in modules]
        aliases |= {f"feat{5 - i}": path for i, path in enumerate(reversed(stages[-5:]))}
        return replace(architecture, aliases=aliases)
    blocks = [path for path in modules if path.startswith("blocks.") and path.count(".") == 1]
    order = list(modules)
    # Some networks end with a block: there is no norm through which the others could go.
    if (
        blocks
        and last in order
        and last not in blocks
        and set(order[order.index(blocks[-1]) + 1 : order.index(last)]) <= {"blocks"}
    ):
        aliases = last_blocks(blocks, last)
    return replace(architecture, aliases=aliases, tokens=tokens_of(trunk, final.output.shape[1], architecture.size))


def _fit(name: str, native: int | None, network: Any, size: int) -> str:
    if size == native:
        return ""
    if not hasattr(network, "set_input_size"):
        if network.pretrained_cfg.get("fixed_input_size"):
            raise BadInput(f"--size {size}: {name} takes images of {native} pixels alone: --size {native}")
        return ""
    try:
        network.set_input_size((size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BadInput(f"--size {size}: {name} does not take it ({error})") from None
    return f"made to fit {size} pixels by timm, bicubic and anti-aliased"
