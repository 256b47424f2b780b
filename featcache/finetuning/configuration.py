"""Training of one configuration from its first step, or its state, to its files in the run folder."""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from featcache.atomic import remove
from featcache.backbones.backbone import hash_tensors
from featcache.backbones.recognise import taken_for
from featcache.errors import BadInput
from featcache.extraction.images import image_batches
from featcache.finetuning.draws import Draws, batches, parts, remaining, steps_of
from featcache.finetuning.images import Key, TrainingImages
from featcache.finetuning.logits import logits_of
from featcache.finetuning.network import Network, batch_norms
from featcache.finetuning.recipe import Task
from featcache.finetuning.tuner import Part, Tuner
from featcache.probes.engine.mini_batch import MiniBatchRecipe
from featcache.probes.engine.scoring import new_tally
from featcache.probes.runs.probe_file import Origin, save_probes
from featcache.probes.runs.run_file import PARTIAL
from featcache.probes.runs.tuned import backbone_path, write_backbone, write_logits
from featcache.probes.scores.metrics import gain
from featcache.probes.spec import ProbeSpec, spec_to_dict
from featcache.probes.trained import TrainedProbe
from featcache.probes.tuning import Full
from featcache.progress import Progress
from featcache.ranks import Alone

# A state is written after a step, but not more often than this, so a kill costs about that much.
SAVE_SECONDS = 30
# Images that are scored at a time.
SCORED_AT_ONCE = 64


class Configuration:
    """One spec of a task in training."""

    def __init__(
        self, task: Task, spec: ProbeSpec, folder: Path, origin: Origin, device: torch.device, workers: int, ranks: Alone,
        progress: Progress,
    ):  # fmt: skip
        self.task, self.spec, self.folder, self.origin = task, spec, folder, origin
        self.device, self.workers, self.ranks, self.progress = device, workers, ranks, progress
        self.recipe = MiniBatchRecipe.of(spec)
        chosen = task.resolved.sets[spec.sample]
        keys = [(name, row) for name in chosen.splits for row in range(len(task.data.splits[name]))]
        self.labels, self.keys = chosen.labels, keys if chosen.rows is None else [keys[row] for row in chosen.rows]
        records = [task.data.splits[name][row] for name, row in self.keys]
        self.sizes = np.array([(record.height, record.width) for record in records])
        self.draws = Draws(task.basis.seed, spec.seed or 0)
        self.tuner = self._tuner()
        self.repeats = self.tuner.network.tuning.repeats
        self.steps = steps_of(len(self.keys), self.recipe.batch_size, self.repeats)
        self._check_parts()
        self._saved_at = time.monotonic()

    def _tuner(self) -> Tuner:
        task, tuning = self.task, self.spec.finetune
        assert isinstance(tuning, Full), "prepare() takes no other"
        network = Network(*task.source.load(task.data, tuning), self.spec, len(task.data.classes))
        if task.start is not None:
            network.fill_head({name: weight.clone() for name, weight in task.start.weights.items()})
        if tuning.norm == "sync" and self.ranks.size > 1:
            if self.device.type != "cuda":
                raise BadInput("finetune.norm: sync is for processes with a GPU each; start one process, or say train")
            # In place, so that the backbone sees it too.
            nn.SyncBatchNorm.convert_sync_batchnorm(network.trunk)
        return Tuner(network, self.labels.to(self.device), self.draws, self.device, self.ranks)

    def _check_parts(self) -> None:
        """Raise BadInput if a process would have a single image at a time, and batch norms that train."""
        network = self.tuner.network
        several = parts(self._batches(0)[-1], network.tuning.micro_batch, self.ranks.size)
        if network.tuning.norm != "eval" and batch_norms(network.trunk) and min(map(len, several)) < 2:
            raise BadInput(
                f"batches of {len(self._batches(0)[-1])} images leave a process with one at a time, which has no variance "
                "for batch norms to divide by; take larger batches or fewer processes, or say norm: eval"
            )

    @property
    def state(self) -> Path:
        """The file of its state."""
        return self.folder / PARTIAL / f"{self.spec.id}.safetensors"

    def train(self) -> None:
        """Train to the end and write the files, the probe's own last."""
        tuner, spec = self.tuner, self.spec
        if self.state.exists():
            tuner.restore(self.state)
        self.progress.skip(tuner.epoch * len(self.keys) + sum(map(len, self._batches(tuner.epoch)[: tuner.step])))
        stopped = None
        loader = self._loaded(tuner.epoch, tuner.step)
        begun = -1
        for epoch, step in remaining(self.recipe.epochs, self.steps, (tuner.epoch, tuner.step)):
            if epoch != begun:
                begun, rows = epoch, self._batches(epoch)
                factors = spec.schedule.factors(self.recipe.epochs, self.steps, epoch)
            tuner.train_step(self._rows(rows[step]), self._parts(rows[step], loader), float(factors[step]))
            self.progress.update(len(rows[step]))
            if step == self.steps - 1 and tuner.diverged is None:
                stopped = self._end_epoch()
            if tuner.diverged is not None or stopped:
                break
            self._save()
        loader.close()
        self._write(stopped)

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """Return the numbers of the images of each mini-batch; see draws.batches."""
        return batches(self.draws.order(epoch, len(self.keys)), self.recipe.batch_size, self.repeats)

    def _rows(self, numbers: np.ndarray) -> Tensor:
        """Return the rows of images by their numbers, which tell copies apart."""
        return torch.from_numpy(numbers % len(self.keys))

    def _mine(self, batch: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return [(number of the part, numbers of its images)] of the parts of a batch that fall to this process."""
        numbered = list(enumerate(parts(batch, self.tuner.network.tuning.micro_batch, self.ranks.size)))
        return [(number, rows) for number, rows in numbered[self.ranks.rank :: self.ranks.size] if len(rows)]

    def _loaded(self, epoch: int, step: int) -> Generator[Tensor]:
        """Yield the pixels of this process's parts, from a step on to the end of training."""
        network, data = self.tuner.network, self.task.data
        images = TrainingImages(data, network.backbone.preprocessing, network.tuning)
        loaded = image_batches(images, self._keys(epoch, step), self.workers, pin_memory=self.device.type == "cuda")
        for pixels, _ in loaded:
            yield pixels

    def _keys(self, first: int, step: int) -> Iterator[list[Key]]:
        data, tuning = self.task.data, self.tuner.network.tuning
        augmentation = data.augmentation
        if tuning.crop_scale:
            lowest, highest = tuning.crop_scale
            augmentation = type(augmentation)(**asdict(augmentation) | {"scale": (lowest, highest)})
        for epoch in range(first, self.recipe.epochs):
            # A copy of an image is augmented as the image is in an epoch that never comes.
            augmented = [epoch + copy * self.recipe.epochs for copy in range(self.repeats)]
            crops = np.concatenate([self.draws.crops(e, self.sizes, augmentation) for e in augmented])
            colors = np.concatenate([self.draws.colors(e, len(self.keys)) for e in augmented])
            for batch in self._batches(epoch)[step if epoch == first else 0 :]:
                for _, rows in self._mine(batch):
                    yield [
                        (*self.keys[row % len(self.keys)], tuple(crops[row].tolist()), int(colors[row])) for row in rows
                    ]

    def _parts(self, batch: np.ndarray, loader: Iterator[Tensor]) -> Iterator[Part]:
        for number, rows in self._mine(batch):
            self.progress.phase("decode")
            pixels = next(loader)
            self.progress.phase("train")
            yield number, pixels, self._rows(rows)

    def _end_epoch(self) -> str | None:
        """Close an epoch; return why training ends early, or None."""
        tuner, spec, chosen_on = self.tuner, self.spec, self.task.resolved.chosen_on
        tuner.end_epoch(self.steps)
        line = f"epoch {tuner.epoch} of {self.recipe.epochs}, loss {tuner.losses[-1]:.4g}"
        score = math.nan
        if chosen_on is not None and (spec.keep == "best" or spec.patience):
            logits = self._logits(chosen_on)
            metric = self.task.resolved.metric
            tally = new_tally([spec], self.task.labels(chosen_on), logits.shape[1], [metric])
            tally.add(logits.unsqueeze(0))
            value = float(tally.scores()[metric])
            score = gain(metric, value)
            line += f", {chosen_on} {metric} {value:.4f}"
        tuner.validated(score)
        self.progress.note(f"{spec.id}: {line}")
        return "patience" if tuner.impatient() else None

    def _logits(self, role: str) -> Tensor:
        tuner = self.tuner
        self.progress.phase("validate")
        at_once = tuner.network.tuning.micro_batch or min(self.recipe.batch_size, SCORED_AT_ONCE)
        names = self.task.resolved.splits[role]
        return logits_of(
            tuner.network, tuner.weights(), self.task.data, names, at_once, self.workers, self.device, self.ranks
        )

    def _save(self) -> None:
        if self.ranks.rank == 0 and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.state.parent.mkdir(exist_ok=True)
            content = vars(self.origin) | {"name": self.spec.id, "specs": [spec_to_dict(self.spec)]}
            self.tuner.save(self.state, content)
            self._saved_at = time.monotonic()

    def _write(self, stopped: str | None) -> None:
        """Score the final weights and write backbone, logits and probe; the state is not needed any more."""
        tuner, task, spec, run = self.tuner, self.task, self.spec, self.origin.run
        epoch = tuner.finish()
        logits = {role: self._logits(role) for role in task.resolved.scored}
        if self.ranks.rank != 0:
            return
        network, diverged = tuner.network, tuner.diverged
        weights = network.head_weights()
        if diverged is None and not all(
            bool(v.isfinite().all()) for v in (*network.own_tensors().values(), *weights.values())
        ):
            # The loss of the last step was still finite, but the weights after it are not.
            diverged = tuner.update.steps - 1
        if diverged is not None:
            self.ranks.say(
                f"warning: {spec.id} ({spec.optimizer.summary_of_rate}) diverged in epoch {diverged // self.steps + 1}, at "
                f"step {diverged + 1}; its scores are empty"
            )
            logits = {role: torch.full_like(own, torch.nan) for role, own in logits.items()}
            weights = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
        else:
            tensors = network.own_tensors()
            facts = {
                "weights_sha256": hash_tensors(network.trunk.state_dict()),
                "arch": network.backbone.arch,
                "preprocessing": network.backbone.preprocessing.describe(),
            }
            write_backbone(self.folder, spec.id, run, tensors, facts)
            path = backbone_path(self.folder, spec.id)
            if taken_for(tensors, path) != network.backbone.arch:
                self.ranks.say(
                    f"note: load {path} with --arch {network.backbone.arch}; its tensors alone do not say so"
                )
        write_logits(self.folder, spec.id, run, logits, diverged is not None)
        probe = TrainedProbe(spec, weights, tuner.losses, diverged, epoch, tuner.scores, stopped)
        save_probes(self.folder, [probe], self.origin)
        remove(self.state)
