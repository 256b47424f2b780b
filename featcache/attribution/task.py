"""An attribution that is ready to be computed: probes, methods, scores, and the targets in pieces."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

import featcache
from featcache.attribution.batch import Network, Source, open_network, width_of
from featcache.attribution.examples import Examples, only, parse_examples
from featcache.attribution.methods import DEFAULT_METHODS, METHODS
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Work
from featcache.attribution.pieces import in_pieces
from featcache.attribution.protocols import DEFAULT_PROTOCOL, PROTOCOLS
from featcache.attribution.scores import DEFAULT_SCORES, LOCALISATION_SCORES
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.attribution.settings import Settings
from featcache.attribution.targets import Target
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.errors import BadInput, shown
from featcache.feature import Feature, parse_beside
from featcache.kinds import Kind, Registry
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.probes.runs.run import Run, best, open_run, select, store_of
from featcache.probes.spec import ProbeSpec
from featcache.store.reader import Store
from featcache.words import parse_kind

# Bytes for forward passes by default. It does not depend on what is free: the sizes of batches can change the last bits
# of a map, and a killed attribution goes on with the same.
MEMORY = 2e9
# The note of a head with random weights, for a sanity check (Adebayo et al., NeurIPS 2018): a score that it reaches too
# is not the probe's merit.
RANDOM_HEAD = "random head"

K = TypeVar("K", bound=Kind)


@dataclass(frozen=True, eq=False)
class Explained:
    """A probe to explain: its id, its head as a module, and the map that its head reads.

    note: stands behind the method in tables where the head is not the probe's own, as for a sanity check.
    """

    probe: str
    head: HeadModule
    feature: Feature
    note: str = ""

    def named(self, method: Method) -> str:
        """Return what a method on this head is called in tables."""
        return f"{method.label} ({self.note})" if self.note else method.label


@dataclass(frozen=True, eq=False)
class Task:
    """An attribution: what is explained, how, and from what.

    pieces: the targets, by images. examples: whose maps the report shows, besides those that are pictured already.
    """

    run: Run
    explained: Sequence[Explained]
    methods: Sequence[Method]
    scores: Sequence[LocalisationScore]
    source: Source
    pieces: Sequence[Sequence[Target]]
    examples: Examples

    @property
    def columns(self) -> list[str]:
        """The columns of attribution.csv that hold numbers."""
        extra = (column for method in self.methods for column in method.columns)
        return [*(column for score in self.scores for column in score.columns), *dict.fromkeys(extra)]

    def identity(self, method: int, probe: int, target: Target) -> tuple[str, ...]:
        """Return what names a map in tables: probe, method, split, image and class, in the order of IDENTITY."""
        one, source = self.explained[probe], self.source
        name = one.named(self.methods[method])
        return (one.probe, name, source.name, source.id_of(target.row), source.split.store.classes[target.label])

    @property
    def work(self) -> Work:
        """How much there is to do."""
        source, images = self.source, {target.row for piece in self.pieces for target in piece}
        channels = tuple(source.channels(feature) for feature in source.features)
        pairs, size = sum(map(len, self.pieces)), source.preprocessing.size
        return Work(len(images), pairs, len(self.explained), size, channels)

    def sharing(self) -> list[list[Method]]:
        """Return the methods in groups that share their passes through the backbone, in order of their first."""
        groups: dict[object, list[Method]] = {}
        for method in self.methods:
            groups.setdefault(method.shared, []).append(method)
        return list(groups.values())

    def key(self) -> str:
        """Return a hash over all that the results depend on, by which a killed attribution knows its own pieces."""
        source, digest = self.source, hashlib.sha256(featcache.__version__.encode())
        settings = {
            "store": source.split.store.id,
            "images": source.name,
            "probes": [(one.probe, one.note) for one in self.explained],
            "methods": [method.model_dump() for method in self.methods],
            "scores": [score.model_dump() for score in self.scores],
            "targets": [[(source.id_of(target.row), target.label) for target in piece] for piece in self.pieces],
            "pictured": [target.pictured for piece in self.pieces for target in piece],
            "predicted": self.examples.by_prediction,
            "memory": source.memory,
            "device": source.device.type,
            "backbone": source.network and source.backbone.weights_sha256,
        }
        digest.update(json.dumps(settings).encode())
        for one in self.explained:
            for tensor in one.head.state_dict().values():
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def prepare(settings: Settings, device: torch.device) -> Task:
    """Find, load and check what an attribution needs. Raises BadInput."""
    memory = settings.memory
    if memory is not None and not (isinstance(memory, int | float) and memory >= 1):
        raise BadInput(f"memory: expected a number of bytes, 1 or more, not {shown(memory)}")
    if settings.images is not None and settings.limit is not None:
        raise BadInput("--images names the images, and --limit takes the first; give one of them")
    run = open_run(settings.run)
    methods = _parsed(METHODS, settings.methods, DEFAULT_METHODS, "--method")
    scores = _parsed(LOCALISATION_SCORES, settings.scores, DEFAULT_SCORES, "--score")
    if len({score.type for score in scores}) < len(scores):
        raise BadInput("--score: the same score stands there twice with different fields; run attribute for each")
    store = store_of(run, settings.store)
    chosen = _chosen(run, settings.probes, settings.rule)
    explained = _load(run, store, chosen, device, settings.seed if settings.sanity else None)
    preprocessing = Preprocessing(**store.manifest.identity["preprocessing"])
    data = store[settings.split or _scored_split(run)]
    protocol = parse_kind(PROTOCOLS, settings.protocol or DEFAULT_PROTOCOL, "--protocol")
    network = None
    if settings.backbone is not None:
        network = open_network(
            data, preprocessing, device, settings.backbone, settings.arch, settings.weights_key, settings.dataset,
            settings.root, settings.seed,
        )  # fmt: skip
    for method in methods:
        _check_fit(method, network)
    features = tuple(dict.fromkeys(one.feature for one in explained))
    images = Source(data, preprocessing, device, network, features, MEMORY if memory is None else memory)
    source, targets = protocol.pose(images, settings.limit)
    examples = parse_examples(settings.examples)
    if settings.images is not None:
        targets = only(settings.images, source, targets)
        examples = examples._replace(first=len(targets))
    kept = sorted({target.row for target in targets})[: examples.first]
    targets = [replace(target, pictured=target.row in kept) for target in targets]
    return Task(run, explained, methods, scores, source, list(in_pieces(targets)), examples)


def _parsed(kinds: Registry[K], words: Sequence[str] | None, default: Sequence[str], option: str) -> list[K]:
    """Return the kinds that words name, each once."""
    return list(dict.fromkeys(parse_kind(kinds, word, option) for word in (default if words is None else words)))


def _check_fit(method: Method, network: Network | None) -> None:
    """Raise BadInput if a method lacks the backbone that it runs, or cannot explain it."""
    if method.runs_backbone and network is None:
        raise BadInput(f"--method {method.type} runs the backbone: give --backbone, --dataset and --root")
    if network is not None and (reason := method.misfit(network.backbone)):
        fit = [name for name, kind in METHODS.items() if not kind.model_validate({}).misfit(network.backbone)]
        raise BadInput(
            f"--method {method.type}: {network.backbone.arch} {reason}; methods that can explain it: {', '.join(fit)}"
        )


def _chosen(run: Run, probes: Sequence[str] | None, rule: str | None) -> list[str]:
    """Return the ids of the probes to explain, each once."""
    return list(dict.fromkeys(probes or (select(run, rule) if rule else best(run, "loss"))))


def _load(run: Run, store: Store, probes: Sequence[str], device: torch.device, random: int | None) -> list[Explained]:
    """Load probes onto a device. Raises BadInput if one is damaged, or has no map to point into.

    random: a seed to draw a head like each probe's from, which stands beside it, or None for no such heads.
    """
    files, explained = find_probes(run.path), []
    for probe in (probe for name in probes for probe in load_probes(run.path, [name], files)):
        spec, feature = probe.spec, _map_of(probe.spec, store)
        weights = {"": probe.weights}
        if random is not None:
            channels = width_of(store, feature)
            generator = torch.Generator().manual_seed(random % 2**63)
            weights[RANDOM_HEAD] = spec.head.initial_weights(channels, len(store.classes), generator)
        for note, own in weights.items():
            explained.append(Explained(spec.id, HeadModule(spec.head, own, spec.loss.link).to(device), feature, note))
    return explained


def _map_of(spec: ProbeSpec, store: Store) -> Feature:
    """Return the map that a probe's feature is the mean of. Raises BadInput if the probe reads anything else."""
    first, *others = parse_beside(spec.features, store.manifest.aliases)
    if others:
        raise BadInput(
            f"probe {spec.id} saw {spec.features} side by side: there is no one map to point into; attribute probes that "
            "read one feature"
        )
    feature = store.manifest.feature(first)
    if feature.kind not in ("pooled", "patch_mean", "spatial"):
        raise BadInput(f"probe {spec.id} saw {feature}, which is no mean of a map: there is nothing to point at")
    return Feature(feature.layer, "spatial")


def _scored_split(run: Run) -> str:
    """Return the split of the store that a run is scored on. Raises BadInput if it is a union of splits."""
    names = run.summary["splits"][run.scored_on]
    if len(names) > 1:
        raise BadInput(f"run {run.path} is scored on {' and '.join(names)}: name one with --split")
    return names[0]
