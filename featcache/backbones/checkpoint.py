"""Checkpoint files to state dicts, without ever running code from them."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from featcache.errors import BadInput


def read_state_dict(path):
    """Load a checkpoint with weights_only=True and return its flat state dict, on the CPU.

    A dict under the key `state_dict` is taken in place of the whole file. Raises BadInput, naming
    the path, when the file is missing, is no PyTorch checkpoint, is damaged, needs code execution,
    or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a checkpoint file" if path.is_dir() else "not found"
        raise BadInput(f"checkpoint {what}: {path}")
    with open(path, "rb") as file:
        start = file.read(64)
    if not (zipfile.is_zipfile(path) or start[:1] == b"\x80"):
        raise BadInput(
            f"not a PyTorch checkpoint: {path} ({'is empty' if not start else f'begins with {start[:24]!r}'}); "
            "expected a file written by torch.save"
        )
    try:
        with warnings.catch_warnings():
            # torch warns of odd pickle protocols; such a file loads, or is named below.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|Unsupported global|Unsupported class|class) (\S+)", str(error))
        raise BadInput(
            f"checkpoint {path} needs code execution to load{f' ({named.group(1)})' if named else ''}; featcache "
            'refuses that. If you trust the file, convert it in a sandbox: python -c "import torch; '
            "c = torch.load('in.pth', weights_only=False); torch.save(c.get('state_dict', c), 'out.pth')\""
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise BadInput(f"damaged checkpoint {path}: {reason} (a truncated download?)") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise BadInput(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadInput(f"checkpoint {path} holds no tensors at its top level (keys: {_few(content)})")
    return tensors


def _few(keys, most=8):
    keys = [str(key) for key in keys]
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def load_strictly(network, tensors, classifier, path, arch):
    """Load tensors into a network; all must fit but those of the classifier, which are left out.

    classifier: prefixes of the classifier's keys. Returns the keys left out. Raises BadInput that
    lists missing, unexpected and misshapen keys.
    """
    ignored = sorted(key for key in tensors if key.startswith(classifier))
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith(classifier)}
    given = {k: v for k, v in tensors.items() if k not in ignored}
    # Networks saved before PyTorch 0.4.1 have no batch counters; they play no part in eval mode.
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in given and k not in optional]
    unexpected = [k for k in given if k not in wanted]
    misshapen = [
        f"{k} {tuple(given[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    problems = [
        f"{name}: {_few(keys)}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise BadInput(f"checkpoint {path} does not fit {arch}; {'; '.join(problems)}")
    network.load_state_dict(given, strict=False)
    return ignored
