"""The pixels of boxes in the backbone's input."""

from collections.abc import Iterable

import numpy as np
import torch


def box_mask(boxes: Iterable, size: int) -> torch.Tensor:
    """Return bool [size, size]: the pixels whose centre lies in the union of the boxes.

    boxes: [M, 4] as x0, y0, x1, y1 in pixels of the map, see Preprocessing.map_boxes.
    """
    centres = np.arange(size) + 0.5
    mask = np.zeros((size, size), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        columns = (centres >= x0) & (centres < x1)
        rows = (centres >= y0) & (centres < y1)
        mask |= rows[:, None] & columns[None, :]
    return torch.from_numpy(mask)
