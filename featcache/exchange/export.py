"""`featcache export`: a backbone, or a probe merged with its backbone, as a file for plain torch."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from featcache.arguments import CHECKPOINT, NAME, PATH, PATHS, listed, takes
from featcache.atomic import local_path
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import OWN, Preprocessing
from featcache.backbones.load import as_backbone, load_network
from featcache.backbones.recognise import taken_for
from featcache.errors import BadInput
from featcache.exchange.head_names import to_published
from featcache.exchange.merged import Merged, as_own_network, as_program, example, own_tensors
from featcache.exchange.weights_file import PROGRAM, STATE_DICTS, check_suffix, write_program, write_state_dict
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import Run, open_run, select
from featcache.probes.runs.run_file import FILE
from featcache.probes.runs.sealed_tensors import read_content
from featcache.probes.runs.tuned import backbone_path, is_tuned
from featcache.probes.scores.metrics import task_of
from featcache.probes.spec import complete
from featcache.progress import say


@takes(checkpoints=PATHS, to=PATH, run=PATH, probe=NAME, rule=NAME, backbone=CHECKPOINT, arch=NAME, weights_key=NAME)
def export(
    checkpoints: str | PathLike | Sequence[str | PathLike] = (),
    to: str | PathLike | None = None,
    run: str | PathLike | None = None,
    probe: str | None = None,
    rule: str | None = None,
    backbone: str | PathLike | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
) -> list[Path]:
    """Write backbones, or one probe merged with its backbone, as files that plain torch loads.

    checkpoints: of backbones, whose tensors are written under their architecture's own names; a path or
    several. to: file (.safetensors, .pth, .pt), or a folder for several checkpoints. run, probe (id), backbone
    (checkpoint): given instead of checkpoints; probe and backbone are written as one state dict, or as a
    program if `to` ends in .pt2. rule: takes the place of probe, and must select one (see run.select). arch, weights_key: as load_backbone's. See docs/export.md. Files that
    hold the same already are left as they are. Returns the paths. Raises BadInput.

        featcache.export("ckpt.pth", to="backbone.safetensors")
        featcache.export(run="runs/voc", probe="1a2b3c4d5e", backbone="ckpt.pth", to="merged.pt2")
    """
    sources = listed(checkpoints)
    if to is None:
        raise BadInput("export needs --to, the file to write")
    local_path(to, "--to")
    if run is None:
        if probe or rule or backbone or not sources:
            raise BadInput("export takes checkpoints of backbones, or --run, --probe and --backbone")
        targets = _targets(sources, to)
        for checkpoint, target in zip(sources, targets, strict=True):
            _export_backbone(checkpoint, target, arch, weights_key)
        return targets
    opened = open_run(run)
    chosen = _one_probe(opened, probe, rule) if probe or rule else None
    if chosen and backbone is None and is_tuned(opened.summary):
        backbone = backbone_path(opened.path, chosen)
    if sources or not (chosen and backbone):
        raise BadInput("export of a probe needs --run, --probe and --backbone, and no other checkpoint")
    check_suffix(to, (*STATE_DICTS, PROGRAM))
    _export_probe(opened, chosen, backbone, arch, weights_key, Path(to))
    return [Path(to)]


def _one_probe(run: Run, probe: str | None, rule: str | None) -> str:
    """Return the id of the probe to export."""
    if probe and rule:
        raise BadInput("name the probe with --probe or by a rule with --select, not both")
    chosen = [probe] if probe else select(run, str(rule))
    if len(chosen) > 1:
        raise BadInput(f"--select {rule!r} names {len(chosen)} probes ({', '.join(chosen[:5])}); export writes one")
    return chosen[0]


def _targets(checkpoints: Sequence[str | PathLike], to: str | PathLike) -> list[Path]:
    """Return the file to write for each checkpoint."""
    to_folder = str(to).endswith(os.sep) or Path(to).is_dir()
    if not to_folder:
        if len(checkpoints) > 1:
            raise BadInput(f"--to {to}: for several checkpoints name a folder, as {to}{os.sep}")
        check_suffix(to, STATE_DICTS)
        return [Path(to)]
    targets: dict[Path, str | PathLike] = {}
    for checkpoint in checkpoints:
        target = Path(to) / f"{Path(checkpoint).stem}.safetensors"
        if target in targets:
            raise BadInput(f"--to {to}: {targets[target]} and {checkpoint} would both become {target.name}")
        targets[target] = checkpoint
    return list(targets)


def _export_backbone(checkpoint: str | PathLike, target: Path, arch: str | None, weights_key: str | None) -> None:
    """Write the backbone of a checkpoint as a state dict."""
    architecture, network, report = load_network(checkpoint, arch, weights_key=weights_key)
    # Copies, since as_backbone fits the network to an input size.
    tensors = {name: tensor.clone() for name, tensor in own_tensors(architecture, network).items()}
    backbone = as_backbone(architecture, network, report, resize=OWN)
    write_state_dict(target, tensors, _backbone_meta(backbone, checkpoint, backbone.preprocessing.describe()))
    if taken_for(tensors, target) != architecture.name:
        # Strides or a number of heads, for example, may follow from how the checkpoint was wrapped, not from its tensors.
        say(f"note: load {target} with --arch {architecture.name}; its tensors alone do not say so")


def _backbone_meta(backbone: Backbone, checkpoint: str | PathLike, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the meta that every file has, as JSON values."""
    return {
        "architecture": backbone.arch,
        "weights_sha256": backbone.weights_sha256,
        "source": Path(checkpoint).name,
        "loaded": backbone.load_report.replace(str(checkpoint), Path(checkpoint).name),
        "preprocessing": preprocessing,
    }


def _export_probe(
    run: Run, probe_id: str, checkpoint: str | PathLike, arch: str | None, weights_key: str | None, target: Path
) -> None:
    """Write a probe of a run merged with its backbone, as a program or a state dict by the target's suffix."""
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
    backbone, backbone_tensors = _backbone_of(run, probe_id, checkpoint, arch, weights_key)
    merged = Merged(backbone, probe)
    images = example(backbone)
    meta = _backbone_meta(backbone, checkpoint, summary["preprocessing"]) | {
        "input": f"float32 {['B', *images.shape[1:]]}, normalised as preprocessing says".replace("'", ""),
        "output": "logits, in the order of classes",
        "classes": summary["classes"],
        # As JSON has it, which knows no tuples.
        "probe": {"id": probe_id} | json.loads(json.dumps(complete(probe.spec))),
        "probe_sha256": hashlib.sha256(safetensors.torch.save(probe.weights)).hexdigest(),
    }
    if target.suffix == PROGRAM:
        write_program(target, lambda: as_program(merged, images), meta)
        return
    tensors = as_own_network(merged, probe, backbone_tensors, images)
    if tensors is None:
        head = to_published(probe.spec.head, probe.weights, multi_label=task_of(run.metrics) == "multi-label")
        tensors = {f"backbone.{name}": tensor for name, tensor in backbone_tensors.items()}
        tensors |= {f"head.{name}": tensor for name, tensor in head.items()}
    write_state_dict(target, tensors, meta)


def _backbone_of(
    run: Run, probe_id: str, checkpoint: str | PathLike, arch: str | None, weights_key: str | None
) -> tuple[Backbone, dict[str, torch.Tensor]]:
    """Load a run's backbone, with the run's preprocessing, and its tensors under their architecture's own names.

    Raises BadInput if the checkpoint holds another one.
    """
    summary = run.summary
    if is_tuned(summary):
        # Each probe of a fine-tuned run has a backbone and an input of its own.
        own = read_content(backbone_path(run.path, probe_id))
        summary = summary | {name: own[name] for name in ("weights_sha256", "preprocessing")}
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
    return backbone, own_tensors(architecture, network)
