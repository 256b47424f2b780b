"""Training of the probes that a run folder lacks: waves over the data, states on disk, the rungs of a search.

A run that was killed goes on from the last states that it wrote, and ends with the same bits.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from featcache.errors import BadInput
from featcache.probes.engine.fit import fit_block
from featcache.probes.engine.halving import rung_epoch, rungs
from featcache.probes.engine.loop import train_epoch
from featcache.probes.engine.memory import MemoryBudget
from featcache.probes.engine.scoring import new_tally
from featcache.probes.engine.training import Training, state_path
from featcache.probes.engine.waves import Buffers, Wave, missing_specs, plan_waves, unsaved
from featcache.probes.grids.search import Halving
from featcache.probes.inputs.batches import view_of_epoch
from featcache.probes.inputs.input import Input, load_labels, narrowed
from featcache.probes.inputs.resident import Resident
from featcache.probes.inputs.streamed import Streamed
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.runs.probe_file import Origin, find_probes, load_probes, save_probes
from featcache.probes.runs.run_file import PARTIAL
from featcache.probes.sample import Sample
from featcache.probes.scores.metrics import gain
from featcache.probes.spec import ProbeSpec
from featcache.probes.trained import ROWS, TrainedProbe
from featcache.progress import Progress, say
from featcache.ranks import Alone

# States are written after an epoch, but not more often than this, so a kill costs about that much.
SAVE_SECONDS = 30
TELL_SECONDS = 0.5


class Sweep:
    """The training of the probes that a run folder lacks. See train_missing."""

    def __init__(
        self,
        folder: Path,
        specs: Iterable[ProbeSpec],
        sets: TrainingSets,
        device: torch.device,
        seed: int,
        selection: tuple[str, str | None],
        ranks: Alone,
        progress: Progress,
        run: str,
    ):
        self.folder, self.store, self.sets, self.device, self.seed = folder, sets.store, sets, device, seed
        self.run = run
        self.specs = {spec.id: spec for spec in specs}
        self.ranks, self.progress = ranks, progress
        self.metric, role = selection
        # Splits and labels of validation; None where no split is chosen on, because then nothing validates.
        names = sets.splits[role] if role else ()
        self.selected_on = (names, load_labels(self.store, names).to(device)) if role else None
        self._saved_at = self._told_at = time.monotonic()
        self._untold = 0
        self._validation: dict[Input, list[Tensor] | None] = {}
        self._origins: dict[str, Origin] = {}

    def tick(self, steps: int) -> None:
        """Count steps of probes, and from time to time tell the other processes and the progress bar."""
        self._untold += steps
        if time.monotonic() - self._told_at > TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Tell the other processes and the progress bar about the steps since the last time."""
        done, self._untold, self._told_at = self.ranks.count(self._untold), 0, time.monotonic()
        self.progress.reach(done)

    def source(self, wave: Wave) -> Resident | Streamed:
        """Return the training features of a wave: in memory, or streamed through a buffer."""
        self.progress.phase("read")
        images = self.sets[wave.sample]
        if wave.buffer_rows is None:
            return Resident(wave.input, self.store, images.splits, self.device, images.rows)
        return Streamed(wave.input, self.store, images.splits, wave.buffer_rows, images.rows)

    def open(self, wave: Wave) -> list[Training]:
        """Return the Trainings of a wave's blocks, new or from their states."""
        trainings, images = [], self.sets[wave.sample]
        for block in wave.blocks:
            if isinstance(block, str):
                training = self._restored(block, images.labels)
                # Probes that the grid no longer has are not trained further.
                training.take_out(torch.tensor([spec.id not in self.specs for spec in training.specs]))
            else:
                specs = [self.specs[name] for name in block]
                training = Training(specs, self._width(specs[0]), len(self.store.classes), images.labels)
            if training.specs:
                training.columns = wave.input.columns(Input.of(training.specs[0]), self.store)
            trainings.append(training)
        self._origins |= dict.fromkeys((training.name for training in trainings), self._origin(wave.buffer_rows))
        return trainings

    def _width(self, spec: ProbeSpec) -> int:
        """Return the width of the features that a probe reads."""
        return Input.of(spec).shape(self.store)[0]

    def _restored(self, name: str, labels: Tensor) -> Training:
        path = self.folder / PARTIAL / name
        try:
            return Training.restored(path, self._width, len(self.store.classes), labels)
        except (OSError, LookupError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            # The file was checked a moment ago, so it has changed since.
            raise BadInput(f"cannot read state {path}: {error}; run the same train-probes again") from None

    def _origin(self, buffer_rows: int | None) -> Origin:
        return Origin(self.store.id, self.run, buffer_rows)

    def fit(self, specs: Sequence[ProbeSpec], source: Resident | Streamed, sample: Sample) -> None:
        """Train a block whose optimizer sees all images at once."""
        if isinstance(source, Streamed):
            raise TypeError("plan_buffers keeps the features in memory for an optimizer that sees all images at once")
        self.progress.phase("train")
        # Folds that the source leaves out already are not held out by the solver.
        held_out = {s.fold: self.sets.places_held_out(s.sample) for s in specs if s.fold and s.sample != sample}
        probes = fit_block(specs, source[0], self.sets[sample].labels, len(self.store.classes), held_out)
        self._keep(probes, self._origin(None))
        self.tick(sum(self.steps_of(spec) for spec in specs))

    def remember(self, specs: Sequence[ProbeSpec], wave: Wave) -> None:
        """Save a block of probes that train nothing: in place of weights, the rows of a sample that they learn from."""
        rows = self.sets[wave.sample].rows
        weights = {} if rows is None else {ROWS: torch.from_numpy(rows)}
        self._keep([TrainedProbe(spec, weights, [], None) for spec in specs], self._origin(wave.buffer_rows))
        self.tick(len(specs))

    def steps_of(self, spec: ProbeSpec) -> int:
        """Return the steps of a probe's training, as the progress bar counts them."""
        if not (spec.epochs and spec.batch_size):
            return 1
        return (spec.stop or spec.epochs) * -(-len(self.sets[spec.sample]) // spec.batch_size)

    def run_wave(
        self,
        trainings: Sequence[Training],
        source: Resident | Streamed,
        wave: Wave,
        until: Callable[[Training], int],
    ) -> None:
        """Train the blocks of a wave, all on the same pass over the data, each up to its epoch until(training)."""
        labels = self.sets[wave.sample].labels
        while active := [t for t in trainings if t.specs and t.epoch < until(t)]:
            epoch = min(t.epoch for t in active)
            behind = [t for t in active if t.epoch == epoch]
            for view in sorted({view_of_epoch(t.views, epoch) for t in behind}):
                same_view = [t for t in behind if view_of_epoch(t.views, epoch) == view]
                pieces = self.progress.waiting("read", source.pieces(view, self.seed, epoch), "train")
                train_epoch(same_view, pieces, labels, self.device, self.tick)
            for training in behind:
                self._after_epoch(training, wave.input, until)
            if time.monotonic() - self._saved_at > SAVE_SECONDS:
                self.save(t for t in behind if t.specs)

    def _after_epoch(self, training: Training, read: Input, until: Callable[[Training], int]) -> None:
        if training.validates or (until(training) < training.epochs and training.epoch == until(training)):
            training.validated(self._validation_scores(training, read))
        self._drop(training, training.impatient() & (training.epoch < training.epochs), "patience")
        if training.specs and training.epoch == training.end:
            self._keep(training.finish(), self._origins[training.name])
            state_path(self.folder, training.name).unlink(missing_ok=True)
            training.specs = []

    def _validation_scores(self, training: Training, read: Input) -> Tensor:
        """Return the selection metric of a block's probes on the selection split, float64 [P], higher is better."""
        if self.selected_on is None:
            raise RuntimeError("this block validates, but the grid has no split to choose on")
        self.progress.phase("validate")
        (names, labels), device = self.selected_on, self.device
        tally = new_tally(training.specs, labels, len(self.store.classes), [self.metric])
        if read not in self._validation:
            numbers = math.prod(read.shape(self.store)) * len(labels)
            fits = 4 * numbers < MemoryBudget.for_validation(device)
            self._validation = {read: list(read.chunks(self.store, names, device)) if fits else None}
        for chunk in self._validation[read] or read.chunks(self.store, names, device):
            tally.add(training.logits(chunk if training.columns is None else narrowed(chunk, training.columns)))
        return gain(self.metric, tally.scores()[self.metric])

    def _drop(self, training: Training, gone: Tensor, why: str) -> None:
        """Take probes out of a block before their last epoch, and save them."""
        self.tick((training.epochs - training.epoch) * training.steps * int(gone.sum()))
        self._keep(training.take_out(gone, why), self._origins[training.name])
        if not training.specs:
            state_path(self.folder, training.name).unlink(missing_ok=True)

    def _keep(self, probes: Sequence[TrainedProbe], origin: Origin) -> None:
        if probes:
            self.progress.phase("save")
            save_probes(self.folder, probes, origin)
        for probe in probes:
            if probe.diverged is not None:
                say(
                    f"warning: probe {probe.spec.id} ({probe.spec.optimizer.summary_of_rate}) diverged in epoch "
                    f"{probe.diverged_epoch}, at step {probe.diverged + 1}; its scores are empty"
                )
            elif probe.stopped == "iterations":
                shortfall = probe.spec.optimizer.shortfall(len(probe.losses) - 1, probe.optimality)
                # Folds and refits are not among the probes that a user asked for.
                which = f" ({probe.spec.sample.name})" if probe.spec.fold or probe.spec.refit else ""
                say(f"warning: probe {probe.spec.id}{which} {shortfall}")

    def save(self, trainings: Iterable[Training]) -> None:
        """Write the states of blocks."""
        self.progress.phase("save")
        for training in trainings:
            (self.folder / PARTIAL).mkdir(exist_ok=True)
            training.save(self.folder, self._origins[training.name])
        self._saved_at = time.monotonic()

    def cut(self, trainings: Sequence[Training], fraction: float, factor: float) -> None:
        """Keep the best 1/factor of all probes that reached a rung of the search; the others are done.

        All probes of the grid that ever reached it are compared, so that a cut which a kill interrupted has the same
        result when it is repeated.
        """
        places = find_probes(self.folder)
        done = load_probes(self.folder, self.specs.keys() & places.keys(), places)
        # Each probe of a search has epochs.
        scores = {probe.spec.id: (probe.spec.epochs or 1, probe.scores) for probe in done}
        for training in trainings:
            scores |= {spec.id: (training.epochs, training.scores(p)) for p, spec in enumerate(training.specs)}
        reached = {}
        for name, (epochs, values) in scores.items():
            rung = rung_epoch(epochs, fraction)
            if len(values) >= rung:
                reached[name] = values[rung - 1] if math.isfinite(values[rung - 1]) else -math.inf
        best = set(sorted(reached, key=lambda name: (-reached[name], name))[: math.ceil(len(reached) / factor)])
        for training in trainings:
            if training.specs and training.epoch == rung_epoch(training.epochs, fraction):
                gone = torch.tensor([spec.id not in best for spec in training.specs], dtype=torch.bool)
                self._drop(training, gone, "halving")
        self.save(t for t in trainings if t.specs)


def train_missing(
    folder: Path,
    specs: Sequence[ProbeSpec],
    sets: TrainingSets,
    device: torch.device,
    seed: int,
    selection: tuple[str, str | None],
    buffers: Buffers,
    search: Halving | None,
    ranks: Alone,
    run: str,
) -> None:
    """Train the probes that a run folder lacks and save them there.

    sets: the images to train on. selection: (metric, role) of validation, role None where no split is chosen on.
    buffers: how features are read, see
    plan_buffers. search: of the grid, or None. ranks: the processes that share the work; the leading one returns when
    everything is saved. run: identity of the run, which is written into the files. Raises BadInput.
    """
    if ranks.rank == 0:
        waves = plan_waves(folder, specs, sets.store, buffers, device)
        ranks.share([wave.to_json() for wave in waves])
    else:
        waves = [Wave.from_json(content) for content in ranks.shared()]
    with Progress("train", 0, unit="step") as progress:
        sweep = Sweep(folder, specs, sets, device, seed, selection, ranks, progress, run)
        progress.total = sum(map(sweep.steps_of, missing_specs(folder, specs)))
        if search:
            _search(sweep, waves, search)
        else:
            _train(sweep, ranks.draw(waves))
        sweep.tell()
        while ranks.rank == 0 and (left := ranks.left_behind(lambda: unsaved(folder, waves))):
            say(f"notice: no news of {len(left)} blocks that other processes took; doing them here")
            _train(sweep, left)
        # The others have finished meanwhile.
        sweep.tell()
    if ranks.rank == 0:
        with suppress(OSError):
            (folder / PARTIAL).rmdir()


def _train(sweep: Sweep, waves: Iterable[Wave]) -> None:
    source: Resident | Streamed | None = None
    key = None
    for wave in waves:
        if source is None or key != (wave.input, wave.sample, wave.buffer_rows):
            source, key = sweep.source(wave), (wave.input, wave.sample, wave.buffer_rows)
        first = wave.blocks[0]
        specs = [] if isinstance(first, str) else [sweep.specs[name] for name in first]
        if specs and not specs[0].optimizer.trains:
            sweep.remember(specs, wave)
            continue
        if specs and specs[0].optimizer.full_batch:
            sweep.fit(specs, source, wave.sample)
            continue
        trainings = sweep.open(wave)
        sweep.tick(sum(t.epoch * t.steps * len(t.specs) for t in trainings))
        sweep.run_wave(trainings, source, wave, lambda t: t.end)


def _search(sweep: Sweep, waves: Iterable[Wave], search: Halving) -> None:
    opened = [(wave, sweep.open(wave)) for wave in waves]
    everyone = [t for _, trainings in opened for t in trainings]
    sweep.tick(sum(t.epoch * t.steps * len(t.specs) for t in everyone))
    for fraction in [*rungs(search), 1.0]:

        def until(training: Training, fraction: float = fraction) -> int:
            return rung_epoch(training.epochs, fraction)

        for wave, trainings in opened:
            sweep.run_wave(trainings, sweep.source(wave), wave, until)
        if fraction < 1:
            sweep.cut(everyone, fraction, search.factor)
