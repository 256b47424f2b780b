"""Energy-based pointing game (Wang et al., Score-CAM, CVPR Workshops 2020)."""

import numpy as np
import torch


def box_mask(boxes, size):
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


def energy_in_boxes(maps, masks):
    """Share of a map's positive energy that lies in its mask.

    maps: [N, S, S]. masks: bool [N, S, S]. Returns float64 [N] in 0..1, NaN where nothing is
    positive. No smoothing and no rounding; a uniform map scores the mask's share of the image.
    """
    positive = maps.double().clamp(min=0)
    inside = (positive * masks).sum((1, 2))
    return inside / positive.sum((1, 2))
