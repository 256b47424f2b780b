"""`featcache import-probes`: How-to-Probe's finished probes, as mmpretrain saves them, into a run folder."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from featcache.arguments import PATH, PATHS, listed, takes
from featcache.atomic import local_path
from featcache.backbones.checkpoints.files import read_checkpoint
from featcache.backbones.load import load_backbone
from featcache.device import choose_device
from featcache.errors import BadInput, nearest, of_the_system
from featcache.exchange.head_names import from_published, published_offset
from featcache.feature import Feature, parse_feature
from featcache.probes.finish import finish_run
from featcache.probes.grids.fields import part_fields
from featcache.probes.heads.head import Head
from featcache.probes.losses import LOSSES
from featcache.probes.runs.mend import drop_damaged, kept_files, known_store, without_summary
from featcache.probes.runs.probe_file import Origin, find_probes, load_specs, save_probes
from featcache.probes.runs.run import Run
from featcache.probes.runs.run_file import PROBES, holds_run, identity, read_summary, write_summary
from featcache.probes.scores.metrics import default_metric
from featcache.probes.spec import ProbeSpec, imported_spec
from featcache.probes.trained import TrainedProbe
from featcache.probes.weights import initial_weights
from featcache.progress import say
from featcache.store.folder import open_folder
from featcache.store.reader import Store, open_store

ROLES = ("train", "val", "test")
# Those that How-to-Probe trains its heads with.
PUBLISHED_LOSSES = ("bce", "ce")


@takes(checkpoints=PATHS, store=PATH, run=PATH)
def import_probes(
    checkpoints: str | PathLike | Sequence[str | PathLike],
    store: str | PathLike,
    run: str | PathLike,
    loss: str,
    offset: float | str | None = None,
    device: str | None = None,
) -> Run:
    """Turn the heads of mmpretrain checkpoints into the probes of a run, and score them on a store.

    checkpoints: paths, each {"state_dict": {"backbone.*", "head.*"}}, whose backbone is that of the store.
    store: path. run: folder, new or of probes that were imported before; new ones are added. loss: bce or
    ce, by which the heads were trained; no tensor tells. offset: added to every logit, a number or
    "-ln(C-1)"; by default what How-to-Probe's head of that form has. device: to score on. Returns the
    Run. Raises BadInput.

        run = featcache.import_probes("epoch_50.pth", store="voc.zarr", run="runs/published", loss="bce")
    """
    paths = listed(checkpoints)
    chosen_device = choose_device(device)
    if loss not in PUBLISHED_LOSSES:
        words = ", ".join(PUBLISHED_LOSSES)
        raise BadInput(f"--loss: {loss!r} is not one of {words}{nearest(loss, PUBLISHED_LOSSES)}")
    folder = local_path(run, "--run")
    opened = known_store(open_store(store), folder)
    splits = _roles(opened)
    if offset is not None:
        try:
            offset = part_fields(Head)["offset"].read(offset)
        except ValueError as error:
            raise BadInput(f"--offset: {error}") from None
    select = {"metric": default_metric(opened.task), "split": "val" if "val" in splits else "train"}
    roles = {role: list(names) for role, names in splits.items()}
    basis: dict[str, Any] = {"store_id": opened.id, "seed": None, "splits": roles, "store": str(store)}
    probes = {p.spec.id: (p, path) for path in paths for p in [_read(path, opened, loss, offset)]}
    started = time.monotonic()
    with open_folder(folder).locked(f"waiting: another process is writing into {folder}"):
        earlier, files = _write(folder, opened, basis | {"select": select}, probes)
        known = {entry["probe"] for entry in earlier}
        new = [{"probe": i, "file": str(path)} for i, (_, path) in probes.items() if i not in known]
        basis["imported"] = earlier + new
        basis["key"] = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
        specs = _specs(folder, basis["imported"])
        return finish_run(
            folder, specs, opened, splits, basis | {"select": select, "files": files}, chosen_device, started
        )


def _write(
    folder: Path, store: Store, basis: Mapping[str, Any], probes: Mapping[str, tuple[TrainedProbe, str | PathLike]]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Write probes {id: (probe, its checkpoint)} into a run folder. Returns what _earlier does of the run before."""
    earlier, files = _earlier(folder, store, basis, {probe: str(path) for probe, (_, path) in probes.items()})
    try:
        (folder / PROBES).mkdir(exist_ok=True)
        # Without a key the run is not finished, until all is written.
        write_summary(folder, {**basis, "imported": earlier, "files": files})
    except OSError as error:
        raise BadInput(f"cannot write run folder {folder}: {of_the_system(error)}") from None
    for probe, path in probes.values():
        save_probes(folder, [probe], Origin(store.id, identity(basis)))
        say(f"imported: {probe.spec.id} from {path}")
    return earlier, files


def _specs(folder: Path, imported: Sequence[Mapping[str, str]]) -> list[ProbeSpec]:
    """Return the ProbeSpecs of imported probes. Raises BadInput if the file of one is gone."""
    files = find_probes(folder)
    lost = [entry for entry in imported if entry["probe"] not in files]
    if lost:
        raise BadInput(f"run {folder} has lost probe {lost[0]['probe']}: name its checkpoint too, {lost[0]['file']}")
    specs = {spec.id: spec for spec in load_specs(folder, [entry["probe"] for entry in imported], files)}
    return [specs[entry["probe"]] for entry in imported]


def _roles(store: Store) -> dict[str, tuple[str, ...]]:
    """Return {role: splits} of all splits. Splits such as trainval are train, if there is no split of that name."""
    roles: dict[str, tuple[str, ...]] = {role: (role,) for role in ROLES if role in store.splits}
    if "train" not in roles and (others := tuple(split for split in store.splits if split not in ROLES)):
        roles["train"] = others
    if not roles.keys() & {"train", "val"}:
        raise BadInput(
            f"store {store.path} has nothing but test to choose probes by (it has {', '.join(store.splits)})"
        )
    return roles


def _earlier(
    folder: Path, store: Store, basis: Mapping[str, Any], given: Mapping[str, str]
) -> tuple[list[dict[str, str]], dict[str, dict[str, int]]]:
    """Return what run.json says of the probes imported before, and of files that stay: (imported, files).

    given: {probe: file} of the checkpoints that are imported now; a run.json that is lost named them too. Raises BadInput if
    `folder` is another kind of run.
    """
    if not any(folder.iterdir()):
        return [], {}
    try:
        summary = read_summary(folder)
    except BadInput as error:
        if not holds_run(folder):
            raise
        without_summary(folder, basis, error.message)
        drop_damaged(folder, {**basis, "files": {}}, None)
        names = {spec.id: spec.name for spec in load_specs(folder, find_probes(folder))}
        # Those that are given again come in the order of the command, as at first.
        files = {probe: file for probe, file in given.items() if probe in names} | names | dict(given)
        return [{"probe": probe, "file": file} for probe, file in files.items() if probe in names], {}
    if "imported" not in summary:
        raise BadInput(f"run {folder} holds probes that were trained here; import into another --run")
    if summary["store_id"] != store.id:
        raise BadInput(f"run {folder} was made on store id {summary['store_id']}, not {store.id}; choose another --run")
    drop_damaged(folder, summary, None)
    return summary["imported"], kept_files(folder, summary)


def _read(path: str | PathLike, store: Store, loss: str, offset: float | str | None) -> TrainedProbe:
    """Read one checkpoint as a TrainedProbe on a feature of the store. Raises BadInput."""
    state = _head_tensors(path, store)
    head, weights = from_published(state, len(store.classes), path)
    if offset is None:
        offset = published_offset(head, state, loss, store.task == "multi-label")
    head = head.model_copy(update={"offset": offset}).resolved(len(store.classes))
    feature = _feature(store, head)
    source = hashlib.sha256(safetensors.torch.save(weights)).hexdigest()
    name = "/".join(Path(path).resolve().with_suffix("").parts[-2:])
    spec = imported_spec(name, str(feature), head, LOSSES[loss].model_validate({}), source)
    dim = store.manifest.features[str(feature)]["shape"][0]
    for key, initial in initial_weights(spec, dim, len(store.classes)).items():
        expected, shape = tuple(initial.shape), tuple(weights[key].shape) if key in weights else "missing"
        if shape != expected:
            raise BadInput(f"checkpoint {path}: {key} of its head is {shape}; on {feature} it must be {expected}")
    return TrainedProbe(spec, weights, [], None)


def _head_tensors(path: str | PathLike, store: Store) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's head. Raises BadInput if its backbone is not the store's."""
    identity = store.manifest.identity
    backbone = load_backbone(path, identity["arch"], size=identity["preprocessing"]["size"])
    if backbone.weights_sha256 != identity["weights_sha256"]:
        raise BadInput(
            f"checkpoint {path} holds another backbone (weights sha256 {backbone.weights_sha256}) than store "
            f"{store.path} was made of ({identity['arch']}, weights sha256 {identity['weights_sha256']})"
        )
    content = read_checkpoint(path)
    tensors = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    named = {str(name): value for name, value in tensors.items() if torch.is_tensor(value)}
    state = {name.removeprefix("head."): value for name, value in named.items() if name.startswith("head.")}
    if not state:
        raise BadInput(f"checkpoint {path} holds no head (no tensor's name begins with head.)")
    return state


def _feature(store: Store, head: Head) -> Feature:
    """Return what the head reads: the last map, or its mean where that is exact and the store has it."""
    pooled = parse_feature("last:pooled", store.manifest.aliases)
    if head.pools_first and str(pooled) in store.manifest.features:
        return pooled
    return store.feature("last:spatial")
