"""From a checkpoint to a frozen Backbone."""

from contextlib import nullcontext

import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.checkpoints.encoder import find_encoder, grouped
from featcache.backbones.checkpoints.files import read_checkpoint
from featcache.backbones.checkpoints.strict import load_strictly
from featcache.backbones.families import ARCHITECTURES
from featcache.backbones.input.preprocessing import preprocessing_of
from featcache.backbones.input.weights import with_input, without_weights
from featcache.backbones.recognise import find_architecture, known, recognise, split_name
from featcache.backbones.undrawn import Undrawn
from featcache.errors import BadInput

RANDOM = "random"
# Words in the keys of methods whose small ViT has twelve heads, see heads.TWELVE.
TWELVE_HEADS = {"MoCo v3": {"base_encoder", "momentum_encoder", "predictor"}, "SLIP": {"visual", "image_mlp"}}


def load_backbone(path, arch=None, seed=0, weights_key=None, **preprocessing):
    """Load a frozen backbone from a checkpoint.

    path: checkpoint file or folder, or "random" for an untrained network of `arch` drawn from `seed`.
    arch: architecture name; by default inferred from the tensors' names and shapes.
    weights_key: which encoder of a checkpoint that holds several, such as "teacher". preprocessing:
    fields of Preprocessing (size, resize, ...) in place of the weights' own, see preprocessing_of.
    Raises BadInput.
    """
    return as_backbone(*load_network(path, arch, seed, weights_key), **preprocessing)


def load_network(path, arch=None, seed=0, weights_key=None):
    """Load the whole network that a Backbone is made of. A checkpoint's leaves the classifier's values undefined.

    Arguments as load_backbone's. Returns (architecture, network, report). Raises BadInput.
    """
    if str(path) == RANDOM:
        if arch is None:
            raise BadInput("--backbone random needs --arch, the architecture to draw")
        architecture = without_weights(find_architecture(arch))
        network = _random_network(architecture, seed)
        report = f"{arch} with random weights, seed {seed}"
    else:
        content = read_checkpoint(path)
        try:
            architecture, network, report = _load(content, path, arch, weights_key)
        except BadInput as error:
            likely = arch and _likely(content, path, weights_key)
            if not likely or likely in error.message or split_name(likely)[0] == split_name(arch)[0]:
                raise
            raise BadInput(f"{error.message}; by names and shapes the checkpoint is most like {likely}") from None
    return architecture, network, report


def as_backbone(architecture, network, report, **preprocessing):
    """Cut and freeze what load_network returned; preprocessing as load_backbone's."""
    made, said = preprocessing_of(architecture, **preprocessing)
    return Backbone(architecture, network, made, report, said)


def _load(content, path, arch, weights_key):
    """Load what read_checkpoint gave; arguments and result as load_network's."""
    is_known = arch and (":" in arch or split_name(arch)[0] in ARCHITECTURES)
    encoder = find_encoder(content, _signatures(arch), known, path, weights_key, arch if is_known else None)
    hints = _hints(encoder)
    asked = find_architecture(arch, encoder.tensors, hints) if arch else None
    architecture = asked or recognise(encoder.tensors, path, hints)
    # The user's own code may look at what it draws.
    with nullcontext() if ":" in architecture.name else Undrawn():
        network = architecture.build()
    loaded = load_strictly(
        network, architecture.named(encoder.tensors), architecture.classifier, path, architecture.name
    )
    report = _report(path, encoder, architecture, loaded, asked)
    return with_input(architecture, network, encoder, path, content), network, report


def _likely(content, path, weights_key):
    """Name of the architecture that would be taken without --arch; empty if none would."""
    try:
        encoder = find_encoder(content, _signatures(None), known, path, weights_key)
        return recognise(encoder.tensors, path, _hints(encoder)).name
    except BadInput:
        return ""


def _signatures(arch):
    """The keys by which an encoder is found: of every family, or of the architecture that is asked for."""
    if arch and ":" in arch:
        # Of a stranger's network the longest name is the least likely to stand elsewhere.
        asked = find_architecture(arch)
        keys = (key for key in asked.build().state_dict() if not key.startswith(asked.classifier))
        return [max(keys, key=len)]
    family = ARCHITECTURES.get(split_name(arch)[0]) if arch else None
    families = [family] if family else ARCHITECTURES.values()
    return list(dict.fromkeys(key for a in families for key in (a.signature, *a.layouts) if key))


def _hints(encoder):
    """What a method fixes and tensors do not say, see recognise."""
    words = {word for name in (encoder.way, *encoder.others) for word in name.split(".")}
    for method, own in TWELVE_HEADS.items():
        if own <= words:
            return {"twelve_heads": f"the names of the tensors, which are {method}'s"}
    if words & {"teacher", "student"} and "mask_token" not in encoder.tensors:
        return {"positions": "dino"}
    return {}


def _report(path, encoder, architecture, loaded, asked):
    """What was loaded and why, in lines for people."""
    prefix = f"{encoder.way}." if encoder.way else ""
    left_out = [*(prefix + name for name in loaded.left_out), *encoder.others]
    grounds = "as --arch says" if asked else "by tensor names and shapes"
    absent = f"{len(loaded.absent)} batch counters, which play no part" if loaded.absent else "none"
    return "\n".join(
        (
            f"{path}",
            f"  rule: {encoder.rule} ({prefix}*)",
            f"  architecture: {architecture.name}, {grounds}",
            f"  loaded: {loaded.used} tensors, {loaded.parameters / 1e6:.2f} M values",
            f"  left out: {grouped(left_out, encoder.way)}",
            f"  missing: {absent}",
        )
    )


def _random_network(architecture, seed):
    """Build a network with convolutions drawn as He et al. (ICCV 2015), fan-in mode.

    An architecture's own initialisation counts on batch statistics: in eval mode, where batch norm
    does nothing yet, EfficientNet's lets the signal fade to 1e-8.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = architecture.build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return network
