"""What a run of fine-tuning holds beside its probes: the backbone of each, its logits, and the images that these are of.

All are safetensors files that hold their own checksum.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from featcache.errors import BadInput
from featcache.probes.runs.run_file import Summary, identity
from featcache.probes.runs.sealed_tensors import read_content, unseal, write_sealed

BACKBONES, LOGITS, IMAGES = "backbones", "logits", "images.safetensors"


def backbone_path(folder: str | Path, probe: str) -> Path:
    """Return the path of a fine-tuned backbone, which `extract --backbone` takes."""
    return Path(folder) / BACKBONES / f"{probe}.safetensors"


def logits_path(folder: str | Path, probe: str) -> Path:
    """Return the path of a probe's logits on the images of all roles that are scored."""
    return Path(folder) / LOGITS / f"{probe}.safetensors"


def write_backbone(
    folder: str | Path, probe: str, run: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a backbone's tensors under the names of its architecture. run: identity() of the run."""
    path = backbone_path(folder, probe)
    path.parent.mkdir(exist_ok=True)
    write_sealed(path, dict(tensors), {"probe": probe, "run": run, **facts})


def write_logits(folder: str | Path, probe: str, run: str, logits: Mapping[str, Tensor], diverged: bool) -> None:
    """Write logits, {role: float32 [N, C]}. A probe that diverged has no backbone."""
    path = logits_path(folder, probe)
    path.parent.mkdir(exist_ok=True)
    write_sealed(path, dict(logits), {"probe": probe, "run": run, "diverged": diverged})


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """The images of one role. names: (split, id) of each. labels: as in a store. digests: uint8 [N, 16], if known."""

    names: list[tuple[str, str]]
    labels: Tensor
    digests: Tensor | None


def write_images(folder: str | Path, run: str, images: Mapping[str, ScoredImages]) -> None:
    """Write the images of the roles that are scored."""
    tensors = {f"{role}.labels": own.labels for role, own in images.items()}
    tensors |= {f"{role}.digests": own.digests for role, own in images.items() if own.digests is not None}
    write_sealed(Path(folder) / IMAGES, tensors, {"run": run, "names": {r: own.names for r, own in images.items()}})


def read_images(folder: str | Path, role: str) -> ScoredImages:
    """Read the images of a role. Raises BadInput for damage."""
    content, tensors = _read(Path(folder) / IMAGES)
    names = [(str(split), str(name)) for split, name in content["names"][role]]
    return ScoredImages(names, tensors[f"{role}.labels"], tensors[f"{role}.digests"])


def read_logits(folder: str | Path, probe: str) -> dict[str, Tensor]:
    """Read the logits of a probe, {role: float32 [N, C]}. Raises BadInput for damage."""
    return _read(logits_path(folder, probe))[1]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        content, _ = unseal(path)
        return content, safetensors.torch.load_file(path)
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"damaged file {path}: {error}; run the same finetune again, which makes it anew") from None


def is_tuned(summary: Mapping[str, Any]) -> bool:
    """Return whether a run's probes have backbones of their own."""
    return "finetuned" in summary


def is_whole(folder: str | Path, probe: str, run: str) -> bool:
    """Return whether a probe's backbone and logits are there and undamaged. run: identity() of the run."""
    if _fault(logits_path(folder, probe), run):
        return False
    return bool(read_content(logits_path(folder, probe)).get("diverged")) or not _fault(
        backbone_path(folder, probe), run
    )


def tuned_damage(folder: str | Path, summary: Summary, probes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong with it) for the files of this module that are damaged, or that a finished run lacks.

    probes: ids of the probes that the run holds.
    """
    run, finished, diverged = identity(summary), "key" in summary, set(summary.get("diverged", ()))
    paths = [path for room in (BACKBONES, LOGITS) for path in sorted((Path(folder) / room).glob("*.safetensors"))]
    if finished:
        wanted = [
            p(folder, n) for n in probes for p in (backbone_path, logits_path) if p is logits_path or n not in diverged
        ]
        paths = [*paths, *(path for path in wanted if path not in paths), Path(folder) / IMAGES]
    elif (Path(folder) / IMAGES).exists():
        paths.append(Path(folder) / IMAGES)
    for path in paths:
        if fault := _fault(path, run):
            yield path.relative_to(folder).as_posix(), fault


def _fault(path: Path, run: str) -> str:
    """Say what is wrong with a file, "" if nothing is."""
    if not path.is_file():
        return "it is missing"
    try:
        content, _ = unseal(path)
    except ValueError as error:
        return str(error)
    if content.get("run") != run:
        return "it is of another run"
    if path.parent.name in (BACKBONES, LOGITS) and content.get("probe") != path.stem:
        return f"it is the file of {content.get('probe')} under another name"
    return ""
