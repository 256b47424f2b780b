"""`featcache finetune`: train backbone and head together on images, every configuration of a recipe, into a run folder."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcache.arguments import PATH, takes
from featcache.atomic import local_path
from featcache.datasets.class_counts import describe_classes
from featcache.datasets.sources import open_source
from featcache.device import choose_device, multiplying
from featcache.digest import image_digest
from featcache.finetuning.configuration import Configuration
from featcache.finetuning.recipe import Task, prepare
from featcache.finetuning.settings import EXPECTED, Settings
from featcache.probes.engine.scoring import score_logits
from featcache.probes.finish import write_run
from featcache.probes.runs.probe_file import Origin, find_probes
from featcache.probes.runs.run import Run, open_run
from featcache.probes.runs.run_file import identity
from featcache.probes.runs.sealed_tensors import read_content
from featcache.probes.runs.tuned import IMAGES, ScoredImages, backbone_path, is_whole, read_logits, write_images
from featcache.probes.scores.metrics import metrics_of
from featcache.probes.spec import ProbeSpec
from featcache.probes.train import begin_run
from featcache.probes.tuning import Full
from featcache.progress import Progress, say
from featcache.ranks import Alone, join_ranks
from featcache.store.folder import open_folder


@takes(run=PATH, **EXPECTED)
def finetune(
    backbone: str | os.PathLike[str],
    dataset: str,
    recipe: str | os.PathLike[str] | dict[str, Any],
    root: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    head_from: str | os.PathLike[str] | None = None,
    select: str | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    seed: int = 0,
    parity: str | None = None,
) -> Run | None:
    """Train a backbone together with a head on images, for every configuration of a recipe; write a run folder.

    backbone, arch, weights_key, dataset, root: as in featcache.extract. recipe: path of a YAML file, or its content: a
    grid whose groups have a section `finetune` (docs/finetuning.md). run: folder, by default runs/<recipe>-<id>.
    head_from: folder of a run whose probe the heads start from (Kumar et al., ICLR 2022); select: the rule that chooses
    it, by default the run's best. device: torch device. workers: processes that decode images. seed: draws the order of
    the images, their augmentation, and a random backbone. parity: name of one of the recipe's profiles.

    Returns the Run. Under torchrun the processes share every mini-batch, and all but the first return None. Finished
    configurations are not trained again; one that was interrupted goes on from its last state, to the same weights.
    Raises BadInput.

        run = featcache.finetune("ckpt.pth", "voc", "recipe.yaml", root="/data")
        features = featcache.extract(run.path / "backbones" / f"{run.scores[0]['probe']}.safetensors", "voc", root="/data")
    """
    started, ranks = time.monotonic(), join_ranks()
    settings = Settings(
        backbone=backbone, dataset=dataset, recipe=recipe, root=root, arch=arch, weights_key=weights_key,
        head_from=head_from, select=select, device=device, workers=workers, seed=seed, parity=parity,
    )  # fmt: skip
    chosen_device = choose_device(device, ranks.local_rank)
    task = prepare(settings)
    for line in describe_classes(task.data):
        ranks.say(line)
    ranks.say(f"backbone: {task.backbone.load_report}")
    for line in _preprocessing(task):
        ranks.say(line)
    stem = "finetune" if isinstance(recipe, dict) else Path(recipe).stem
    folder = local_path(run or Path("runs") / f"{stem}-{task.key[:8]}", "--run")
    place = open_folder(folder)
    with ranks.leading(place.locked(f"waiting: another process is training into {folder}")) as leads:
        if not leads:
            todo = [name for (name,) in ranks.shared()]
            _train(task, folder, todo, chosen_device, workers, ranks)
            return None
        place.sweep()
        begun = begin_run(folder, task, [], {}, lambda specs: {}, {"finetuned": _origin(task)})
        if begun is None:
            ranks.share([])
            say(f"run: {folder} is finished already")
            return open_run(folder)
        summary, others = begun
        everything = [*task.resolved.specs, *others]
        held, mark = find_probes(folder), identity(summary)
        todo = [s.id for s in task.resolved.specs if s.id not in held or not is_whole(folder, s.id, mark)]
        ranks.share([(name,) for name in todo])
        _train(task, folder, todo, chosen_device, workers, ranks)
        return _finish(task, folder, everything, summary, chosen_device, started)


def _preprocessing(task: Task) -> Iterator[str]:
    """Yield lines about each way in which the recipe's configurations prepare images."""
    tunings = [spec.finetune for spec in task.resolved.specs if isinstance(spec.finetune, Full)]
    for tuning in {(t.size, t.short_side, t.interpolation, t.train_size): t for t in tunings}.values():
        backbone, _ = task.source.load(task.data, tuning)
        training = f"; in training {tuning.train_size}x{tuning.train_size}" if tuning.train_size else ""
        yield "\n  ".join((f"preprocessing: {backbone.preprocessing}{training}", *backbone.preprocessing_report))


def _origin(task: Task) -> dict[str, Any]:
    """Return what run.json says of the backbone and of the probe that the heads started from."""
    return {"backbone": str(task.source.path), "start": task.start.spec.id if task.start else None}


def _images(task: Task, role: str, labels: Tensor) -> ScoredImages:
    """Return the images of a role, with the digests of their files."""
    records = [(split, record) for split in task.resolved.splits[role] for record in task.data.splits[split]]
    digests = []
    for _, record in records:
        with open_source(record.image) as file:
            digests.append(torch.frombuffer(bytearray(image_digest(file.read())), dtype=torch.uint8))
    return ScoredImages([(split, record.id) for split, record in records], labels, torch.stack(digests))


def _train(
    task: Task, folder: Path, todo: Sequence[str], device: torch.device, workers: int | None, ranks: Alone
) -> None:
    """Train the configurations of these ids."""
    if not todo:
        return
    specs = [spec for spec in task.resolved.specs if spec.id in todo]
    sets = task.resolved.sets
    total = sum(len(sets[spec.sample]) * (spec.epochs or 0) for spec in specs)
    origin = Origin(task.basis.store_id, identity(task.basis.to_json()))
    count = max(1, min(8, (os.cpu_count() or 1) // 2 // ranks.local_size)) if workers is None else workers
    # Training draws from torch's global generators, which the caller finds as they were.
    own = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    progress = Progress("finetune", total, unit="img")
    with own, ranks.adding_up("nccl" if device.type == "cuda" else "gloo"), progress:
        for spec in specs:
            with multiplying(spec.precision):
                Configuration(task, spec, folder, origin, device, count, ranks, progress).train()


def _finish(
    task: Task, folder: Path, specs: Sequence[ProbeSpec], summary: dict[str, Any], device: torch.device, started: float
) -> Run:
    """Score all probes of the run by their logits, and write its tables."""
    labels = {role: task.labels(role) for role in task.resolved.scored}
    if not (folder / IMAGES).exists():
        write_images(folder, identity(summary), {role: _images(task, role, own) for role, own in labels.items()})
    scored, metrics = {}, metrics_of(task.data.task, summary["select"]["metric"])
    for spec in specs:
        logits = read_logits(folder, spec.id)
        for role, own in labels.items():
            scored[spec.id, role] = score_logits(spec, logits[role], own, role in summary["intervals"], metrics)
    backbone, data = task.backbone, task.data
    backbones = {
        spec.id: str(read_content(path)["weights_sha256"])
        for spec in specs
        if (path := backbone_path(folder, spec.id)).exists()
    }
    sets = task.resolved.sets
    samples = {s.sample.name: sets.described(s.sample) for s in task.resolved.specs if s.sample.partial}
    samples = summary.get("samples", {}) | samples
    facts = {
        "key": task.key, "store": str(task.source.path), "overlap": [],
        "backbones": backbones, "arch": backbone.arch, "weights_sha256": backbone.weights_sha256,
        "preprocessing": backbone.preprocessing.describe(), "dataset": data.name,
    } | ({"samples": samples} if samples else {})  # fmt: skip
    return write_run(folder, specs, scored, labels, data.classes, data.task, summary | facts, device, started)
