"""Files of weights that plain torch and safetensors read, written whole or not at all."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch

from featcache.atomic import replacing
from featcache.errors import BadInput, of_the_system
from featcache.progress import say

STATE_DICTS = (".safetensors", ".pth", ".pt")
PROGRAM = ".pt2"
META = "featcache.json"
SAME_PROGRAM = ("weights_sha256", "probe_sha256", "probe")


def check_suffix(path: str | PathLike, suffixes: Sequence[str]) -> None:
    """Raise BadInput unless the file's suffix is one of these."""
    if Path(path).suffix not in suffixes:
        raise BadInput(f"--to {path}: expected a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")


def write_state_dict(path: str | PathLike, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write {name: tensor} as .safetensors, or as .pth or .pt: {"state_dict": tensors, "meta": meta}.

    meta: JSON values; in safetensors they are JSON text under the metadata key `featcache`. A file that
    holds the same tensors already is left as it is. Raises BadInput if the file holds anything else, or if what was
    written does not read back.
    """
    file = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if file.exists():
        _keep_or_refuse(file, _same(_read(file), tensors))
        return
    if file.suffix == ".safetensors":
        data = safetensors.torch.save(tensors, metadata={"featcache": json.dumps(meta)})
        _write(file, lambda stream: stream.write(data), lambda: _same(_read(file), tensors))
    else:
        # A view would be saved with all of what it is a view of.
        content = {"state_dict": {name: tensor.clone() for name, tensor in tensors.items()}, "meta": meta}
        _write(file, lambda stream: torch.save(content, stream), lambda: _same(_read(file), tensors))


def write_program(
    path: str | PathLike, trace: Callable[[], torch.export.ExportedProgram], meta: Mapping[str, Any]
) -> None:
    """Write a torch.export program as .pt2, with meta as its extra file featcache.json.

    trace: makes the program; not called if there is a file of the same weights already. Raises BadInput as
    write_state_dict does.
    """
    file = Path(path)
    if file.exists():
        _keep_or_refuse(file, all(_program_meta(file).get(key) == meta[key] for key in SAME_PROGRAM))
        return
    program = trace()
    _write(
        file,
        lambda stream: torch.export.save(program, stream, extra_files={META: json.dumps(meta)}),
        lambda: _program_meta(file) == meta,
    )


class _Patient(io.FileIO):
    """A file that keeps its first error for the end, since torch's C++ writers abort the process at one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, or drop them once a write has failed. Returns their number."""
        left = memoryview(data).cast("B")
        length = len(left)
        try:
            while len(left) and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return length


def _write(path: Path, put: Callable[[IO[bytes]], object], reads_back: Callable[[], bool]) -> None:
    """Write a file by `put(file)`, whole or not at all. Raises BadInput if it cannot, or if it does not read back."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            patient = _Patient(file.fileno(), "wb", closefd=False)
            put(cast(IO[bytes], patient))
            if patient.error:
                raise patient.error
    except OSError as error:
        raise BadInput(f"cannot write {path}: {of_the_system(error)}") from None
    if not reads_back():
        path.unlink(missing_ok=True)
        raise BadInput(
            f"{path} does not read back as it was written; look after the disk, and run the same export again"
        )
    say(f"export: {path}")


def _keep_or_refuse(path: Path, same: bool) -> None:
    """Say that a file is there already. Raises BadInput if it is not the same."""
    if not same:
        raise BadInput(f"--to {path}: there is a file already, and it holds something else; remove it or name another")
    say(f"export: {path} holds these tensors already")


def _read(path: Path) -> Any:
    """Return the tensors of a file written by write_state_dict, or None if it is anything else."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception:  # Whatever is wrong with it, it is not what was to be written.
        return None


def _same(old: Any, new: Mapping[str, torch.Tensor]) -> bool:
    """Whether what was read is tensors of the same names, dtypes and values."""
    return (
        isinstance(old, dict)
        and old.keys() == new.keys()
        and all(
            isinstance(old[k], torch.Tensor) and old[k].dtype == v.dtype and old[k].equal(v) for k, v in new.items()
        )
    )


def _program_meta(path: Path) -> dict[str, Any]:
    """Return the meta of a program written by write_program, or {} if it is anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(f"/{META}"))
            # testzip returns None if every file has the checksum that it was written with.
            return json.loads(archive.read(name)) if archive.testzip() is None else {}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
