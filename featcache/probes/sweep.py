"""Which blocks of a grid train when: waves over the data, states on disk, the rungs of a search.

What a run folder lacks is trained; a run that was killed goes on from the last states that it wrote,
and ends with the same bits.
"""

import math
import time
from contextlib import suppress
from pathlib import Path

import click
import safetensors
import torch
from tqdm import tqdm

from featcache.device import free_bytes, sent
from featcache.errors import BadInput, shown
from featcache.probes.features import (
    MiniBatches,
    Resident,
    Streamed,
    feature_bytes,
    input_name,
    input_of,
    input_shape,
    load_labels,
    read_chunks,
    view_of_epoch,
)
from featcache.probes.predict import new_tally
from featcache.probes.probe_file import Origin, find_probes, load_probes, save_probes
from featcache.probes.run_file import PARTIAL
from featcache.probes.scores.metrics import gain
from featcache.probes.sealed_tensors import read_content
from featcache.probes.spec import spec_from_dict
from featcache.probes.stack import held_bytes
from featcache.probes.training import Training, fit_block, state_path
from featcache.probes.work import work

# States are written after an epoch, but not more often than this: a kill costs about as much.
SAVE_SECONDS = 30
TELL_SECONDS = 0.5


class Sweep:
    """The training of what a run folder lacks. See train_missing."""

    def __init__(self, folder, specs, store, splits, device, seed, judge, ranks, progress, run):
        self.folder, self.store, self.splits, self.device, self.seed = Path(folder), store, splits, device, seed
        self.run = run
        self.specs = {spec.id: spec for spec in specs}
        self.judge, self.ranks, self.progress = judge, ranks, progress
        self.labels = load_labels(store, splits["train"]).to(device)
        # Where nothing is chosen, nothing asks for validation.
        self.judged = load_labels(store, splits[judge[1]]).to(device) if judge[1] else None
        self._saved_at = self._told_at = time.monotonic()
        self._untold = 0
        self._validation, self._origins = {}, {}

    def tick(self, steps):
        """Count steps of probes, and now and then tell the others and the progress bar."""
        self._untold += steps
        if time.monotonic() - self._told_at > TELL_SECONDS:
            self.tell()

    def tell(self):
        """Tell what is not yet told."""
        done, self._untold, self._told_at = self.ranks.count(self._untold), 0, time.monotonic()
        self.progress.update(done - self.progress.n)

    def source(self, feature, pool, buffer_rows):
        """The training features: in memory, or streamed through a buffer of that many rows."""
        names = self.splits["train"]
        if buffer_rows is None:
            return Resident(self.store, names, feature, pool, self.device)
        return Streamed(self.store, names, feature, pool, buffer_rows)

    def open(self, blocks, feature, pool, buffer_rows):
        """The Trainings of a wave's blocks, new or from their states."""
        shape, found = (input_shape(self.store, feature, pool)[0], len(self.store.classes), self.labels), []
        for block in blocks:
            if isinstance(block, str):
                found.append(self._restored(block, shape))
                # What the grid no longer has is not trained on.
                found[-1].take_out(torch.tensor([spec.id not in self.specs for spec in found[-1].specs]))
            else:
                found.append(Training([self.specs[name] for name in block], *shape))
        self._origins |= dict.fromkeys((training.name for training in found), self._origin(buffer_rows))
        return found

    def _restored(self, name, shape):
        path = self.folder / PARTIAL / name
        try:
            return Training.restored(path, *shape)
        except (OSError, LookupError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            # It was whole a moment ago.
            raise BadInput(f"cannot read state {path}: {error}; run the same train-probes again") from None

    def _origin(self, buffer_rows):
        return Origin(self.store.id, self.run, buffer_rows)

    def fit(self, specs, source):
        """Train a block whose optimiser sees all images at once."""
        self._keep(fit_block(specs, source[0], self.labels, len(self.store.classes)), self._origin(None))
        self.tick(sum(s.epochs * -(-len(self.labels) // s.batch_size) for s in specs))

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
                    features = sent(values, self.device).float()
                    targets = self.labels[sent(rows, self.device)]
                    for training in members:
                        training.feed(features, targets)
                        self.tick(len(training.specs))
        for training in trainings:
            training.end_epoch()

    def _after_epoch(self, training, feature, pool, until):
        if training.validates or (until(training) < training.epochs and training.epoch == until(training)):
            training.validated(self._validation_scores(training, feature, pool))
        self._drop(training, training.impatient() & (training.epoch < training.epochs), "patience")
        if training.specs and training.epoch == training.epochs:
            self._keep(training.finish(), self._origins[training.name])
            state_path(self.folder, training.name).unlink(missing_ok=True)
            training.specs = []

    def _validation_scores(self, training, feature, pool):
        """The selection metric of a block's probes on the selection split, float64 [P], higher is better."""
        metric, role = self.judge
        names, device = self.splits[role], self.device
        tally = new_tally(training.specs, self.judged, len(self.store.classes), [metric])
        if (feature, pool) not in self._validation:
            numbers = math.prod(input_shape(self.store, feature, pool)) * len(self.judged)
            fits = 4 * numbers < free_bytes(device) // 4
            held = list(read_chunks(self.store, names, feature, pool, device)) if fits else None
            self._validation = {(feature, pool): held}
        for chunk in self._validation[feature, pool] or read_chunks(self.store, names, feature, pool, device):
            tally.add(training.logits(chunk))
        return gain(metric, tally.scores()[metric])

    def _drop(self, training, gone, why):
        """Take probes out of a block before their time."""
        self.tick((training.epochs - training.epoch) * training.steps * int(gone.sum()))
        self._keep(training.take_out(gone, why), self._origins[training.name])
        if not training.specs:
            state_path(self.folder, training.name).unlink(missing_ok=True)

    def _keep(self, probes, origin):
        if probes:
            save_probes(self.folder, probes, origin)
        for probe in probes:
            if probe.diverged is not None:
                click.echo(
                    f"warning: probe {probe.spec.id} ({_rate_of(probe.spec)}) diverged in epoch "
                    f"{probe.diverged_epoch}, at step {probe.diverged + 1}; its scores are empty",
                    err=True,
                )
            elif probe.stopped == "iterations":
                click.echo(
                    f"warning: probe {probe.spec.id} had not converged after {len(probe.losses) - 1} Newton steps (lbfgs); "
                    "give it more optimizer.iterations, or more weight_decay",
                    err=True,
                )

    def save(self, trainings):
        """Write the states of blocks."""
        for training in trainings:
            (self.folder / PARTIAL).mkdir(exist_ok=True)
            training.save(self.folder, self._origins[training.name])
        self._saved_at = time.monotonic()

    def cut(self, trainings, fraction, factor):
        """Keep the best 1/factor of all probes that reached a rung of the search; the others are done.

        All of the grid that ever reached it are compared, so that a cut which a kill interrupted ends as it began.
        """
        there = find_probes(self.folder)
        done = load_probes(self.folder, self.specs.keys() & there.keys(), there)
        scores = {probe.spec.id: (probe.spec.epochs, probe.scores) for probe in done}
        for training in trainings:
            scores |= {spec.id: (spec.epochs, training.scores(p)) for p, spec in enumerate(training.specs)}
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


def rung_epoch(epochs, fraction):
    """The epoch at which probes of that many epochs are compared."""
    # A tenth times three is a little more than three tenths.
    return max(math.ceil(epochs * fraction - 1e-9), 1)


def rungs(search):
    """The fractions of training at which a search compares: first, first * factor, ... below 1."""
    fractions, fraction = [], search.first if search else 1.0
    while fraction < 1 - 1e-9:
        fractions.append(fraction)
        fraction *= search.factor
    return fractions


def train_missing(folder, specs, store, splits, device, seed, judge, buffers, search, ranks, run):
    """Train the probes that a run folder lacks and save them there.

    judge: (metric, role) that validation looks at, role None where nothing is chosen. buffers: how features are
    read, see plan_buffers. search: of the grid, or None. ranks: the processes that share the work; the leading
    one returns when all is there. run: identity of the run, which the files are marked with. Raises BadInput.
    """
    todo = ranks.share(_plan(folder, specs, store, buffers, device)) if ranks.rank == 0 else ranks.shared()
    with tqdm(total=0, unit="step", desc="train", unit_scale=True, disable=ranks.rank != 0) as progress:
        sweep = Sweep(folder, specs, store, splits, device, seed, judge, ranks, progress, run)
        missing = _missing(folder, specs)
        progress.total = sum(s.epochs * -(-len(sweep.labels) // s.batch_size) for s in missing)
        if search:
            _search(sweep, todo, search)
        else:
            _train(sweep, ranks.draw(todo))
        sweep.tell()
        while ranks.rank == 0 and (left := ranks.left_behind(lambda: _unsaved(folder, todo))):
            click.echo(f"notice: no news of {len(left)} blocks that other processes took; doing them here", err=True)
            _train(sweep, left)
    if ranks.rank == 0:
        with suppress(OSError):
            (Path(folder) / PARTIAL).rmdir()


def _train(sweep, waves):
    source, shown = None, None
    for blocks, *read in waves:
        feature, pool, _ = read
        if shown != read:
            source, shown = sweep.source(*read), read
        specs = [] if isinstance(blocks[0], str) else [sweep.specs[name] for name in blocks[0]]
        if specs and specs[0].optimizer.type == "lbfgs":
            sweep.fit(specs, source)
            continue
        trainings = sweep.open(blocks, *read)
        sweep.tick(sum(t.epoch * t.steps * len(t.specs) for t in trainings))
        sweep.run_wave(trainings, source, feature, pool, lambda t: t.epochs)


def _search(sweep, waves, search):
    waves = [(sweep.open(blocks, *read), *read) for blocks, *read in waves]
    everyone = [t for trainings, *_ in waves for t in trainings]
    sweep.tick(sum(t.epoch * t.steps * len(t.specs) for t in everyone))
    for fraction in [*rungs(search), 1.0]:
        for trainings, feature, pool, buffer_rows in waves:
            source = sweep.source(feature, pool, buffer_rows)
            sweep.run_wave(trainings, source, feature, pool, lambda t, f=fraction: rung_epoch(t.epochs, f))
        if fraction < 1:
            sweep.cut(everyone, fraction, search.factor)


def _plan(folder, specs, store, buffers, device):
    """What is to train: [(blocks, feature, pool, buffer rows)].

    A block is the ids of its probes, or the name of the file that holds its state.
    """
    missing = _missing(folder, specs)
    if len(missing) < len(specs):
        click.echo(f"run: {len(specs) - len(missing)} of {len(specs)} probes are trained already", err=True)
    begun = _begun(folder, {s.id for s in missing})
    resumed = {spec.id for _, found in begun for spec in found}
    inputs = [input_of(found[0]) for _, found in begun]
    todo = [([path.name], *read, buffers[input_name(*read)]) for (path, _), read in zip(begun, inputs, strict=True)]
    for group, feature, pool in work([s for s in missing if s.id not in resumed], store, device):
        for wave in _waves(group, store, feature, pool, buffers, device):
            blocks = [[spec.id for spec in block] for block in wave]
            todo.append((blocks, feature, pool, buffers[input_name(feature, pool)]))
    return todo


def _missing(folder, specs):
    """The specs of which a run folder holds no probe."""
    there = find_probes(folder)
    return [spec for spec in specs if spec.id not in there]


def _unsaved(folder, waves):
    """The waves whose probes are not all saved; of a block that was resumed, its state is there until they are."""
    there = find_probes(folder)

    def unsaved(block):
        if isinstance(block, str):
            return (Path(folder) / PARTIAL / block).is_file()
        return not there.keys() >= set(block)

    return [wave for wave in waves if any(map(unsaved, wave[0]))]


def plan_buffers(specs, store, splits, memory, device, processes=1):
    """How each input of the grid is read: {input: rows of its shuffle buffer, or None if it fits into memory}.

    memory: bytes for features, by default half of what is free on the device. processes: that share this machine.
    """
    names, buffers = splits["train"], {}
    if memory is not None and not (isinstance(memory, int | float) and 1 <= memory < math.inf):
        raise BadInput(f"memory: expected a number of bytes, 1 or more, not {shown(memory)}")
    host = free_bytes(torch.device("cpu")) // 2 // processes
    memory = memory or (host if device.type == "cpu" else free_bytes(device) // 2)
    rows = sum(len(store[name]) for name in names)
    for spec in specs:
        feature, pool = input_of(spec)
        size = feature_bytes(store, names, feature, pool)
        if size > memory and spec.optimizer.type == "lbfgs":
            raise BadInput(
                f"lbfgs needs all of {feature} in memory, {size / 1e9:.3g} GB, and "
                f"{memory / 1e9:.3g} GB are for it; take another optimizer, or give more --memory"
            )
        # One buffer is trained on while the next is read, in a third of the memory each; they lie on the host.
        third = min(memory, host) / 3
        buffers[input_name(feature, pool)] = None if size <= memory else max(int(rows * third / size), 1)
    return buffers


def _waves(group, store, feature, pool, buffers, device):
    """Divide the blocks of one input into those that train on the same pass over the data.

    Pooled features in memory: one block at a time, which then stays in the cache. Else a pass is
    dear, and as many blocks share it as have room for their states.
    """
    dim, positions = input_shape(store, feature, pool)
    if buffers[input_name(feature, pool)] is None and positions == 1:
        return [[block] for block in group]
    room, waves, used = free_bytes(device) // 4, [[]], 0
    for block in group:
        if block[0].optimizer.type == "lbfgs":
            waves.insert(0, [block])
            continue
        size = len(block) * held_bytes(block[0].head, dim, positions, len(store.classes))
        if waves[-1] and used + size > room:
            waves, used = [*waves, []], 0
        waves[-1].append(block)
        used += size
    return [wave for wave in waves if wave]


def _begun(folder, missing):
    """Return [(path, specs)] of the states that a killed run left; those of no use are removed."""
    found = []
    for path in sorted((Path(folder) / PARTIAL).glob("*.safetensors")):
        specs = [spec_from_dict(spec) for spec in read_content(path)["specs"]]
        if {s.id for s in specs} & missing:
            # Of some there may be finished probes: killed while those of this block were being saved.
            found.append((path, specs))
        else:
            path.unlink()
    return found


def _rate_of(spec):
    return spec.optimizer.type if spec.optimizer.lr is None else f"lr {spec.optimizer.lr:g}"
