"""What neighbours vote for, as logits of probabilities.

The probability of a class is its share of the votes: among all classes for a loss with a softmax, and against the
neighbours without the class for a loss with sigmoids. Labels of -1 are no vote, unless the loss reads them as absent.
"""

import math

import torch
from torch import Tensor

from featcache.probes.heads.knn import Knn
from featcache.probes.losses.loss import Loss

# The logarithm of float64's machine epsilon stands for that of no vote at all, as in scikit-learn's log_loss.
NO_VOTE = math.log(2.0**-52)


def vote(head: Knn, loss: Loss, similarities: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the logits of n images, float32 [n, C].

    similarities: of their neighbours, float32 [n, K], falling, of which the first head.k count. labels: of the neighbours,
    int64 [n, K] or int8 [n, K, C].
    """
    weights, own = head.vote_weights(similarities[:, : head.k]), labels[:, : head.k]
    if own.ndim == 2:
        favour = weights.new_zeros(len(weights), classes).scatter_add_(1, own, weights)
        against = weights.sum(1, keepdim=True) - favour
    else:
        own = loss.read(own.flatten(0, 1)).view_as(own)
        favour, against = (torch.einsum("nk,nkc->nc", weights, (own == value).double()) for value in (1, 0))
    if loss.link == "sigmoid":
        return (favour.log() - against.log()).nan_to_num(NO_VOTE, -NO_VOTE, NO_VOTE).clamp(NO_VOTE, -NO_VOTE).float()
    shares = (favour / favour.sum(1, keepdim=True)).log().nan_to_num(neginf=-math.inf, nan=-math.inf)
    # A class without a vote ranks behind all others of its image, however small their shares are.
    lowest = shares.masked_fill(favour == 0, 0).amin(1, keepdim=True)
    return torch.where(favour == 0, (lowest - 1).clamp(max=NO_VOTE), shares).float()
