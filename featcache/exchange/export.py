"""`featcache export`: a backbone, or a probe merged with its backbone, as a file for plain torch."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import click
import safetensors.torch

from featcache.arguments import CHECKPOINT, NAME, PATH, PATHS, listed, takes
from featcache.atomic import local_path
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import OWN, Preprocessing
from featcache.backbones.load import as_backbone, load_network
from featcache.backbones.recognise import recognise
from featcache.errors import BadInput
from featcache.exchange.head_names import to_published
from featcache.exchange.merged import Merged, as_own_network, as_program, example, own_tensors
from featcache.exchange.weights_file import PROGRAM, STATE_DICTS, check_suffix, write_program, write_state_dict
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import open_run
from featcache.probes.runs.run_file import FILE


@takes(checkpoints=PATHS, to=PATH, run=PATH, probe=NAME, backbone=CHECKPOINT, arch=NAME, weights_key=NAME)
def export(checkpoints=(), to=None, run=None, probe=None, backbone=None, arch=None, weights_key=None):
    """Write backbones, or one probe merged with its backbone, as files that plain torch loads.

    checkpoints: of backbones, whose tensors are written under their architecture's own names; a path or
    several. to: file (.safetensors, .pth, .pt), or a folder for several checkpoints. Instead of
    checkpoints, run, probe (id) and backbone (checkpoint): writes both as one state dict, or as a
    program if `to` ends in .pt2. arch, weights_key: as load_backbone's. See docs/export.md. Files that
    hold the same already are left as they are. Returns the paths. Raises BadInput.
    """
    checkpoints = listed(checkpoints)
    if to is None:
        raise BadInput("export needs --to, the file to write")
    local_path(to, "--to")
    if run is None:
        if probe or backbone or not checkpoints:
            raise BadInput("export takes checkpoints of backbones, or --run, --probe and --backbone")
        targets = _targets(checkpoints, to)
        for checkpoint, target in zip(checkpoints, targets, strict=True):
            _export_backbone(checkpoint, target, arch, weights_key)
        return targets
    if checkpoints or not (probe and backbone):
        raise BadInput("export of a probe needs --run, --probe and --backbone, and no other checkpoint")
    check_suffix(to, (*STATE_DICTS, PROGRAM))
    _export_probe(open_run(run), probe, backbone, arch, weights_key, to)
    return [Path(to)]


def _targets(checkpoints, to):
    """Return the file to write for each checkpoint."""
    to_folder = str(to).endswith(os.sep) or Path(to).is_dir()
    if not to_folder:
        if len(checkpoints) > 1:
            raise BadInput(f"--to {to}: for several checkpoints name a folder, as {to}{os.sep}")
        check_suffix(to, STATE_DICTS)
        return [Path(to)]
    targets = {}
    for checkpoint in checkpoints:
        target = Path(to) / f"{Path(checkpoint).stem}.safetensors"
        if target in targets:
            raise BadInput(f"--to {to}: {targets[target]} and {checkpoint} would both become {target.name}")
        targets[target] = checkpoint
    return list(targets)


def _export_backbone(checkpoint, target, arch, weights_key):
    architecture, network, report = load_network(checkpoint, arch, weights_key=weights_key)
    # As the checkpoint has them, not as they are fitted to an input size.
    tensors = {name: tensor.clone() for name, tensor in own_tensors(architecture, network).items()}
    backbone = as_backbone(architecture, network, report, resize=OWN)
    write_state_dict(target, tensors, _backbone_meta(backbone, checkpoint, backbone.preprocessing.describe()))
    if _recognised(tensors, target) != architecture.name:
        # As with strides or a number of heads, which the wrappers of a method may have told.
        click.echo(f"note: load {target} with --arch {architecture.name}; its tensors alone do not say so", err=True)


def _recognised(tensors, path):
    try:
        return recognise(tensors, path).name
    except BadInput:
        return None


def _backbone_meta(backbone, checkpoint, preprocessing):
    return {
        "architecture": backbone.arch,
        "weights_sha256": backbone.weights_sha256,
        "source": Path(checkpoint).name,
        "loaded": backbone.load_report.replace(str(checkpoint), Path(checkpoint).name),
        "preprocessing": preprocessing,
    }


def _export_probe(run, probe_id, checkpoint, arch, weights_key, target):
    summary = run.summary
    if not summary.keys() >= {"preprocessing", "arch", "weights_sha256"}:
        raise BadInput(
            f"run {run.path} was made by an older featcache and does not hold what the images went through; "
            "run the same train-probes again with another --run"
        )
    probe = load_probe(run.path, probe_id)
    if probe.diverged is not None:
        epoch = probe.diverged_epoch
        raise BadInput(f"probe {probe_id} of run {run.path} diverged in epoch {epoch}, and has no weights")
    try:
        preprocessing = Preprocessing(**summary["preprocessing"])
    except TypeError as error:
        raise run.damaged(FILE, f"preprocessing: {error}") from None
    architecture, network, report = load_network(checkpoint, arch or summary["arch"], weights_key=weights_key)
    backbone = Backbone(architecture, network, preprocessing, report)
    if backbone.weights_sha256 != summary["weights_sha256"]:
        raise BadInput(
            f"backbone {checkpoint} (weights sha256 {backbone.weights_sha256}) is not the one that run {run.path} was "
            f"made with ({summary['arch']}, weights sha256 {summary['weights_sha256']})"
        )
    merged = Merged(backbone, probe)
    images = example(backbone)
    meta = _backbone_meta(backbone, checkpoint, summary["preprocessing"]) | {
        "input": f"float32 {['B', *images.shape[1:]]}, normalised as preprocessing says".replace("'", ""),
        "output": "logits, in the order of classes",
        "classes": summary["classes"],
        # As JSON has it, which knows no tuples.
        "probe": {"id": probe_id} | json.loads(json.dumps(asdict(probe.spec))),
        "probe_sha256": hashlib.sha256(safetensors.torch.save(probe.weights)).hexdigest(),
    }
    if Path(target).suffix == PROGRAM:
        write_program(target, lambda: as_program(merged, images), meta)
        return
    backbone_tensors = own_tensors(architecture, network)
    tensors = as_own_network(merged, probe, backbone_tensors, images)
    if tensors is None:
        head = to_published(probe.spec.head, probe.weights, multi_label="map" in run.metrics)
        tensors = {f"backbone.{name}": tensor for name, tensor in backbone_tensors.items()}
        tensors |= {f"head.{name}": tensor for name, tensor in head.items()}
    write_state_dict(target, tensors, meta)
