"""Which blocks of a grid train when: waves over the data, states on disk, the rungs of a search.

What a run folder lacks is trained; a run that was killed goes on from the last states that it wrote,
and ends with the same bits.
"""

import itertools
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import click
import safetensors
import torch
from tqdm import tqdm

from featcache.atomic import write_whole
from featcache.errors import BadInput
from featcache.probes.features import (
    MiniBatches,
    Resident,
    Streamed,
    feature_bytes,
    free_bytes,
    load_features,
    load_labels,
    view_of_epoch,
)
from featcache.probes.metrics import METRICS
from featcache.probes.probe_file import load_probe, probe_path, save_probe
from featcache.probes.scoring import work
from featcache.probes.spec import spec_from_dict
from featcache.probes.training import Training

PARTIAL = "partial"
# States are written after an epoch, but not more often than this: a kill costs about as much.
SAVE_SECONDS = 30
TELL_SECONDS = 0.5


class Sweep:
    """The training of what a run folder lacks. See train_missing."""

    def __init__(self, folder, store, splits, device, seed, judge, ranks, progress):
        self.folder, self.store, self.splits, self.device, self.seed = Path(folder), store, splits, device, seed
        self.judge, self.ranks, self.progress = judge, ranks, progress
        self.labels = load_labels(store, splits["train"]).to(device)
        self._saved_at = self._told_at = time.monotonic()
        self._untold = 0
        self._validation = {}

    def tick(self, steps):
        """Count steps of probes, and now and then tell the others and the progress bar."""
        self._untold += steps
        if time.monotonic() - self._told_at > TELL_SECONDS:
            done, self._untold, self._told_at = self.ranks.count(self._untold), 0, time.monotonic()
            self.progress.update(done - self.progress.n)

    def source(self, feature, pool, buffer_rows):
        """The training features: in memory, or streamed through a buffer of that many rows."""
        names = self.splits["train"]
        if buffer_rows is None:
            return Resident(self.store, names, feature, pool, self.device)
        return Streamed(self.store, names, feature, pool, buffer_rows)

    def run_wave(self, trainings, source, feature, pool, until):
        """Train blocks of one input, all on the same pass over the data, each up to its epoch until(training)."""
        while active := [t for t in trainings if t.specs and t.epoch < until(t)]:
            epoch = min(t.epoch for t in active)
            now = [t for t in active if t.epoch == epoch]
            for view in sorted({view_of_epoch(t.views, epoch) for t in now}):
                self._epoch([t for t in now if view_of_epoch(t.views, epoch) == view], source, view, epoch)
            for training in now:
                self._after_epoch(training, feature, pool, until)
            if time.monotonic() - self._saved_at > SAVE_SECONDS:
                self.save(t for t in now if t.specs)

    def _epoch(self, trainings, source, view, epoch):
        by_size = {}
        for training in trainings:
            training.begin_epoch()
            by_size.setdefault(training.batch_size, (MiniBatches(training.batch_size), []))[1].append(training)
        for piece in source.pieces(view, self.seed, epoch):
            for batches, members in by_size.values():
                for values, rows in batches.cut(piece):
                    features = values.to(self.device).float()
                    targets = self.labels[rows.to(self.device)]
                    for training in members:
                        training.feed(features, targets)
                        self.tick(len(training.specs))
        for training in trainings:
            training.end_epoch()

    def _after_epoch(self, training, feature, pool, until):
        if training.validates or (until(training) < training.epochs and training.epoch == until(training)):
            metric, names = self.judge
            labels = load_labels(self.store, self.splits[names])
            training.validated(METRICS[metric](training.logits(self._judged(feature, pool)), labels).double())
        self._drop(training, training.impatient() & (training.epoch < training.epochs), "patience")
        if training.specs and training.epoch == training.epochs:
            self._keep(training.finish())
            self.state_path(training).unlink(missing_ok=True)
            training.specs = []

    def _judged(self, feature, pool):
        """Chunks of the features of the split that the grid selects on; held if they fit."""
        key, names = (feature, pool), self.splits[self.judge[1]]
        if key not in self._validation:
            fits = feature_bytes(self.store, names, feature, pool) < free_bytes(torch.device("cpu")) // 4
            self._validation[key] = load_features(self.store, names, feature, pool, self.device) if fits else None
        held = self._validation[key]
        if held is not None:
            return (part.float() for part in held.split(4096))
        return self._streamed_judged(feature, pool, names)

    def _streamed_judged(self, feature, pool, names):
        for name in names:
            for _, rows in self.store[name][feature].pieces():
                rows = torch.from_numpy(rows).to(self.device).float()
                rows = rows.flatten(2) if rows.ndim == 4 else rows
                yield rows.mean(2) if pool and rows.ndim == 3 else rows

    def _drop(self, training, gone, why):
        """Take probes out of a block before their time."""
        self.tick((training.epochs - training.epoch) * training.steps * int(gone.sum()))
        self._keep(training.take_out(gone, why))
        if not training.specs:
            self.state_path(training).unlink(missing_ok=True)

    def _keep(self, probes):
        for probe in probes:
            save_probe(self.folder, probe, self.store.id)
            if probe.diverged is not None:
                click.echo(
                    f"warning: probe {probe.spec.id} (lr {probe.spec.optimizer.lr:g}) diverged in epoch "
                    f"{_epoch_of(probe)}, at step {probe.diverged + 1}; its scores are empty",
                    err=True,
                )

    def state_path(self, training):
        """Where the state of a block lies: a name from the probes that it began with."""
        return self.folder / PARTIAL / f"{training.name}.safetensors"

    def save(self, trainings):
        """Write the states of blocks."""
        for training in trainings:
            path = self.state_path(training)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, training.state())
        self._saved_at = time.monotonic()

    def cut(self, trainings, fraction, factor):
        """Keep the best 1/factor of all probes that reached a rung of the search; the others are done.

        All that ever reached it are compared, so that a cut which a kill interrupted ends as it began.
        """
        scores = {}
        for path in (self.folder / "probes").glob("*.safetensors"):
            probe = load_probe(self.folder, path.stem)
            scores[probe.spec.id] = (probe.spec.epochs, probe.scores)
        for training in trainings:
            scores |= {spec.id: (spec.epochs, training.scores(p)) for p, spec in enumerate(training.specs)}
        reached = {}
        for name, (epochs, values) in scores.items():
            rung = rung_epoch(epochs, fraction)
            if len(values) >= rung:
                reached[name] = values[rung - 1] if math.isfinite(values[rung - 1]) else -math.inf
        best = sorted(reached, key=lambda name: (-reached[name], name))[: -(-len(reached) // factor)]
        for training in trainings:
            if training.specs and training.epoch == rung_epoch(training.epochs, fraction):
                gone = torch.tensor([spec.id not in best for spec in training.specs], dtype=torch.bool)
                self._drop(training, gone, "halving")
        self.save(t for t in trainings if t.specs)


def rung_epoch(epochs, fraction):
    """The epoch at which probes of that many epochs are compared."""
    return max(math.ceil(epochs * fraction), 1)


def rungs(search):
    """The fractions of training at which a search compares: first, first * factor, ... below 1."""
    fractions, fraction = [], search.first if search else 1.0
    while fraction < 1:
        fractions.append(fraction)
        fraction *= search.factor
    return fractions


def train_missing(folder, specs, store, splits, device, seed, judge, buffers, search=None, ranks=None):
    """Train the probes that a run folder lacks and save them there.

    judge: (metric, role) that validation looks at. buffers: how features are read, see plan_buffers.
    search: of the grid, or None. ranks: the processes that share the work; the leading one returns when
    all is there. Raises BadInput.
    """
    by_id = {spec.id: spec for spec in specs}
    todo = ranks.share(_plan(folder, specs, store, buffers)) if ranks.rank == 0 else ranks.shared()
    rows = sum(len(store[name]) for name in splits["train"])
    with tqdm(total=0, unit="step", desc="train", unit_scale=True, disable=ranks.rank != 0) as progress:
        sweep = Sweep(folder, store, splits, device, seed, judge, ranks, progress)

        def opened(blocks, feature):
            dim, classes = store.manifest.features[feature]["shape"][0], len(store.classes)
            path = Path(folder) / PARTIAL
            return [
                Training.restored(path / block, dim, classes, rows, device)
                if isinstance(block, str)
                else Training([by_id[name] for name in block], dim, classes, rows, device)
                for block in blocks
            ]

        if search:
            if ranks.size > 1:
                raise BadInput("search: halving compares all probes: start it in one process, without torchrun")
            _search(sweep, [(opened(blocks, feature), feature, *rest) for blocks, feature, *rest in todo], search)
        else:
            missing = [s for s in specs if not probe_path(folder, s.id).is_file()]
            progress.total = sum(s.epochs * -(-rows // s.batch_size) for s in missing)
            _train(sweep, opened, ranks.draw(todo))
        while ranks.rank == 0 and (left := ranks.left_behind(lambda: [w for w in todo if _unsaved(folder, w, by_id)])):
            click.echo(f"notice: no news of {len(left)} blocks that other processes took; doing them here", err=True)
            _train(sweep, opened, left)
    if ranks.rank == 0:
        with suppress(OSError):
            (Path(folder) / PARTIAL).rmdir()


def _train(sweep, opened, waves):
    source, shown = None, None
    for blocks, *read in waves:
        feature, pool, _ = read
        if shown != read:
            source, shown = sweep.source(*read), read
        trainings = opened(blocks, feature)
        sweep.tick(sum(t.epoch * t.steps * len(t.specs) for t in trainings))
        sweep.run_wave(trainings, source, feature, pool, lambda t: t.epochs)


def _search(sweep, waves, search):
    everyone = [t for trainings, *_ in waves for t in trainings]
    sweep.progress.total = sum(t.epochs * t.steps * len(t.specs) for t in everyone)
    sweep.tick(sum(t.epoch * t.steps * len(t.specs) for t in everyone))
    for fraction in [*rungs(search), 1.0]:
        for trainings, feature, pool, buffer_rows in waves:
            source = sweep.source(feature, pool, buffer_rows)
            sweep.run_wave(trainings, source, feature, pool, lambda t, f=fraction: rung_epoch(t.epochs, f))
        if fraction < 1:
            sweep.cut(everyone, fraction, search.factor)


def _plan(folder, specs, store, buffers):
    """What is to train: [(blocks, feature, pool, buffer rows)].

    A block is the ids of its probes, or the name of the file that holds its state.
    """
    missing = [s for s in specs if not probe_path(folder, s.id).is_file()]
    if len(missing) < len(specs):
        click.echo(f"run: {len(specs) - len(missing)} of {len(specs)} probes are trained already", err=True)
    begun = _begun(folder, {s.id for s in missing})
    resumed = {spec.id for _, found in begun for spec in found}
    inputs = [(found[0].features, found[0].head.pools_first) for _, found in begun]
    todo = [([path.name], *read, buffers[_input(*read)]) for (path, _), read in zip(begun, inputs, strict=True)]
    for group, feature, pool in work([s for s in missing if s.id not in resumed], store):
        for wave in _waves(group, store, feature, pool, buffers):
            blocks = [[spec.id for spec in block] for block in wave]
            todo.append((blocks, feature, pool, buffers[_input(feature, pool)]))
    return todo


def _unsaved(folder, wave, by_id):
    names = [name for block in wave[0] if not isinstance(block, str) for name in block]
    states = [block for block in wave[0] if isinstance(block, str)]
    return any(not probe_path(folder, name).is_file() for name in names) or any(
        (Path(folder) / PARTIAL / state).is_file() for state in states
    )


def plan_buffers(specs, store, splits, memory, device):
    """How each input of the grid is read: {input: rows of its shuffle buffer, or None if it fits into memory}.

    memory: bytes for features, by default half of what is free on the device.
    """
    names, buffers = splits["train"], {}
    memory = memory or free_bytes(device) // 2
    for spec in specs:
        pool = spec.head.pools_first
        size = feature_bytes(store, names, spec.features, pool)
        rows = sum(len(store[name]) for name in names)
        # One buffer is trained on while the next is read, in a third of the memory each.
        buffers[_input(spec.features, pool)] = None if size <= memory else max(int(rows * memory / size / 3), 1)
    return buffers


def _input(feature, pool):
    return f"{feature}, pooled first" if pool else feature


def _waves(group, store, feature, pool, buffers):
    """Divide the blocks of one input into those that train on the same pass over the data.

    Pooled features in memory: one block at a time, which then stays in the cache. Else a pass is
    dear, and as many blocks share it as have room for their states.
    """
    shape = store.manifest.features[feature]["shape"]
    if buffers[_input(feature, pool)] is None and (pool or len(shape) == 1):
        return [[block] for block in group]
    room, waves, used = free_bytes(torch.device("cpu")) // 4, [[]], 0
    for block in group:
        widths = [shape[0], *[block[0].head.hidden] * (block[0].head.layers - 1), len(store.classes)]
        weights = sum(a * b * block[0].head.max_out for a, b in itertools.pairwise(widths))
        # Weights, two moments at most, and gradients: float32.
        size = 16 * weights * len(block)
        if waves[-1] and used + size > room:
            waves, used = [*waves, []], 0
        waves[-1].append(block)
        used += size
    return waves


def _begun(folder, missing):
    """Return [(path, specs)] of the states that a killed run left; those of no use are removed."""
    found = []
    for path in sorted((Path(folder) / PARTIAL).glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, "pt") as file:
                specs = [spec_from_dict(s) for s in json.loads(file.metadata()["featcache"])["specs"]]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"damaged state {path}: {error}; delete it and run the same train-probes again") from None
        if {s.id for s in specs} <= missing:
            found.append((path, specs))
        elif not {s.id for s in specs} & missing:
            path.unlink()
        else:
            # Killed while the finished probes of this block were being saved: the rest follows from the state.
            found.append((path, specs))
    return found


def _epoch_of(probe):
    """The epoch, from 1, in which a probe diverged."""
    return next((n for n, loss in enumerate(probe.losses, 1) if not math.isfinite(loss)), len(probe.losses))
