"""What an attribution has done so far: a file for each piece of the images, so that it can be killed and go on."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from featcache.atomic import remove
from featcache.attribution.passes import Passes
from featcache.attribution.targets import Target
from featcache.probes.runs.sealed_tensors import unseal, write_sealed

# The folder in a run, which is deleted when attribution.csv is written.
FOLDER = "attribution.partial"
# Images of a piece.
IMAGES = 16
# The fields of a Piece that are always tensors.
TENSORS = ("cells", "maps", "predictions", "colours", "coloured")


@dataclass(frozen=True, eq=False)
class Piece:
    """The results of a piece, for M methods, P probes and T targets.

    cells: float64 [M, P, T, columns], what attribution.csv holds beside the identities. maps: float32 [M, P, K, S, S]
    of the K targets that are pictured. passes: what it took. predictions: float64 [P, T, 3], what each probe says of the
    class: logit, probability, and 1 if that is right, else 0; NaN where it is not known. colours: uint8 [n, S, S, 4], maps
    in colours of their own with opacity. coloured: int64 [n, 3], the method, probe and pictured target of each. scales:
    float32 [M, P, T], what to multiply the saved maps by, or None where maps are not saved.
    """

    cells: torch.Tensor
    maps: torch.Tensor
    passes: Passes
    predictions: torch.Tensor
    colours: torch.Tensor
    coloured: torch.Tensor
    scales: torch.Tensor | None = None


def in_pieces(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield targets, which are in order of their images, by IMAGES images."""
    rows = list(dict.fromkeys(target.row for target in targets))
    for start in range(0, len(rows), IMAGES):
        chosen = set(rows[start : start + IMAGES])
        yield [target for target in targets if target.row in chosen]


class Pieces:
    """The files of an attribution's pieces in a run. key: identifies the attribution, by all that its results hang on."""

    def __init__(self, run: Path, key: str, count: int) -> None:
        self.folder, self.key, self.count = run / FOLDER, key, count

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def maps_file(self, number: int) -> Path:
        """Return the file of all maps of a piece, where they are saved. It is complete once the piece is written."""
        return self.folder / f"{number:06d}.npy"

    def write(self, number: int, piece: Piece) -> None:
        """Write a piece, whole or not at all."""
        content: dict[str, Any] = {"key": self.key, "passes": [piece.passes.forward, piece.passes.backward]}
        tensors = {name: getattr(piece, name).contiguous() for name in TENSORS}
        if piece.scales is not None:
            tensors["scales"], content["saved"] = piece.scales, _crc32(self.maps_file(number))
        write_sealed(self._path(number), tensors, content)

    def read(self, number: int) -> Piece:
        """Read a piece. Raises ValueError if it is not there, is damaged, or is another attribution's."""
        content, _ = unseal(self._path(number))
        if content.get("key") != self.key:
            raise ValueError("it is of another attribution")
        if "saved" in content and content["saved"] != _crc32(self.maps_file(number)):
            raise ValueError("its maps are damaged or missing")
        tensors = safetensors.torch.load_file(self._path(number))
        return Piece(passes=Passes(*content["passes"]), **tensors)

    def drop_others(self) -> None:
        """Delete whatever is not one of these pieces, whole: other settings, damage, what a killed process left."""
        own = set()
        for number in range(self.count):
            with suppress(ValueError):
                own |= {self._path(number)} | (
                    {self.maps_file(number)} if self.read(number).scales is not None else set()
                )
        for path in self.folder.iterdir():
            if path not in own:
                remove(path)

    def missing(self) -> list[int]:
        """Return the numbers of the pieces that are still to be made, after drop_others()."""
        return [number for number in range(self.count) if not self._path(number).exists()]


def _crc32(path: Path) -> int | None:
    """Return the crc32 of a file, None if it is missing."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while part := file.read(4 << 20):
                crc = zlib.crc32(part, crc)
    except FileNotFoundError:
        return None
    return crc
