"""Checkpoint files from strangers: no code runs, no claim is believed, what is wrong is said in one line."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.models import resnet18

from featcache.backbones.checkpoints.files import read_checkpoint
from featcache.backbones.load import load_backbone
from featcache.errors import BadInput


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_never_runs(tmp_path, protocol):
    path, evidence = tmp_path / "evil.pth", tmp_path / "evidence"
    content = {"state_dict": {"a": torch.zeros(1)}, "x": Payload(evidence)}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(BadInput, match=r"evil\.pth needs code execution to load \(posix\.mkdir\)") as caught:
        read_checkpoint(path)
    assert "convert it in a sandbox:\n  python -c" in caught.value.message
    assert not evidence.exists()


def test_code_beside_harmless_company_never_runs(tmp_path):
    """Stand-ins for what training leaves do not open a door: getattr(os, "mkdir") stays a stand-in."""
    evidence = tmp_path / "evidence"

    class Sly:
        def __reduce__(self):
            return getattr, (argparse.Namespace, "__init__")

    torch.save({"a": torch.ones(2), "args": argparse.Namespace(x=Sly())}, tmp_path / "sly.pth")
    content = read_checkpoint(tmp_path / "sly.pth")
    assert torch.equal(content["a"], torch.ones(2)) and not isinstance(content["args"], argparse.Namespace)
    torch.save({"args": argparse.Namespace(x=Payload(evidence))}, tmp_path / "worse.pth")
    with pytest.raises(BadInput, match="posix.mkdir"):
        read_checkpoint(tmp_path / "worse.pth")
    assert not evidence.exists()


def convert_as_advised(path, place):
    """Refuse a checkpoint, run the line that the error advises in a folder, and return (the error, the new file)."""
    with pytest.raises(BadInput) as caught:
        read_checkpoint(path)
    said, line = caught.value.message.split("\n")
    assert max(len(said), len(line)) < 500
    subprocess.run(line.replace("python", sys.executable, 1), shell=True, cwd=place, check=True)
    return caught.value.message, place / "out.pth"


@pytest.mark.process
def test_the_advised_conversion_works(tmp_path):
    content = {"state_dict": {"a": torch.ones(1)}, "when": types.SimpleNamespace(x=1), "done": {1, 2}}
    torch.save(content, tmp_path / "in.pth")
    said, converted = convert_as_advised(tmp_path / "in.pth", tmp_path)
    assert "needs code execution to load (types.SimpleNamespace)" in said
    assert torch.equal(read_checkpoint(converted)["state_dict"]["a"], torch.ones(1))


def as_it_is(network):
    return network, ""


def under_a_name(network):
    return {"model": network, "epoch": 3}, ", under 'model'"


def deep_and_wrapped(network):
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    return {"run": {"nets": [torch.nn.DataParallel(network)], "best": 0.5}, "opt": optimizer}, ", under 'run.nets.0'"


@pytest.mark.process
@pytest.mark.parametrize("saved", [as_it_is, under_a_name, deep_and_wrapped])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_saved_whole_is_named_and_its_conversion_loads(tmp_path, checkpoint, saved, zipped):
    network = resnet18()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    content, way = saved(network)
    place = tmp_path / "the 1st"
    place.mkdir()
    torch.save(content, place / "whole.pth", _use_new_zipfile_serialization=zipped)
    said, converted = convert_as_advised(place / "whole.pth", tmp_path)
    assert f"(it holds a whole module, torchvision.models.resnet.ResNet{way})" in said
    assert "convert it in a sandbox that has torchvision:\n  python" in said
    assert load_backbone(converted).weights_sha256 == load_backbone(checkpoint).weights_sha256


@pytest.mark.process
def test_a_module_whose_class_a_script_defines_is_converted_next_to_it(tmp_path):
    script = (
        "import torch\nclass Net(torch.nn.Linear):\n    pass\n"
        "if __name__ == '__main__':\n    torch.save(torch.nn.Sequential(Net(2, 3)), 'whole.pth')\n"
    )
    (tmp_path / "your_script.py").write_text(script)
    subprocess.run([sys.executable, "your_script.py"], cwd=tmp_path, check=True)
    said, converted = convert_as_advised(tmp_path / "whole.pth", tmp_path)
    assert "torch.nn.modules.container.Sequential" in said and "the script that defines Net" in said
    assert {name: tuple(t.shape) for name, t in read_checkpoint(converted).items()} == {
        "0.weight": (3, 2),
        "0.bias": (3,),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_leaves_beside_the_tensors_is_no_obstacle(tmp_path, zipped, monkeypatch):
    """argparse (DINO, MAE), numpy (most), mmengine's buffers, Lightning's dictionaries: read past, never run."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class HistoryBuffer:
        def __init__(self):
            self.log, self.count = np.arange(3.0), np.ones(3)

        def __getstate__(self):
            return {"log": self.log, "statistics": collections.OrderedDict(min=HistoryBuffer.smallest)}

        @classmethod
        def smallest(cls):
            pass

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    bag = collections.defaultdict(dict)
    bag["x"] = {"y": 1}
    content = {
        "state_dict": {"a.weight": torch.randn(3, 4), "b": torch.nn.Parameter(torch.randn(2))},
        "args": argparse.Namespace(lr=0.1, started=datetime.datetime(2026, 1, 1), out=pathlib.Path("/x")),
        "acc": np.float64(0.5),
        "confusion": np.eye(3),
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
        "bag": bag,
        "recent": collections.deque([1, 2]),
        "optimizer": {"state": {0: {"m": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    read = read_checkpoint(tmp_path / "x.pth")["state_dict"]
    assert all(torch.equal(read[name], tensor) for name, tensor in content["state_dict"].items())


def test_damaged_files_are_named(tmp_path):
    torch.save({"a": torch.randn(100, 100), "b": torch.randn(50)}, tmp_path / "whole.pth")
    torch.save({"a": torch.randn(100, 100)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole, old = (tmp_path / "whole.pth").read_bytes(), (tmp_path / "old.pth").read_bytes()
    cases = {
        "page.pth": (b"<!doctype html><html>not found</html>", "is a web page"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        "text.pth": (b"hello", "begins with b'hello'"),
        "empty.pth": (b"", "is empty"),
        "half.pth": (whole[: len(whole) // 2], "damaged checkpoint"),
        "oldhalf.pth": (old[: len(old) // 2], "damaged checkpoint"),
        "flipped.pth": (whole[:200] + b"\0" * 400 + whole[600:], "damaged checkpoint|needs code"),
        "head.safetensors": (struct.pack("<Q", 1 << 40) + b"{" + b" " * 40, "damaged checkpoint"),
        "rest.safetensors": (struct.pack("<Q", 40) + b"{" + b" " * 39, "damaged checkpoint"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=f"({message})") as caught:
            read_checkpoint(tmp_path / name)
        assert name in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(BadInput, match="not found: .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), byte=st.integers(0, 255), zipped=st.booleans(), cut=st.booleans())
def test_any_flipped_byte_or_cut_is_tensors_or_one_line(tmp_path, place, byte, zipped, cut):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4), "n": {"b": torch.zeros(2, 2)}}, buffer, _use_new_zipfile_serialization=zipped)
    data = bytearray(buffer.getvalue())
    at = min(int(place * len(data)), len(data) - 1)
    data[at] = byte
    path = tmp_path / "x.pth"
    path.write_bytes(data[:at] if cut else data)
    try:
        read_checkpoint(path)
    except BadInput as error:
        assert "x.pth" in error.message


def zip_of(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_zip_bombs_are_refused_before_they_unfold(tmp_path):
    zip_of(tmp_path / "bomb.pth", {"x/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadInput, match="compressed entries"):
        read_checkpoint(tmp_path / "bomb.pth")
    zip_of(tmp_path / "plain.pth", {"readme.txt": b"hello"})
    with pytest.raises(BadInput, match="zip archive without data.pkl"):
        read_checkpoint(tmp_path / "plain.pth")
    torch.save({"a": torch.ones(4)}, tmp_path / "lie.pth")
    data = (tmp_path / "lie.pth").read_bytes()
    # The directory at the end claims 2 GB for the storage.
    at = data.rindex(b"lie/data/0") - 46
    lie = data[: at + 20] + struct.pack("<II", 1 << 31, 1 << 31) + data[at + 28 :]
    (tmp_path / "lie.pth").write_bytes(lie)
    with pytest.raises(BadInput, match="claim more bytes than the file has"):
        read_checkpoint(tmp_path / "lie.pth")


def memory_of(path):
    """Peak memory in MB of a process that reads a checkpoint, and its error."""
    code = (
        "import sys, resource; from featcache.backbones.checkpoints.files import read_checkpoint\n"
        "from featcache.errors import BadInput\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_checkpoint(sys.argv[1])\n"
        "except BadInput as error: print(error.message)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    message, grown = done.stdout.strip().split("\n")
    return message, int(grown) / 1024


@pytest.mark.process
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("claim", ["storage", "shape"])
def test_absurd_sizes_are_refused_before_memory_is_spent(tmp_path, zipped, claim):
    tensor = torch.ones(4)
    if claim == "shape":
        tensor = tensor[:1].expand(1 << 40)
    torch.save({"a": tensor}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    if claim == "storage":
        if zipped:
            entries = _entries(tmp_path / "x.pth")
            entries["x/data.pkl"] = _claiming(entries["x/data.pkl"])
            zip_of(tmp_path / "x.pth", entries)
        else:
            (tmp_path / "x.pth").write_bytes(_claiming((tmp_path / "x.pth").read_bytes()))
    message, grown = memory_of(tmp_path / "x.pth")
    assert "storage 0 claims" in message or "claims 8" in message or "absurd shape" in message
    assert grown < 100


def _entries(path):
    with zipfile.ZipFile(path) as archive:
        return {e.filename: archive.read(e) for e in archive.infolist()}


def _claiming(data):
    """The same pickle, whose storage of 4 elements claims 2 thousand million: BININT1 4 becomes BININT."""
    found = re.search(rb"cpuq(.)K\x04", data, re.DOTALL)
    return data[: found.end() - 2] + b"J" + struct.pack("<i", 2_000_000_000) + data[found.end() :]


def test_a_list_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadInput, match=r"list\.pth holds no tensors by name \(it holds: list\)"):
        load_backbone(tmp_path / "list.pth")


def test_safetensors_may_begin_like_a_pickle(tmp_path):
    """The first byte is that of a length, which may be 0x80."""
    import safetensors.torch

    path, tensor = tmp_path / "w.safetensors", torch.arange(3.0)
    for width in range(0, 256, 8):
        path.write_bytes(safetensors.torch.save({"w": tensor}, metadata={"pad": "x" * width}))
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80" and torch.equal(read_checkpoint(path)["w"], tensor)
