"""How a search for neighbours divides its memory."""

from dataclasses import dataclass

import torch

from featcache.errors import BadInput
from featcache.probes.neighbours.rows import READ_ROWS

# Bytes of the similarities that are computed at a time. On a GPU few, large products are best.
PRODUCT = {"cpu": 256 << 20, "cuda": 1 << 30}
# Training images whose similarities are compared at a time, and bytes of what is computed in float64 at a time.
WINDOW, EXACT = 1 << 16, {"cpu": 4 << 20, "cuda": 512 << 20}
MOST_IMAGES = 1 << 13


@dataclass(frozen=True)
class SearchMemory:
    """What a search for neighbours holds at a time.

    images: for which neighbours are searched together. window: training images whose similarities are compared at a time.
    held: whether the training features stay in memory. prepared: whether they do as factors of the product, too, in
    float32. exact: bytes of what is computed in float64. bytes: of all this.
    """

    images: int
    window: int
    held: bool
    prepared: bool
    exact: int
    bytes: int

    @classmethod
    def of(cls, room: float, device: torch.device, rows: int, width: int, itemsize: int, kept: int) -> "SearchMemory":
        """Divide `room` bytes.

        rows, width, itemsize: number of training images, width of their features, and bytes of a stored number. kept: how
        many candidates are kept for an image, over all draws. Raises BadInput if the room is too small for any search.
        """
        window, exact = min(max(rows, 1), WINDOW), min(EXACT[device.type], int(room / 8))
        # A tile as it is read and as a factor, in float64 for its norms, and the norms.
        tile = min(READ_ROWS, rows) * width * 12 + 8 * rows
        image = _image_bytes(width, window, kept)
        least = tile + exact + 64 * image
        if room < least:
            raise BadInput(
                f"--memory: a search for neighbours among {rows} images needs at least {least / 1e9:.2g} GB, and "
                f"{room / 1e9:.2g} GB are for it"
            )
        left = room - tile - exact
        product = max(min(PRODUCT[device.type], left / 4), 64 * image)
        images = int(min(max(product // image, 64), MOST_IMAGES))
        left -= images * image
        raw, factors = rows * width * itemsize, rows * width * 4
        held = raw <= left
        prepared = held and raw + factors <= left
        if not held:
            # The training images are read again for every group of images: the larger, the fewer times.
            window = min(window, READ_ROWS)
            image = _image_bytes(width, window, kept)
            images = int(max(min((room - tile - exact) / 2 // image, 16 * MOST_IMAGES), 64))
        used = tile + exact + images * image + held * raw + prepared * factors
        return cls(images, window, held, prepared, exact, int(used))


def _image_bytes(width: int, window: int, kept: int) -> int:
    """Return roughly the bytes that an image takes.

    These are its features in float32, twice, and in float64; its similarities, those of a draw, and what is sorted of
    them; and its candidates with their numbers.
    """
    return 20 * width + 12 * window + 60 * kept
