"""A trained probe as a file: probes/ID.safetensors."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch

from featcache.atomic import write_whole
from featcache.errors import BadInput
from featcache.probes.spec import spec_from_dict
from featcache.probes.stack import TrainedProbe


def probe_path(folder, probe_id):
    """Path of a probe of a run folder."""
    return Path(folder) / "probes" / f"{probe_id}.safetensors"


def save_probe(folder, probe, store_id):
    """Write a trained probe as probes/ID.safetensors: weights, and as metadata spec, losses, store."""
    losses = [loss if math.isfinite(loss) else None for loss in probe.losses]
    scores = [score if math.isfinite(score) else None for score in probe.scores]
    content = {
        "spec": asdict(probe.spec),
        "losses": losses,
        "scores": scores,
        "diverged": probe.diverged,
        "epoch": probe.epoch,
        "stopped": probe.stopped,
        "store_id": store_id,
    }
    # One metadata key: safetensors does not keep the order of several, and the bytes should not vary.
    data = safetensors.torch.save(probe.weights, metadata={"featcache": json.dumps(content)})
    write_whole(probe_path(folder, probe.spec.id), data)


def load_probe(folder, probe_id):
    """Read a TrainedProbe of a run. Raises BadInput if there is none of that id or it is damaged."""
    path = probe_path(folder, probe_id)
    if not path.is_file():
        raise BadInput(f"run {folder} has no probe {probe_id}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["featcache"])
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"damaged probe {path}: {error}; delete it and run the same train-probes again") from None
    losses = [math.nan if loss is None else loss for loss in content["losses"]]
    scores = [math.nan if score is None else score for score in content["scores"]]
    return TrainedProbe(
        spec_from_dict(content["spec"]),
        weights,
        losses,
        content["diverged"],
        content["epoch"],
        scores,
        content["stopped"],
    )
