"""Inputs that many published networks share, whatever their family."""

from featcache.backbones.architecture import Architecture, Fields

IMAGENET: Fields = {"mean": Architecture.mean, "std": Architecture.std}
CLIP: Fields = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
# TensorFlow's Inception has this one, and Google's networks after it.
HALF: Fields = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
PLAIN: Fields = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
# Where a short side of size * 256 / 224 is from, for reports.
SHORT_SIDE_256 = "a guess: 256 for a crop of 224, as DINO, MAE and most self-supervised methods evaluate"
