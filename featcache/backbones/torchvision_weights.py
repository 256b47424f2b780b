"""The input that torchvision's own weights expect, read from its lists of weights (nothing is downloaded)."""

from featcache.backbones.torchvision_import import models


def input_of(name, size=None):
    """Return {size, mean, std, interpolation} of a model's default weights, or of those of that input size."""
    weights = models.get_model_weights(name)
    presets = [w.transforms() for w in (weights.DEFAULT, *weights)]
    preset = next((p for p in presets if p.crop_size == [size]), presets[0])
    return {
        "size": size or preset.crop_size[0],
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }
