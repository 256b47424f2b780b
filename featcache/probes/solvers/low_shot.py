"""Low-shot draws: each class learns from a few positives and negatives of its own, as VISSL draws them."""

import hashlib

import numpy as np


def draw_few(labels: np.ndarray, positives: int, negatives: int, seed: int) -> np.ndarray:
    """Return the labels of the images that each class draws, and -1 for all others: int8 [N, C].

    labels: int8 [N, C], 1 present, 0 absent; labels of -1 are never drawn. positives: to draw for each class.
    negatives: to draw for each positive. Every class draws by itself, and so does every number of positives: an image
    may be drawn for one class and not for another. There must be enough of both.

    The numbers are raw outputs of PCG64, which numpy keeps the same in all versions and on all machines.
    """
    drawn = np.full_like(labels, -1)
    for c in range(labels.shape[1]):
        order = np.argsort(np.random.PCG64([seed, positives, c]).random_raw(len(labels)), kind="stable")
        for value, count in ((1, positives), (0, positives * negatives)):
            drawn[order[labels[order, c] == value][:count], c] = value
    return drawn


def digest_of_draw(drawn: np.ndarray) -> str:
    """Return 16 hex digits of the sha256 over a draw, int8 [N, C], row by row."""
    return hashlib.sha256(np.ascontiguousarray(drawn).tobytes()).hexdigest()[:16]
