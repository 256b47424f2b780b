"""The input that torchvision's own weights expect, read from its lists of weights (nothing is downloaded)."""

from pathlib import Path

from featcache.backbones.families.torchvision_import import models


def input_of(name, size=None):
    """Return the transform of a model's default weights, or of the first of that input size: fields of Architecture."""
    fields = _transform(models.get_model_weights(name).DEFAULT)
    if size in (None, fields["size"]):
        return fields
    # Where there are no weights of that size, the ratio of the crop stays.
    resized = fields | {"size": size, "short_side": round(size * fields["short_side"] / fields["size"])}
    return next(iter(_weight_sets(name, size).values()), resized)


def loaded_input(name, size, published, path):
    """Return the input of a checkpoint in a model's layout, and where each field is from: (fields, {field: words}).

    size: as the tensors tell it, None if they do not. published: whether the checkpoint is one as torchvision
    publishes them, under bare names and with its classifier; then its default weights are assumed, else the
    first, which are of the plain recipe. The name of torchvision's own file tells which weights they are.
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
    fields, said = sets[chosen], []
    differing = [field for field in fields if any(found[field] != fields[field] for found in sets.values())]
    for other, found in sets.items():
        options = [_option(field, found[field]) for field in differing if found[field] != fields[field]]
        if options:
            said.append(f"{' '.join(options)} for {other}")
    return fields, dict.fromkeys(differing, f"torchvision's {chosen} assumed ({'; '.join(said)})")


def _weight_sets(name, size):
    """{weights' name: transform} of a model, in torchvision's order; of that input size, if it is not None."""
    sets = {weights.name: _transform(weights) for weights in models.get_model_weights(name)}
    return {name: fields for name, fields in sets.items() if size in (None, fields["size"])}


def _transform(weights):
    preset = weights.transforms()
    return {
        "size": preset.crop_size[0],
        "short_side": preset.resize_size[0],
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }


def _option(field, value):
    written = ",".join(f"{v:.6g}" for v in value) if isinstance(value, tuple) else value
    return f"--{field.replace('_', '-')} {written}"
