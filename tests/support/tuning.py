"""Fine-tuning of a tiny network on tiny images, as tests and the programs that they start call it."""

import torch
import trust
from torch import nn

import featcache
from featcache.finetuning.configuration import Configuration
from featcache.finetuning.recipe import prepare
from featcache.finetuning.settings import Settings
from featcache.probes.runs.probe_file import Origin
from featcache.progress import Progress
from featcache.ranks import Alone

SIZE = 32
BASE = {
    "features": "pooled", "head": "linear", "loss": "bce", "optimizer": {"type": "sgd", "lr": 0.1}, "epochs": 2,
    "batch_size": 8,
}  # fmt: skip


def network():
    """A backbone with batch norm and without running off to anything large: --arch tuning:network."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 4, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip


def plain_network():
    """The same without batch norm, so that images do not touch each other: --arch tuning:plain_network."""
    return nn.Sequential(nn.Conv2d(3, 6, 5, 4, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())


def recipe(tuning=None, **changes):
    """The content of a recipe of one group. tuning: fields of its section finetune."""
    return {"probes": [BASE | {"finetune": {"type": "full", "size": SIZE} | (tuning or {})} | changes]}


def finetune(images, content, run, arch="tuning:network", **more):
    """Fine-tune the tiny network on the images of trust.write_images; return the Run."""
    given = {"root": images, "arch": arch, "workers": 0} | more
    (run, _) = trust.quietly(lambda: featcache.finetune("random", "manifest", content, run=run, **given))
    return run


def configuration(images, content, folder, arch="tuning:network", seed=0, **more):
    """The only Configuration of a recipe, not yet trained."""
    given = {"backbone": "random", "dataset": "manifest", "recipe": content, "root": images, "arch": arch, "seed": seed}
    task = prepare(Settings(**given | more))
    (spec,) = task.resolved.specs
    origin, cpu = Origin(task.basis.store_id, "x"), torch.device("cpu")
    return Configuration(task, spec, folder, origin, cpu, 0, Alone(), Progress("finetune", 0, unit="img"))


def trained(images, content, folder, **more):
    """{name: tensor} of a network trained by a recipe of one configuration, in memory alone."""
    made = configuration(images, content, folder, **more)
    (folder / "probes").mkdir(parents=True, exist_ok=True)
    made.train()
    return {name: tensor.clone() for name, tensor in made.tuner.network.state_dict().items()}
