"""Training a block from beginning to end on features in memory, by the loop that runs train-probes."""

from featcache.probes.engine.fit import fit_block
from featcache.probes.engine.loop import train_epoch
from featcache.probes.engine.training import Training
from featcache.probes.inputs.batches import Piece, epoch_order


def train_block(specs, features, labels, classes, order_seed):
    """features: [N, D] or [N, D, S], any float dtype. labels: int8 [N, C] or int64 [N]. Returns TrainedProbes."""
    if specs[0].optimizer.full_batch:
        return fit_block(specs, features, labels, classes)
    training = Training(specs, features.shape[1], classes, labels)
    while training.epoch < training.epochs:
        order = epoch_order(len(features), order_seed, training.epoch).to(features.device)
        train_epoch([training], [Piece(features, order, order, True)], labels, labels.device)
    return training.finish()


def fit_convex(specs, features, labels, classes):
    """Returns weights, losses, and whether the steps ran out, of full-batch probes."""
    fits = specs[0].optimizer.fit(specs, features, labels, classes)
    return [fit.weights for fit in fits], [fit.losses for fit in fits], [not fit.converged for fit in fits]
