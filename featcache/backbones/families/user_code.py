"""Networks from the user's own code: `package.module:function`, or a module in memory."""

import importlib
import os
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from featcache.backbones.architecture import Architecture, Hints
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.outputs import find_last, outputs, tokens_of
from featcache.errors import BadInput, nearest

# Top-level modules that are taken for a classifier where checkpoint and network do not agree on them.
CLASSIFIERS = ("fc", "head", "classifier")
SIZE = 224
NOTE = "with ImageNet's mean and std, unless options say otherwise"


def user_architecture(name: str) -> Architecture:
    """Return the Architecture of `package.module:function`, which is called without arguments.

    The current directory is importable. Raises BadInput if there is no such function, it raises, or
    it returns no nn.Module.
    """
    # The network is only looked at; the caller's generator is left as it is.
    with torch.random.fork_rng(devices=[]):
        return _architecture(name, _build(name), ())


def module_architecture(network: nn.Module, size: int | None) -> tuple[Architecture, nn.Module]:
    """Return the Architecture of a network in memory, and a copy in float32 on the CPU that featcache may change.

    It is named after its class, as `package.module:Class`. size: of the images that it is to take, in pixels. Raises
    BadInput if it cannot be copied, or does not run.
    """
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    # torch.compile's wrapper holds the network that it compiles.
    network = getattr(network, "_orig_mod", network)
    kind = type(network)
    name = f"{kind.__module__}:{kind.__qualname__.replace('<locals>.', '')}"
    try:
        copy = deepcopy(network).float().cpu()
    except Exception as error:
        raise BadInput(f"backbone: the {kind.__qualname__} in memory cannot be copied: {_line(error)}") from None
    made = _architecture(name, copy, (), size or SIZE, f"backbone: the {kind.__qualname__} in memory")
    return replace(made, build=partial(_undrawable, name), infer=None, note=f"input taken {NOTE}"), copy


def _undrawable(name: str) -> nn.Module:
    raise BadInput(
        f"backbone: nothing says how the weights of {name}, a module in memory, are drawn at random; save its "
        "state_dict() and give that file, with arch='package.module:function' for a function that builds it"
    )


def _build(name: str) -> nn.Module:
    path, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        # Last, so that a file here, such as a zarr.py, does not take the place of a package.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise BadInput(f"--arch {name}: {error} (looked in the current directory and the installed packages)") from None
    except (Exception, SystemExit) as error:
        raise BadInput(f"--arch {name}: importing {path} fails: {_line(error)}") from None
    if not hasattr(module, function):
        raise BadInput(f"--arch {name}: {path} has no {function!r}{nearest(function, dir(module))}")
    try:
        network = getattr(module, function)()
    except (Exception, SystemExit) as error:
        raise BadInput(f"--arch {name}: calling {function}() fails: {_line(error)}") from None
    if not isinstance(network, nn.Module):
        raise BadInput(f"--arch {name}: {function}() returns {type(network).__name__}, not a torch.nn.Module")
    return network


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _architecture(
    name: str, network: nn.Module, classifier: Sequence[str], size: int = SIZE, where: str = ""
) -> Architecture:
    """Return the Architecture of a network that runs once for it. where: what begins the messages."""
    where = where or f"--arch {name}"
    trunk = partial(_trunk, classifier)
    prefixes = tuple(f"{part}." for part in classifier)
    made = Architecture(
        name=name, build=partial(_build, name), trunk=trunk, classifier=prefixes, aliases={}, size=size,
        signature=next((key for key in network.state_dict() if not key.startswith(prefixes)), ""),
        infer=partial(_infer, name),
        note=f"input taken as {SIZE} pixels {NOTE}",
    )  # fmt: skip
    network = trunk(network).eval()
    try:
        modules = outputs(network, made, size)
    except Exception as error:
        raise BadInput(f"{where}: the network does not run on [B, 3, {size}, {size}]: {_line(error)}") from None
    last = find_last(modules)
    if last is None:
        raise BadInput(f"{where}: no module of the network yields a map [B, C, H, W] or tokens [B, N, D]")
    values = modules[last].values
    return replace(
        made, aliases={"last": last}, tokens=tokens_of(network, values.shape[1], size) if values.ndim == 3 else None
    )


def _trunk(classifier: Sequence[str], network: nn.Module) -> nn.Module:
    for part in classifier:
        if hasattr(network, part):
            setattr(network, part, nn.Identity())
    return network


def _infer(name: str, tensors: Tensors, hints: Hints) -> Architecture:
    """Return the same Architecture without the classifiers on which network and checkpoint do not agree."""
    with torch.random.fork_rng(devices=[]):
        network = _build(name)
    own = network.state_dict()
    classifier = [part for part in CLASSIFIERS if _shapes(own, part) != _shapes(tensors, part)]
    return _architecture(name, network, classifier)


def _shapes(tensors: Tensors, part: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items() if key.startswith(f"{part}.")}
