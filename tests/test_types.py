"""What a type checker, and so an editor, is told about the functions that users call."""

import subprocess
import sys

import pytest

import featcache

pytestmark = pytest.mark.process

PROGRAM = """\
import featcache

path = featcache.extract("ckpt.pth", "voc", root="/data")
features = featcache.open_store(path)["train"]["last:pooled"]
"""
# What mypy says about an expression of that program.
TYPES = {
    "featcache.extract": "def (backbone: str | os.PathLike[str] | torch.nn.modules.module.Module, dataset: str, root: ",
    "path": "str",
    "featcache.open_store": "def (path: str | os.PathLike[str]) -> featcache.store.reader.Store",
    "features": "featcache.store.feature_array.FeatureArray",
    "features.to_torch()": "torch._tensor.Tensor",
    "features.take([3])": "numpy.ndarray[",
    "next(features.batches(8))": "tuple[numpy.ndarray[",
    "featcache.open_store(path)['train'].ids": "list[str]",
    "featcache.convert": "def (store: str | os.PathLike[str], format: str | None =, ",
    "featcache.inspect(path)": "dict[str, dict[str, featcache.store.inspect.Statistics]]",
}


@pytest.fixture(scope="module")
def mypy(request, tmp_path_factory):
    """A function from lines that go on after PROGRAM to what mypy says about each, {line: message}."""
    # The types of torch take a quarter of a minute; they are kept for the next time.
    cache = request.config.cache.mkdir("mypy")
    path = tmp_path_factory.mktemp("types") / "program.py"

    def check(lines):
        path.write_text(PROGRAM + "\n".join(lines))
        words = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={cache}", "--config-file=", path.name]
        done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        messages = {}
        for message in done.stdout.splitlines():
            name, number, rest = (message.split(":", 2) + ["", ""])[:3]
            if name == path.name:
                messages[lines[int(number) - PROGRAM.count("\n") - 1]] = rest.strip()
        return messages

    return check


def test_functions_keep_their_types_through_the_lazy_import(mypy):
    lines = {f"reveal_type({expression})": type_ for expression, type_ in TYPES.items()}
    messages = mypy(list(lines))
    assert messages.keys() == lines.keys(), messages
    for line, type_ in lines.items():
        assert messages[line].startswith(f'note: Revealed type is "{type_}'), (line, messages[line])


def test_all_public_functions_are_known_and_no_others(mypy):
    functions = [name for name in featcache.__all__ if name != "__version__"]
    messages = mypy([f"reveal_type(featcache.{name})" for name in functions])
    for name in functions:
        assert messages[f"reveal_type(featcache.{name})"].startswith('note: Revealed type is "def ('), name
    assert "no attribute" in mypy(["featcache.typo()"])["featcache.typo()"]


def test_arguments_of_the_wrong_type_are_errors(mypy):
    lines = [
        'featcache.extract("ckpt.pth")',
        'featcache.extract("ckpt.pth", "voc", batch_size="32")',
        "featcache.open_store(3)",
        "features.to_torch(dtype=16)",
    ]
    messages = mypy(lines)
    assert messages.keys() == set(lines) and all(m.startswith("error: ") for m in messages.values()), messages
