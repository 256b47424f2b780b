"""Checkpoint files to nested dicts of tensors, without ever running code from them.

Reads what torch.save writes (with weights_only=True), TorchScript archives (only their tensors), .safetensors, and
folders of sharded safetensors. What a file claims is checked before memory is spent on it.
"""

import io
import json
import math
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import torch

from featcache.backbones.checkpoints.pickle_scan import Scan, StandIn, saved_module, scan_legacy, scan_pickle
from featcache.errors import LONGEST_LINE, BadInput
from featcache.names import unwritable

# A tensor may be larger than its storage if it repeats it; this much is no attack.
SLACK_BYTES = 16 << 20
# Training frameworks store objects of these modules beside the tensors. They are replaced by stand-ins: nothing of
# theirs is imported or run.
REPLACED = (
    "argparse.", "collections.defaultdict", "collections.deque", "datetime.", "numpy.", "omegaconf.",
    "pathlib.", "mmengine.", "mmcv.", "vissl.", "classy_vision.", "easydict.", "pytorch_lightning.", "lightning.",
    "lightning_fabric.", "typing.", "builtins.getattr", "builtins.slice",
    "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.tuple",
    "builtins.set", "builtins.frozenset",
)  # fmt: skip
DICTS = ("defaultdict", "AttributeDict", "AttrDict", "EasyDict")
LISTS = ("deque",)


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """Return the content of a checkpoint, nested dicts and lists with tensors on the CPU.

    Raises BadInput, naming the path, when it is missing, no checkpoint, damaged, needs code
    execution, or claims tensors that are larger than the file.

        tensors = read_checkpoint("resnet50-0676ba61.pth")  # {"conv1.weight": tensor [64, 3, 7, 7], ...}
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise BadInput(f"checkpoint not found: {path}")
    with open(path, "rb") as file:
        start = file.read(64)
    # A pickle begins with 0x80 too, but its first eight bytes are no length that fits into the file.
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and (start[:1] != b"\x80" or length <= path.stat().st_size - 8):
        return _read_safetensors(path)
    if start[:2] == b"PK":
        return _read_zip(path)
    if start[:1] == b"\x80":
        return _read_legacy(path)
    raise BadInput(f"not a PyTorch checkpoint: {path} ({_guess(start)}); expected a file of torch.save or .safetensors")


def _guess(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: fetch the file itself with git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not the download itself"
    return f"begins with {start[:24]!r}"


def _damaged(path: Path, error: Exception) -> BadInput:
    if unwritable(str(path)):
        return BadInput(f"checkpoint {path} cannot be opened: its path is not UTF-8; rename it")
    reason = str(error).split("\n")[0][:200] or type(error).__name__
    return BadInput(f"damaged checkpoint {path}: {reason} (a truncated download?)")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None


def _read_folder(path: Path) -> dict[str, torch.Tensor]:
    """Read a folder of safetensors: one file, or the shards that an index names, all of which must be there."""
    indexes = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indexes) > 1 or (not indexes and len(files) != 1):
        names = ", ".join(f.name for f in (indexes or files)) or "none"
        raise BadInput(
            f"checkpoint {path} is a folder; expected *.safetensors.index.json with its shards, or one .safetensors "
            f"file in it (there: {names})"
        )
    if not indexes:
        return _read_safetensors(files[0])
    try:
        places = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
        lost = [name for name in shards if Path(name).name != name or not os.path.isfile(path / name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(indexes[0], error) from None
    if lost:
        raise BadInput(f"checkpoint {path} lacks the shard {lost[0]} that {indexes[0].name} names")
    tensors: dict[str, torch.Tensor] = {}
    for name in shards:
        content = _read_safetensors(path / name)
        tensors |= {key: value for key, value in content.items() if places.get(key) == name}
    missing = [key for key in places if key not in tensors]
    if missing:
        raise BadInput(
            f"checkpoint {path}: {places[missing[0]]} does not hold {missing[0]!r}, which the index promises"
        )
    return tensors


def _read_zip(path: Path) -> Any:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            # TorchScript compresses its source text, which is not looked at.
            entries = [e for e in archive.infolist() if "/code/" not in e.filename]
            compressed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            if compressed:
                raise BadInput(
                    f"not a PyTorch checkpoint: {path} holds compressed entries ({compressed[0]}), which torch.save never "
                    "writes; if it is an archive, unpack it first"
                )
            if sum(e.file_size for e in entries) > size:
                raise BadInput(f"damaged checkpoint {path}: its entries claim more bytes than the file has")
            pickles = [e for e in entries if e.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1:
                raise BadInput(f"not a PyTorch checkpoint: {path} is a zip archive without data.pkl; unpack it first")
            folder = pickles[0].filename.split("/")[0]
            records = {e.filename.removeprefix(f"{folder}/data/"): e.file_size for e in entries}
            if len(entries) < len(archive.infolist()):
                return _read_torchscript(archive, pickles[0], folder, records)
            scan = scan_pickle(archive.read(pickles[0]))
    except BadInput:
        raise
    except Exception as error:  # A damaged pickle or archive can raise anything.
        raise _damaged(path, error) from None
    _check_claims(path, scan, size, records)
    # Mapped into memory, so that optimiser states and other encoders are never read.
    return _load(path, scan, mmap=True)


def _read_legacy(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            scan = scan_legacy(file)
    except Exception as error:  # As above.
        raise _damaged(path, error) from None
    _check_claims(path, scan, path.stat().st_size)
    return _load(path, scan, mmap=False)


def _check_claims(path: Path, scan: Scan, size: int, records: Mapping[str, int] | None = None) -> None:
    """Compare what the tensors claim with the bytes that are there.

    size: of the file. records: {storage: its bytes} if the file is an archive.
    """
    for key, (kind, elements) in scan.storages.items():
        needed = elements * _itemsize(kind)
        held = size if records is None else records.get(key, 0)
        if needed < 0 or needed > held:
            raise BadInput(
                f"damaged checkpoint {path}: storage {key} claims {needed} bytes, the file has {held} for it"
            )
    for elements, stored, kind in scan.tensors:
        if elements > stored and elements * _itemsize(kind) > size + SLACK_BYTES:
            raise BadInput(
                f"checkpoint {path} holds a tensor of {elements} elements on a storage of {stored}: an absurd shape"
            )


def _itemsize(kind: str) -> int:
    sizes = {
        "Double": 8,
        "Long": 8,
        "Half": 2,
        "BFloat16": 2,
        "Short": 2,
        "Char": 1,
        "Byte": 1,
        "Bool": 1,
        "Untyped": 1,
    }
    return sizes.get(kind.removesuffix("Storage"), 4)


def _load(path: Path, scan: Scan, mmap: bool) -> Any:
    replaced: list[Any] = [_inert_class(name) for name in scan.globals if name.startswith(REPLACED)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(replaced):
            # torch warns of odd pickle protocols; such a file loads, or is an error below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise _needs_code(path, scan) from None
    except Exception as error:  # As above.
        raise _damaged(path, error) from None


# Keeps the tensors of nested dicts and lists, and of every module in them, and drops everything else.
CONVERSION = (
    "import torch; f = lambda x: f(x.state_dict()) if isinstance(x, torch.nn.Module) else f(dict(enumerate(x))) "
    "if isinstance(x, (list, tuple)) else {{str(k): f(v) for k, v in x.items()}} if isinstance(x, dict) else x "
    "if torch.is_tensor(x) else None; "
    "torch.save(f(torch.load('{source}', map_location='cpu', weights_only=False)), 'out.pth')"
)


def _needs_code(path: Path, scan: Scan) -> BadInput:
    """Return the error for a file that torch refuses to load: whose code it needs, and a line that converts it."""
    ours = ("torch.", "collections.", *REPLACED)
    foreign = sorted(name for name in scan.globals if not name.startswith(ours))
    module = saved_module(scan.content)
    if module:
        keys, name = module
        what = f"it holds a whole module, {name}{f', under {keys!r}' if keys else ''}"
    else:
        what = (foreign or sorted(scan.globals) or ["a reference to outside"])[0]
    code, place = CONVERSION, ""
    if packages := sorted({name.split(".")[0] for name in foreign} - sys.stdlib_module_names):
        place = f" that has {', '.join(packages)}"
    if local := [name.removeprefix("__main__.") for name in foreign if name.startswith("__main__.")]:
        # A pickle looks for such a class in the program that reads it.
        code = f"from your_script import {', '.join(local)}; {code}"
        place += f", next to the script that defines {', '.join(local)}, which is called your_script here"
    # Quotes and the like would end the line's own quotes, and a long path would have it cut short.
    plain = not set(str(path)) & set("\"'$`\\!") and len(code) + len(str(path)) < LONGEST_LINE - 20
    return BadInput(
        f"checkpoint {path} needs code execution to load ({what}); featcache refuses that. If you trust the file, "
        f"convert it in a sandbox{place}{'' if plain else ', copied there as in.pth'}:",
        f'python -c "{code.format(source=path if plain else "in.pth")}"',
    )


def _inert_class(path: str) -> type:
    """Return a class that torch takes for the global of that name; it does nothing, as StandIn does."""
    module, _, name = path.rpartition(".")

    def make(cls: type, *args: Any) -> Any:
        return {} if name in DICTS else [] if name in LISTS else object.__new__(cls)

    members = {"__module__": module, "__qualname__": name, "__new__": make}
    return types.new_class(name, (StandIn,), exec_body=lambda space: space.update(members))


def _read_torchscript(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: str, records: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive, {"a.b.weight": tensor}; its code is not looked at."""

    def tensor(kind: str, key: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        dtype = getattr(torch, {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
                                "Long": "int64", "Int": "int32", "Bool": "bool", "Byte": "uint8", "Char": "int8",
                                "Short": "int16"}[kind.removesuffix("Storage")])  # fmt: skip
        width, stride = dtype.itemsize, tuple(stride)
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if math.prod(size) else 0
        if reach * width > records.get(key, 0) or min((0, *stride)) < 0:
            raise ValueError(f"tensor {size} reaches beyond its storage {key}")
        if not math.prod(size):
            return torch.empty(size, dtype=dtype)
        data = torch.frombuffer(bytearray(archive.read(f"{folder}/data/{key}")), dtype=dtype)
        return data.as_strided(size, stride, offset)

    content = Scan(io.BytesIO(archive.read(entry)), tensor).load()
    tensors: dict[str, torch.Tensor] = {}

    def walk(item: Any, prefix: str) -> None:
        if isinstance(item, StandIn) and isinstance(item.state, dict):
            for name, value in item.state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{prefix}{name}"] = value
                else:
                    walk(value, f"{prefix}{name}.")

    walk(content, "")
    return tensors
