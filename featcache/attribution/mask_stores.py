"""Finding the stores of `featcache extract --masks` that fit an attribution."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.masked_features import MaskedFeatures
from featcache.attribution.methods.masked import Masked
from featcache.attribution.methods.method import Method
from featcache.attribution.targets import Target
from featcache.errors import BadInput
from featcache.extraction.images import DECODERS
from featcache.extraction.masks import MASKS
from featcache.extraction.masks.masking import Masking
from featcache.names import MANIFEST
from featcache.ranks import say_once
from featcache.store.folder import LocalFolder
from featcache.store.manifest import Manifest, difference
from featcache.store.reader import Store, open_store
from featcache.words import written


def find_masked(
    methods: Sequence[Method], source: Source, targets: Sequence[Target], given: Sequence[str | PathLike[str]]
) -> dict[Masking, MaskedFeatures]:
    """Find the features of masked variants of the images that are explained: {masking: its features}.

    given: stores to read. Without one that fits a method, a store beside that of the images is taken where there is one,
    and a line says so. Raises BadInput for a given store that fits no method.
    """
    maskings = dict.fromkeys(method.masking for method in methods if isinstance(method, Masked))
    if given and not source.stored:
        raise BadInput("--masks: this protocol makes images of its own, of which no store has masked variants")
    if given and not maskings:
        kinds = ", ".join(MASKS)
        raise BadInput(f"--masks: none of these methods masks images as a store can hold; {kinds} do")
    found: dict[Masking, MaskedFeatures] = {}
    rows = sorted({target.row for target in targets})
    for place in given:
        store = open_store(place)
        reasons = {masking: _misfit(store.manifest, masking, source) for masking in maskings}
        fitting = [masking for masking, reason in reasons.items() if reason is None]
        if not fitting:
            own = [reason for masking, reason in reasons.items() if masking.type == _masks_of(store.manifest)]
            raise BadInput(f"--masks {place}: {(own or list(reasons.values()))[0]}")
        if reason := _lacking(store, source, rows):
            raise BadInput(f"--masks {place}: {reason}")
        found.update(dict.fromkeys(fitting, _features(store, source)))
    for masking in maskings if source.stored else ():
        if masking not in found and (beside := _beside(masking, source, rows)):
            found[masking] = _features(beside, source)
            say_once(f"masks: {written(masking)} from {beside.path} (id {beside.id[:8]})")
    return found


def through_backbone(
    method: Method, explained: Sequence[Explained], masked: Mapping[Masking, MaskedFeatures]
) -> list[Explained]:
    """Return those heads for which a method cannot read the features of masked images from a store."""
    store = masked.get(method.masking) if isinstance(method, Masked) else None
    return [one for one in explained if store is None or not store.serves(one.head, one.feature)]


def _beside(masking: Masking, source: Source, rows: Sequence[int]) -> Store | None:
    """Return the first store that fits among those in the folder of the explained store.

    A notice tells of one that has these masks, but not all of the images, or is not whole.
    """
    for folder in _siblings(source.split.store):
        try:
            if _misfit(Store(folder).manifest, masking, source) is not None:
                continue
        except BadInput:
            continue
        try:
            store = open_store(folder.path)
            reason = _lacking(store, source, rows)
        except BadInput as error:
            reason = error.message
        if reason is None:
            return store
        say_once(f"notice: {folder} has masks {written(masking)} and is not read: {reason}")
    return None


def _siblings(store: Store) -> Iterator[LocalFolder]:
    if isinstance(store.folder, LocalFolder):
        for path in sorted(Path(store.folder.path).resolve().parent.glob(f"*/{MANIFEST}")):
            yield LocalFolder(path.parent)


def _masks_of(manifest: Manifest) -> object:
    """Return the type of a store's masks, None for a store of images as they are."""
    return manifest.identity.get("masks", {}).get("type")


def _misfit(manifest: Manifest, masking: Masking, source: Source) -> str | None:
    """Return why a store does not hold what a masking makes of the images that are explained; None if it may."""
    kind = _masks_of(manifest)
    if kind is None:
        return "it is a store of images as they are; featcache extract --masks writes one of masked images"
    if kind != masking.type:
        return f"it has the masks of {kind}, and --method {masking.type} needs those of {masking.type}"
    try:
        held = type(masking).model_validate(manifest.identity["masks"])
    except ValidationError:
        return f"its masks of {kind} have other fields than in this version of featcache"
    if reason := _other_masks(held, masking):
        return reason
    fields = difference(_network(source.split.store.manifest), _network(manifest))
    if fields:
        return f"it is of another backbone, or of images prepared otherwise: {'; '.join(fields)}"
    size = source.preprocessing.size
    first = {name: 1 if name == str(held.noted) else held.number(size) for name in manifest.features}
    if any(spec["shape"][0] != first[name] for name, spec in manifest.features.items()):
        return f"its features are not those of {held.number(size):,} variants an image, as its masks say"
    return None


def _other_masks(held: Masking, masking: Masking) -> str | None:
    """Return why the masks of a store are not those that are asked for, of the same kind, or None if they are."""
    if masking.extends and masking.counted:
        count, asked = (getattr(one, masking.counted) for one in (held, masking))
        if held.model_copy(update={masking.counted: asked}) == masking:
            short = f"it has {count:,} {masking.counted}, and --method {written(masking)} asks for {asked:,}"
            return f"{short}: say --method {written(held)}" if count < asked else None
    if held != masking:
        return f"its masks are {written(held)}, and those asked for {written(masking)}: say --method {written(held)}"
    return None


def _network(manifest: Manifest) -> dict[str, object]:
    """Return what the features of an image depend on besides the image."""
    identity = manifest.identity
    known = {key: identity.get(key) for key in ("arch", "weights_sha256", "preprocessing", "precision")}
    return known | {"decoder": identity.get("decoder", DECODERS["exact"])}


def _lacking(store: Store, source: Source, rows: Sequence[int]) -> str | None:
    """Return which of the rows that are explained a store lacks, or holds of other images; None if all is there."""
    split = source.split
    if split.name not in store.splits:
        return f"it has no split {split.name} (it has {', '.join(store.splits)})"
    held = {id: row for row, id in enumerate(store[split.name].ids)}
    missing = [split.ids[row] for row in rows if split.ids[row] not in held]
    if missing:
        return (
            f"it lacks {len(missing):,} of the {len(rows):,} images to explain, such as {missing[0]}: say --limit "
            f"{len(held)}, or extract the masks of more images"
        )
    ours, theirs = split.digests, store[split.name].digests
    if ours is None or theirs is None:
        return None
    for row in rows:
        if (ours[row] != theirs[held[split.ids[row]]]).any():
            return f"image {split.ids[row]} was another file when its masked variants were extracted"
    return None


def _features(store: Store, source: Source) -> MaskedFeatures:
    held = {id: row for row, id in enumerate(store[source.split.name].ids)}
    rows = {row: held[id] for row, id in enumerate(source.split.ids) if id in held}
    return MaskedFeatures(store[source.split.name], rows, source.device)
