"""The input that torchvision's own weights expect, read from its lists of weights (nothing is downloaded)."""

from os import PathLike
from pathlib import Path
from typing import Any

from featcache.backbones.architecture import Architecture, Checkpoint, Fields, Origins
from featcache.backbones.families.torchvision_import import models
from featcache.backbones.families.usual_inputs import SHORT_SIDE_256


def input_of(name: str, size: int | None = None) -> Fields:
    """Return the transform of a model's default weights, or of the first of that input size: fields of Architecture."""
    fields = _transform(models.get_model_weights(name).DEFAULT)
    if size in (None, fields["size"]):
        return fields
    # Where there are no weights of that size, the ratio of the crop stays.
    resized = fields | {"size": size, "short_side": round(size * fields["short_side"] / fields["size"])}
    return next(iter(_weight_sets(name, size).values()), resized)


def customs(model: str, architecture: Architecture, checkpoint: Checkpoint | None) -> tuple[Fields, Origins]:
    """Return the input of weights in the layout of a torchvision model: (fields of Architecture, where each is from).

    A self-supervised method in this layout evaluates with a short side of 256 for a crop of 224, DINO bicubically.
    Random weights have the same short side, since no public weights are theirs.
    """
    if checkpoint is None:
        return {"short_side": None}, {}
    encoder = checkpoint.encoder
    if encoder.method:
        bicubic = {"interpolation": "bicubic"} if "teacher" in encoder.prefix.split(".") else {}
        return {"short_side": None} | bicubic, {"short_side": SHORT_SIDE_256}
    published = not encoder.prefix and model == architecture.name and _has_classifier(architecture, checkpoint)
    return _checkpoint_input(model, architecture.size if architecture.infer else None, published, checkpoint.path)


def _checkpoint_input(
    name: str, size: int | None, published: bool, path: str | PathLike[str]
) -> tuple[Fields, Origins]:
    """Return the input of a checkpoint in a model's layout, and where each field is from.

    size: if the tensors tell it. published: whether the checkpoint is one as torchvision publishes them, under bare
    names and with its classifier. Such a checkpoint is assumed to be the model's default weights, any other the first
    weights, which are of the plain recipe. The name of torchvision's own file decides which weights they are.
    """
    for weights in models.get_model_weights(name):
        if Path(weights.url).stem in Path(path).name:
            fields = _transform(weights)
            return fields, dict.fromkeys(fields, f"torchvision's {weights.name}, by the file's name")
    sets = _weight_sets(name, size)
    if not sets:
        return {}, {}
    default = models.get_model_weights(name).DEFAULT.name
    chosen = default if published and default in sets else next(iter(sets))
    fields, alternatives = sets[chosen], []
    differing = [field for field in fields if any(other[field] != fields[field] for other in sets.values())]
    for other, others in sets.items():
        options = [_option(field, others[field]) for field in differing if others[field] != fields[field]]
        if options:
            alternatives.append(f"{' '.join(options)} for {other}")
    return fields, dict.fromkeys(differing, f"torchvision's {chosen} assumed ({'; '.join(alternatives)})")


def _has_classifier(architecture: Architecture, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint holds the network's own classifier, with as many classes."""
    tensors, network = checkpoint.encoder.tensors, checkpoint.network
    own = {k: v.shape for k, v in network.state_dict().items() if k.startswith(architecture.classifier)}
    return all(k in tensors and tensors[k].shape == shape for k, shape in own.items())


def _weight_sets(name: str, size: int | None) -> dict[str, Fields]:
    """Return {weights' name: transform} of a model, in torchvision's order; if size is given, those of that size."""
    sets = {weights.name: _transform(weights) for weights in models.get_model_weights(name)}
    return {name: fields for name, fields in sets.items() if size in (None, fields["size"])}


def _transform(weights: Any) -> Fields:
    preset = weights.transforms()
    return {
        "size": preset.crop_size[0],
        "short_side": preset.resize_size[0],
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }


def _option(field: str, value: Any) -> str:
    written = ",".join(f"{v:.6g}" for v in value) if isinstance(value, tuple) else value
    return f"--{field.replace('_', '-')} {written}"
