"""Stratified folds of one class, as scikit-learn's StratifiedKFold makes them without shuffling."""

import numpy as np


def stratified_folds(positive: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of each image, int64 [n]. positive: bool [n], in the order of the images.

    Each fold has its share of positives and of negatives, in their order. Which fold gets a remainder depends on which
    of the two comes first.
    """
    codes = positive == positive[0] if len(positive) else positive
    # The first kind has code 0 in scikit-learn.
    codes = (~codes).astype(np.int64)
    ordered = np.sort(codes)
    numbers = np.empty(len(codes), np.int64)
    for code in (0, 1):
        sizes = [int((ordered[fold::folds] == code).sum()) for fold in range(folds)]
        numbers[codes == code] = np.repeat(np.arange(folds), sizes)
    return numbers
