"""Files of weights that plain torch and safetensors read, written whole or not at all."""

import io
import json
import zipfile
from pathlib import Path

import click
import safetensors.torch
import torch

from featcache.atomic import replacing
from featcache.errors import BadInput, of_the_system

STATE_DICTS = (".safetensors", ".pth", ".pt")
PROGRAM = ".pt2"
META = "featcache.json"
SAME_PROGRAM = ("weights_sha256", "probe_sha256", "probe")


def check_suffix(path, suffixes):
    """Raise BadInput unless the file's suffix is one of these."""
    if Path(path).suffix not in suffixes:
        raise BadInput(f"--to {path}: expected a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")


def write_state_dict(path, tensors, meta):
    """Write {name: tensor} as .safetensors, or as .pth or .pt: {"state_dict": tensors, "meta": meta}.

    meta: JSON values; in safetensors they are JSON text under the metadata key `featcache`. A file that
    holds the same tensors already is left as it is; raises BadInput if it holds others, and if what was
    written does not read back.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.exists():
        _keep_or_refuse(path, _same(_read(path), tensors))
        return
    if path.suffix == ".safetensors":
        data = safetensors.torch.save(tensors, metadata={"featcache": json.dumps(meta)})
        _write(path, lambda file: file.write(data), lambda: _same(_read(path), tensors))
    else:
        # A view would be saved with all of what it is a view of.
        content = {"state_dict": {name: tensor.clone() for name, tensor in tensors.items()}, "meta": meta}
        _write(path, lambda file: torch.save(content, file), lambda: _same(_read(path), tensors))


def write_program(path, trace, meta):
    """Write a torch.export program as .pt2, with meta as its extra file featcache.json. Raises BadInput as above.

    trace: function that makes the program; not called if the file is there already, of the same weights.
    """
    path = Path(path)
    if path.exists():
        _keep_or_refuse(path, all(_program_meta(path).get(key) == meta[key] for key in SAME_PROGRAM))
        return
    program = trace()
    _write(
        path,
        lambda file: torch.export.save(program, file, extra_files={META: json.dumps(meta)}),
        lambda: _program_meta(path) == meta,
    )


class _Patient(io.FileIO):
    """A file whose first error waits until the end: torch's writers, which are C++, abort the process at one."""

    error = None

    def write(self, data):
        """Write bytes, or drop them once a write has failed. Returns their number."""
        left = memoryview(data).cast("B")
        length = len(left)
        try:
            while len(left) and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return length


def _write(path, put, reads_back):
    """Write a file by `put(file)`, whole or not at all. Raises BadInput, also unless `reads_back()` afterwards."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            patient = _Patient(file.fileno(), "wb", closefd=False)
            put(patient)
            if patient.error:
                raise patient.error
    except OSError as error:
        raise BadInput(f"cannot write {path}: {of_the_system(error)}") from None
    if not reads_back():
        path.unlink(missing_ok=True)
        raise BadInput(
            f"{path} does not read back as it was written; look after the disk, and run the same export again"
        )
    click.echo(f"export: {path}", err=True)


def _keep_or_refuse(path, same):
    if not same:
        raise BadInput(f"--to {path}: there is a file already, and it holds something else; remove it or name another")
    click.echo(f"export: {path} holds these tensors already", err=True)


def _read(path):
    """The tensors of a file written here, or None if it is anything else."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception:  # Whatever is wrong with it, it is not what was to be written.
        return None


def _same(old, new):
    return (
        isinstance(old, dict)
        and old.keys() == new.keys()
        and all(
            isinstance(old[k], torch.Tensor) and old[k].dtype == v.dtype and old[k].equal(v) for k, v in new.items()
        )
    )


def _program_meta(path):
    """The meta of a program written here, or {} if it is anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(f"/{META}"))
            # None: every file in it has the checksum that it was written with.
            return json.loads(archive.read(name)) if archive.testzip() is None else {}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
