"""An attribution that is ready to be computed: probes, methods, scores, and the targets in pieces."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch

import featcache
from featcache.arguments import listed
from featcache.attribution.batch import Network, Source, open_network, open_random_network, open_records
from featcache.attribution.examples import Examples, only, parse_examples
from featcache.attribution.explained import Explained
from featcache.attribution.fit import check_methods, check_scores
from featcache.attribution.mask_stores import find_masked, through_backbone
from featcache.attribution.methods import DEFAULT_METHODS, METHODS
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Work
from featcache.attribution.pieces import in_pieces
from featcache.attribution.profiles import profile_named
from featcache.attribution.profiles.profile import Profile
from featcache.attribution.protocols import PROTOCOLS, default_protocol
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.reading import Reading
from featcache.attribution.scores import SCORES
from featcache.attribution.scores.score import Score
from featcache.attribution.settings import Settings
from featcache.attribution.targets import Target
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.datasets import Record
from featcache.errors import BadInput, shown
from featcache.kinds import Kind, Registry
from featcache.probes.heads.module import HeadModule
from featcache.probes.inputs.input import Input
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.probes.runs.run import Run, best, open_run, select, store_of
from featcache.ranks import say_once
from featcache.store.reader import Split, Store
from featcache.words import parse_kind

# Bytes for forward passes by default. It does not depend on what is free: the sizes of batches can change the last bits
# of a map, and a killed attribution goes on with the same.
MEMORY = 2e9
# The notes of a head with random weights, and of the probe's own head on a backbone with random weights, for sanity
# checks (Adebayo et al., NeurIPS 2018): a score that they reach too is not the probe's merit.
RANDOM_HEAD, RANDOM_BACKBONE = "random head", "random backbone"
# The column of attribution.csv that says how many pixels of the input the objects of a class have.
REGION = "region_pixels"

K = TypeVar("K", bound=Kind)


@dataclass(frozen=True, eq=False)
class Task:
    """An attribution: what is explained, how, and from what.

    protocol: the one that chose the targets. settings: what was asked for. source: of the images as the store has them;
    randomised: the same for a backbone with random weights, None without a sanity check or the images. pieces: the
    targets, by images. examples: whose maps are kept for pictures, besides those of the targets that say so.
    """

    run: Run
    explained: Sequence[Explained]
    methods: Sequence[Method]
    scores: Sequence[Score]
    protocol: Protocol
    source: Source
    randomised: Source | None
    pieces: Sequence[Sequence[Target]]
    examples: Examples
    settings: Settings

    @property
    def profile(self) -> Profile:
        """How methods, protocols and scores are used."""
        return profile_named(self.settings.parity)

    @property
    def columns(self) -> list[str]:
        """The columns of attribution.csv that hold numbers."""
        extra = (column for method in self.methods for column in method.columns)
        return [*(column for score in self.scores for column in score.columns), *dict.fromkeys(extra), REGION]

    @property
    def pictured_at_most(self) -> float:
        """Of how many targets the maps can be kept for pictures."""
        return _pictured_at_most(self.source, len(self.explained) * len(self.methods))

    def identity(self, method: int, probe: int, target: Target) -> tuple[str, ...]:
        """Return what names a map in tables: probe, method, split, image and class, in the order of IDENTITY."""
        one, source = self.explained[probe], self.source
        name = one.named(self.methods[method])
        return (one.probe, name, source.name, source.id_of(target.row), source.split.store.classes[target.label])

    def by_source(self) -> list[tuple[Source, list[int]]]:
        """Return the sources of maps, each with the numbers of the probes that are explained from it."""
        drawn = [number for number, one in enumerate(self.explained) if one.note == RANDOM_BACKBONE]
        own = [number for number in range(len(self.explained)) if number not in drawn]
        return [(self.source, own), *([(self.randomised, drawn)] if self.randomised else [])]

    def work(self, probes: int) -> Work:
        """Return how much there is to do for so many probes."""
        source, images = self.source, {target.row for piece in self.pieces for target in piece}
        channels = tuple(source.channels(feature) for feature in source.features)
        pairs, size = sum(map(len, self.pieces)), source.preprocessing.size
        return Work(len(images), pairs, probes, size, channels)

    def left(self, method: Method, source: Source, work: Work) -> Work:
        """Return what is left for the backbone of work where a store has the features of a method's masked images."""
        probes = next(probes for own, probes in self.by_source() if own is source)
        heads = through_backbone(method, [self.explained[number] for number in probes], source.masked)
        left = {one.feature for one in heads}
        return work._replace(channels=tuple(source.channels(reading) for reading in source.features if reading in left))

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
            "protocol": [self.settings.parity, self.protocol.model_dump(mode="json")],
            "save_maps": self.settings.save_maps,
            "targets": [[(source.id_of(target.row), target.label) for target in piece] for piece in self.pieces],
            "pictured": [target.pictured for piece in self.pieces for target in piece],
            "predicted": bool(self.examples.rules),
            "memory": source.memory,
            "device": source.device.type,
            "backbones": [one and one.network and one.backbone.weights_sha256 for one in (source, self.randomised)],
            "masks": {masking.type: store.split.store.id for masking, store in source.masked.items()},
        }
        digest.update(json.dumps(settings).encode())
        for target in (target for piece in self.pieces for target in piece):
            digest.update(target.packed)
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
    run, profile = open_run(settings.run), profile_named(settings.parity)
    methods = [profile.method(each) for each in _parsed(METHODS, settings.methods, DEFAULT_METHODS, "--method")]
    store = store_of(run, settings.store)
    drawn = settings.sanity and settings.dataset is not None
    chosen = _chosen(run, settings.probes, settings.rule)
    explained = _load(run, store, chosen, device, settings.seed if settings.sanity else None, drawn)
    preprocessing = Preprocessing(**store.manifest.identity["preprocessing"])
    data = store[_scored_split(run) if settings.split is None else settings.split]
    records = None if settings.dataset is None else open_records(data, settings.dataset, settings.root)
    network = _network(settings, data, preprocessing, device, records)
    if settings.protocol is None:
        protocol = default_protocol(data, network is not None)
    else:
        protocol = parse_kind(PROTOCOLS, settings.protocol, "--protocol")
    protocol = profile.protocol(protocol)
    scores = _parsed(SCORES, settings.scores, protocol.scores, "--score")
    check_scores(scores, protocol, network is not None)
    features, taken = tuple(dict.fromkeys(one.feature for one in explained)), MEMORY if memory is None else memory
    images = Source(data, preprocessing, device, network, features, taken, records=records)
    source, targets = protocol.pose(images, settings.limit, explained)
    source = replace(source, masked=find_masked(methods, source, targets, listed(settings.masks or ())))
    check_methods(methods, explained, source)
    randomised = _randomised(images, source, settings.seed) if drawn else None
    if settings.sanity and not drawn:
        say_once("notice: --sanity shows random heads alone; random backbones need the images: --dataset and --root")
    examples = parse_examples(settings.examples)
    if settings.images is not None:
        targets = only(settings.images, source, targets)
        examples = examples._replace(first=len(targets))
    kept = _pictured_rows(targets, examples.first, _pictured_at_most(source, len(explained) * len(methods)))
    targets = [target.as_pictured() if target.row in kept else target for target in targets]
    pieces = list(in_pieces(targets))
    return Task(run, explained, methods, scores, protocol, source, randomised, pieces, examples, settings)


def _pictured_at_most(source: Source, maps: int) -> float:
    """Return of how many targets the maps fit into memory. maps: of each target."""
    # They are copied some four times on their way into a file.
    return source.memory / 4 / (4 * source.preprocessing.size**2 * maps)


def _pictured_rows(targets: Sequence[Target], first: int, most: float) -> set[int]:
    """Return the first rows, of which the maps are kept for pictures. most: targets whose maps fit into memory."""
    pairs = Counter(target.row for target in targets)
    rows = sorted(pairs)[:first]
    fitting = [row for row, total in zip(rows, accumulate(pairs[row] for row in rows), strict=True) if total <= most]
    if len(fitting) < len(rows):
        say_once(
            f"notice: the maps of {len(fitting)} images are kept for pictures, not of {len(rows)}; --memory holds no more"
        )
    return set(fitting)


def _parsed(kinds: Registry[K], words: Sequence[str] | None, default: Sequence[str], option: str) -> list[K]:
    """Return the kinds that words name, each once."""
    return list(dict.fromkeys(parse_kind(kinds, word, option) for word in (default if words is None else words)))


def _network(
    settings: Settings,
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    records: Sequence[Record] | None,
) -> Network | None:
    """Load the backbone, if one was named."""
    if settings.backbone is None:
        return None
    if records is None:
        raise BadInput("--backbone needs --dataset and --root too, for the images")
    return open_network(
        split, preprocessing, device, records, settings.backbone, settings.arch, settings.weights_key, settings.seed
    )


def _randomised(images: Source, posed: Source, seed: int) -> Source:
    """Return a source of the posed images whose maps are those of a backbone with random weights. images: the split's."""
    assert images.records is not None, "a backbone needs the images"
    like = images.backbone if images.network else None
    drawn = open_random_network(images.split, images.preprocessing, images.device, images.records, seed, like)
    backbone = drawn.backbone_for(posed.preprocessing.size)
    own = replace(drawn, backbone=backbone, picture=(posed.network or drawn).picture)
    return replace(posed, network=own, stored=False, masked={})


def _chosen(run: Run, probes: Sequence[str] | None, rule: str | None) -> list[str]:
    """Return the ids of the probes to explain, each once."""
    return list(dict.fromkeys(probes or (best(run, "loss") if rule is None else select(run, rule))))


def _load(
    run: Run, store: Store, probes: Sequence[str], device: torch.device, random: int | None, drawn: bool
) -> list[Explained]:
    """Load probes onto a device. Raises BadInput if one is damaged, or the store does not have what it reads.

    random: a seed to draw a head like each probe's from, which stands beside it, or None for no such heads. drawn:
    whether its own head on a backbone with random weights does so too.
    """
    files, explained = find_probes(run.path), []
    for probe in (probe for name in probes for probe in load_probes(run.path, [name], files)):
        spec, feature = probe.spec, Reading.of(probe.spec, store)
        weights = {"": probe.weights}
        if random is not None:
            channels = feature.width(store)
            generator = torch.Generator().manual_seed(random % 2**63)
            weights[RANDOM_HEAD] = spec.head.initial_weights(channels, len(store.classes), generator)
        if drawn:
            weights[RANDOM_BACKBONE] = probe.weights
        for note, own in weights.items():
            head = HeadModule(spec.head, own, spec.loss.link).to(device)
            explained.append(Explained(spec.id, head, feature, Input.of(spec), note))
    return explained


def _scored_split(run: Run) -> str:
    """Return the split of the store that a run is scored on. Raises BadInput if it is a union of splits."""
    names = run.summary["splits"][run.scored_on]
    if len(names) > 1:
        raise BadInput(f"run {run.path} is scored on {' and '.join(names)}: name one with --split")
    return names[0]
