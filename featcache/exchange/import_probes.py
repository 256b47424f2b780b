"""`featcache import-probes`: How-to-Probe's finished probes, as mmpretrain saves them, into a run folder."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import click
import safetensors.torch
import torch

from featcache.arguments import PATH, PATHS, listed, takes
from featcache.atomic import local_path
from featcache.backbones.checkpoint_file import read_checkpoint
from featcache.backbones.load import load_backbone
from featcache.device import choose_device
from featcache.errors import BadInput, nearest, of_the_system
from featcache.exchange.head_names import from_published, published_offset
from featcache.feature import parse_feature
from featcache.probes.grids.fields import OFFSET
from featcache.probes.heads.weights import initial_weights
from featcache.probes.mend import drop_damaged, kept_files, without_summary
from featcache.probes.probe_file import Origin, find_probes, load_specs, save_probes
from featcache.probes.run_file import PROBES, holds_run, identity, read_summary, write_summary
from featcache.probes.scores.metrics import TASK_METRICS
from featcache.probes.scores.scoring import finish_run
from featcache.probes.spec import imported_spec, logit_offset
from featcache.probes.stack import TrainedProbe
from featcache.store.folder import open_folder
from featcache.store.reader import open_store

ROLES = ("train", "val", "test")
# Of all of How-to-Probe's heads.
LOSSES = ("bce", "ce")


@takes(checkpoints=PATHS, store=PATH, run=PATH)
def import_probes(checkpoints, store, run, loss, offset=None, device=None):
    """Turn the heads of mmpretrain checkpoints into the probes of a run, and score them on a store.

    checkpoints: paths, each {"state_dict": {"backbone.*", "head.*"}}, the backbone that of the store.
    store: path. run: folder, new or of probes imported before, to which these are added. loss: bce or
    ce, which the heads were trained with and no tensor tells. offset: added to every logit, a number or
    "-ln(C-1)"; by default what How-to-Probe's head of that form has. device: to score on. Returns the
    Run. Raises BadInput.
    """
    checkpoints = listed(checkpoints)
    device = choose_device(device)
    if loss not in LOSSES:
        raise BadInput(f"--loss: {loss!r} is not one of {', '.join(LOSSES)}{nearest(loss, LOSSES)}")
    opened = open_store(store)
    splits = _roles(opened)
    if offset is not None:
        try:
            offset = OFFSET.read(offset)
        except ValueError as error:
            raise BadInput(f"--offset: {error}") from None
    folder = local_path(run, "--run")
    roles = {role: list(names) for role, names in splits.items()}
    select = {"metric": TASK_METRICS[opened.task][0], "split": "val" if "val" in splits else "train"}
    basis = {"store_id": opened.id, "seed": None, "splits": roles, "store": str(store)}
    probes = {p.spec.id: (p, path) for path in checkpoints for p in [_read(path, opened, loss, offset)]}
    started = time.monotonic()
    with open_folder(folder).locked(f"waiting: another process is writing into {folder}"):
        given = {probe: str(path) for probe, (_, path) in probes.items()}
        earlier, files = _earlier(folder, opened, basis | {"select": select}, given)
        try:
            (folder / PROBES).mkdir(exist_ok=True)
            # Without a key, and so not finished, until all is written.
            write_summary(folder, basis | {"select": select, "imported": earlier, "files": files})
        except OSError as error:
            raise BadInput(f"cannot write run folder {folder}: {of_the_system(error)}") from None
        for probe, path in probes.values():
            save_probes(folder, [probe], Origin(opened.id, identity(basis | {"select": select})))
            click.echo(f"imported: {probe.spec.id} from {path}", err=True)
        known = {entry["probe"] for entry in earlier}
        new = [{"probe": i, "file": path} for i, path in given.items() if i not in known]
        basis["imported"] = earlier + new
        basis["key"] = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
        specs = _specs(folder, basis["imported"])
        basis |= {"select": select, "files": files}
        return finish_run(folder, specs, opened, splits, basis, device, started)


def _specs(folder, imported):
    """The ProbeSpecs of imported probes. Raises BadInput if one is not there any more."""
    there = find_probes(folder)
    lost = [entry for entry in imported if entry["probe"] not in there]
    if lost:
        raise BadInput(f"run {folder} has lost probe {lost[0]['probe']}: name its checkpoint too, {lost[0]['file']}")
    found = {spec.id: spec for spec in load_specs(folder, [entry["probe"] for entry in imported], there)}
    return [found[entry["probe"]] for entry in imported]


def _roles(store):
    """Return {role: splits} of all splits: what is neither val nor test, such as trainval, has the role train."""
    roles = {role: (role,) for role in ROLES if role in store.splits}
    if "train" not in roles and (others := tuple(split for split in store.splits if split not in ROLES)):
        roles["train"] = others
    if not roles.keys() & {"train", "val"}:
        raise BadInput(
            f"store {store.path} has nothing but test to choose probes by (it has {', '.join(store.splits)})"
        )
    return roles


def _earlier(folder, store, basis, given):
    """What run.json says of the probes imported before, and of files that stay: (imported, files).

    given: {probe: file} of the checkpoints that are imported now, which a lost run.json named too. Raises BadInput if `folder` is another kind of run.
    """
    if not any(folder.iterdir()):
        return [], {}
    try:
        there = read_summary(folder)
    except BadInput as error:
        if not holds_run(folder):
            raise
        without_summary(folder, basis, error.message)
        drop_damaged(folder, basis | {"files": {}}, None)
        names = {spec.id: spec.name for spec in load_specs(folder, find_probes(folder))}
        # Those that are given again come in the order of the command, as at first.
        files = {probe: file for probe, file in given.items() if probe in names} | (names | given)
        return [{"probe": probe, "file": files[probe]} for probe in files if probe in names], {}
    if "imported" not in there:
        raise BadInput(f"run {folder} holds probes that were trained here; import into another --run")
    if there["store_id"] != store.id:
        raise BadInput(f"run {folder} was made on store id {there['store_id']}, not {store.id}; choose another --run")
    drop_damaged(folder, there, None)
    return there["imported"], kept_files(folder, there)


def _read(path, store, loss, offset):
    """Read one checkpoint as a TrainedProbe on a feature of the store."""
    identity = store.manifest.identity
    backbone = load_backbone(path, identity["arch"], size=identity["preprocessing"]["size"])
    if backbone.weights_sha256 != identity["weights_sha256"]:
        raise BadInput(
            f"checkpoint {path} holds another backbone (weights sha256 {backbone.weights_sha256}) than store "
            f"{store.path} was made of ({identity['arch']}, weights sha256 {identity['weights_sha256']})"
        )
    content = read_checkpoint(path)
    tensors = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    tensors = {str(name): value for name, value in tensors.items() if torch.is_tensor(value)}
    state = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    if not state:
        raise BadInput(f"checkpoint {path} holds no head (no tensor's name begins with head.)")
    head, weights = from_published(state, len(store.classes), path)
    if offset is None:
        offset = published_offset(head, state, loss, store.task == "multi-label")
    head = replace(head, offset=logit_offset(offset, len(store.classes)))
    feature = _feature(store, head)
    source = hashlib.sha256(safetensors.torch.save(weights)).hexdigest()
    name = "/".join(Path(path).resolve().with_suffix("").parts[-2:])
    spec = imported_spec(name, str(feature), head, loss, source)
    dim = store.manifest.features[str(feature)]["shape"][0]
    wanted = {k: tuple(v.shape) for k, v in initial_weights(spec, dim, len(store.classes)).items()}
    for key, shape in wanted.items():
        if key not in weights or tuple(weights[key].shape) != shape:
            there = tuple(weights[key].shape) if key in weights else "missing"
            raise BadInput(f"checkpoint {path}: {key} of its head is {there}; on {feature} it must be {shape}")
    return TrainedProbe(spec, weights, [], None)


def _feature(store, head):
    """The feature that the head sees: the last map, or its mean where that is exact and the store has it."""
    pooled = parse_feature("last:pooled", store.manifest.aliases)
    if head.pools_first and str(pooled) in store.manifest.features:
        return pooled
    return store.manifest.feature("last:spatial")
