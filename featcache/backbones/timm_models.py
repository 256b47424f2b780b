"""timm's networks by name (Wightman, 2019): `timm:NAME`, with timm's own description of the input."""

from dataclasses import replace
from functools import partial

import torch

from featcache.backbones.architecture import Architecture, Tokens, last_blocks
from featcache.backbones.layers import find_last, outputs
from featcache.errors import BadInput, nearest

PREFIX = "timm:"


def timm_architecture(name):
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
        network = build()
    config = timm.data.resolve_model_data_config(network)
    classifier = network.pretrained_cfg.get("classifier") or ()
    classifier = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
    architecture = Architecture(
        name=name,
        build=build,
        trunk=_trunk,
        signature=next(key for key in network.state_dict() if not key.startswith(classifier)),
        classifier=classifier,
        aliases={},
        size=config["input_size"][1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        tokens=_tokens(network),
        nhwc=getattr(network, "output_fmt", "NCHW") == "NHWC",
        fit=partial(_fit, name, config["input_size"][1]),
    )
    return replace(architecture, aliases=_aliases(_trunk(network).eval(), architecture))


def _trunk(network):
    """The features before pooling and classifier, under timm's names."""
    network.reset_classifier(0)
    network.forward = network.forward_features
    return network


def _tokens(network):
    """How a network of tokens lays them out; None for one of maps."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not hasattr(network, "num_prefix_tokens") or patch is None:
        return None
    return Tokens(network.num_prefix_tokens, getattr(network, "cls_token", None) is not None, patch[0])


def _aliases(trunk, architecture):
    """`last`; timm's feature stages as feat1..feat5; a transformer's last blocks."""
    found = outputs(trunk, architecture, architecture.size)
    last = find_last(found)
    aliases = {"last": last}
    if architecture.tokens:
        blocks = [path for path in found if path.startswith("blocks.") and path.count(".") == 1]
        return aliases | (last_blocks(blocks, last) if blocks else {})
    stages = [stage["module"] for stage in getattr(trunk, "feature_info", ()) if stage["module"] in found]
    return aliases | {f"feat{5 - i}": path for i, path in enumerate(reversed(stages[-5:]))}


def _fit(name, native, network, size):
    if size == native or not hasattr(network, "set_input_size"):
        return ""
    try:
        network.set_input_size((size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BadInput(f"--size {size}: {name} does not take it ({error})") from None
    return "made to fit {size} pixels by timm, bicubic and anti-aliased"
