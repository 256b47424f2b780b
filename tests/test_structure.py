"""The house: imports go down only, the public face, a quick --help."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.models import vit_b_32

import featcache
from featcache.device import choose_device
from featcache.errors import BadInput

PACKAGE = Path(featcache.__file__).parent
FLOORS = [
    {
        "errors",
        "arguments",
        "atomic",
        "device",
        "digest",
        "feature",
        "kinds",
        "names",
        "progress",
        "ranks",
        "words",
        "__init__",
    },
    {"datasets", "backbones", "store"},
    {"extraction", "probes"},
    {"attribution", "finetuning", "exchange", "planning", "sweeping"},
    {"reporting"},
    {"cli", "demo", "__main__"},
]
# The rooms of backbones/, each of which imports only those before it; all other files of backbones/ come last.
BACKBONE_ROOMS = [{"checkpoints"}, {"architecture", "reductions", "outputs"}, {"input"}, {"families"}]
# The same of probes/, whose last files are commands and what they share.
PROBE_ROOMS = [
    {"gemm", "part", "sample", "tuning"},
    {"heads", "losses", "schedules", "scores"},
    {"solvers"},
    {"imported", "identity", "spec", "trained", "weights"},
    {"inputs", "overlap"},
    {"neighbours"},
    {"runs", "grids"},
    {"engine"},
    {"refit", "finish"},
    {"resolve"},
]
# Files that a kind of probe is named in: those of kinds, and those of formats that published code reads.
KINDS_ARE_NAMED_IN = {
    "heads",
    "losses",
    "solvers",
    "schedules",
    "scores",
    "methods",
    "imported.py",
    "tuning.py",
    "exchange",
    "import_probes.py",
    "svm.py",
    "demo",
}


def _floor(room):
    return next(n for n, rooms in enumerate(FLOORS) if room in rooms)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "featcache":
            yield node.module.split(".")[1] if "." in node.module else "__init__"
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("featcache."))


def test_imports_go_down_only():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in _imports(path):
            if target == room or room == "__init__":
                continue
            below = _floor(target) < _floor(room)
            same_shelf = {room, target} <= FLOORS[0] or (room, target) in {("__main__", "cli"), ("cli", "demo")}
            assert below or same_shelf, f"{path} ({room}) imports {target}"
            assert (room, target) != ("probes", "backbones"), f"{path}: probes must not need a backbone"


def _place(module):
    """Where a module of backbones/ stands in BACKBONE_ROOMS."""
    return next((n for n, rooms in enumerate(BACKBONE_ROOMS) if module in rooms), len(BACKBONE_ROOMS))


def test_the_rooms_of_backbones_import_in_one_direction():
    for path in (PACKAGE / "backbones").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backbones").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            if name.startswith("featcache.backbones."):
                assert _place(name.split(".")[2]) <= _place(own), f"{path} imports {name}"


def _imported_at_run_time(path):
    """Modules that a file imports, without those that only type checkers read."""
    tree = ast.parse(path.read_text())
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in unread:
            yield node.module


def _probe_place(module):
    return next((n for n, rooms in enumerate(PROBE_ROOMS) if module in rooms), len(PROBE_ROOMS))


def test_the_rooms_of_probes_import_in_one_direction():
    for path in (PACKAGE / "probes").rglob("*.py"):
        own = path.relative_to(PACKAGE / "probes").parts[0].removesuffix(".py")
        for name in _imported_at_run_time(path):
            if name.startswith("featcache.probes."):
                assert _probe_place(name.split(".")[2]) <= _probe_place(own), f"{path} imports {name}"
    for path in (PACKAGE / "probes/scores").rglob("*.py"):
        allowed = ("featcache.probes.scores", "featcache.kinds", "featcache.errors")
        assert all(n.startswith(allowed) for n in _imported_at_run_time(path) if n.startswith("featcache"))


def test_no_file_but_its_own_names_a_kind():
    """A head, loss, solver, schedule, metric or method is known to the rest by what its class says."""
    from featcache.attribution.methods import METHODS
    from featcache.attribution.scores import SCORES
    from featcache.probes.identity import REGISTRIES
    from featcache.probes.scores.metrics import METRICS

    words = {word for kinds in (*REGISTRIES.values(), METHODS, SCORES, METRICS) for word in kinds}
    # These are values of other fields too, or commands.
    words -= {"step", "constant", "gradient", "cosine", "none", "svm", "knn"}
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if KINDS_ARE_NAMED_IN & set(parts) or parts[0] in ("backbones", "datasets", "store", "extraction"):
            continue
        tree = ast.parse(path.read_text())
        # What progress bars count.
        units = {
            id(k.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for k in node.keywords
            if k.arg == "unit"
        }
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in units]
        if found := [text for text in texts if text in words]:
            named["/".join(parts)] = found
    assert not named


def test_families_are_named_in_their_own_files_alone():
    """What a family knows reaches the rest of backbones/ through its Architectures."""
    for path in (PACKAGE / "backbones").rglob("*.py"):
        if "families" not in path.parts:
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            named = [t for t in texts if re.fullmatch(r"(resnet|vit|clip|bcos|efficientnet|mnasnet|_caffe)\w*", str(t))]
            assert not named, f"{path} names {named}"


def test_public_face():
    assert featcache.__all__ == [
        "__version__", "layers", "extract", "extract_many", "plan", "open_store", "inspect", "inspect_dataset", "verify", "convert", "train_probes",
        "plan_probes", "sweep", "knn", "svm", "schema", "attribute", "finetune", "plan_finetune", "open_run", "compare", "compare_localisation", "report",
        "export", "import_probes",
    ]  # fmt: skip
    for name in featcache.__all__[1:]:
        function = getattr(featcache, name)
        # A module of the same name would take its place once it is imported.
        assert getattr(featcache, name) is function and callable(function)


def python(code):
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.process
def test_help_does_not_wait_for_torch():
    code = "import sys, featcache.cli; print('torch' in sys.modules, 'zarr' in sys.modules, 'numpy' in sys.modules)"
    assert python(code).split() == ["False"] * 3
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "featcache", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "train-probes" in done.stdout
    # Generous: the figure is a few hundredths; this only notices a heavy import.
    assert time.monotonic() - started < 5


@pytest.mark.process
@pytest.mark.parametrize("vit", [False, True])
def test_a_finished_store_is_found_without_torchs_compiler(scenes, checkpoint, store, tmp_path, vit):
    """torchvision's import loads it, which is half of a command's start, and so does drawing on the meta device."""
    given = {"root": str(scenes), "size": 64, "store": store, "features": "pooled,spatial,layer3:spatial"}
    if vit:
        torch.manual_seed(0)
        checkpoint = tmp_path / "vit.pth"
        torch.save(vit_b_32(image_size=64, num_classes=2).state_dict(), checkpoint)
        given |= {"store": str(tmp_path / "vit.zarr"), "features": "cls", "splits": ["val"]}
    given |= {"dtype": "float32", "workers": 0, "batch_size": 8}
    before = featcache.extract(checkpoint, "voc", **given)
    code = f"import sys, featcache; print(featcache.extract({str(checkpoint)!r}, 'voc', **{given!r}))"
    said = python(f"{code}; print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)").split("\n")
    assert said[:2] == [before, "False False"]


@pytest.mark.process
def test_torchvision_and_the_compiler_stay_whole():
    """Its operators still find the compiler's function when they run, and everybody else the compiler itself."""
    code = (
        "import sys, torch, featcache.backbones\n"
        "from torchvision.ops import roi_align\n"
        "images = torch.arange(64.0).view(1, 1, 8, 8)\n"
        "print(roi_align(images, [torch.tensor([[0.0, 0, 4, 4]])], 2).flatten().tolist())\n"
        "from torchvision.ops.roi_align import is_compile_supported as asked\n"
        "answer = asked('cpu')\n"
        "import torch._dynamo.utils as real\n"
        "print(answer == real.is_compile_supported('cpu'), real.__file__.endswith('utils.py'))"
    )
    plain = code.replace(", featcache.backbones", "")
    assert python(code) == python(plain)
    assert python(code).endswith("True True\n")


def test_every_command_explains_itself(command):
    commands = (
        "demo", "layers", "plan", "extract", "inspect", "verify", "convert", "train-probes", "sweep", "knn", "svm", "finetune", "compare", "attribute",
        "report", "export", "import-probes",
    )  # fmt: skip
    for name in commands:
        code, out, _ = command(name, "--help")
        assert code == 0 and "--help" in out
    assert command("extract", "--backbon", "x")[0] == 2
    assert command("--version")[1].strip().endswith(featcache.__version__)


@pytest.mark.parametrize("name", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_bad_input(name):
    with pytest.raises(BadInput, match=f"--device {name}: cannot be used here"):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"


def test_every_folder_is_a_package():
    """One without an __init__.py works in a checkout and is missing in an installation."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
