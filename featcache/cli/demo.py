"""`featcache demo`."""

import click


@click.command()
@click.option(
    "--out", default="featcache-demo", type=click.Path(file_okay=False), help="Folder for all that the demo makes."
)
@click.option(
    "--scale", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, help="Share of the 800 scenes to make."
)
@click.option("--data-only", is_flag=True, help="Make the dataset and the grid, and stop.")
@click.pass_context
def demo(context: click.Context, out: str, scale: float, data_only: bool) -> None:
    """See the whole idea work: real images, a real backbone, a grid of probes, heatmaps, one page.

    Every step prints the featcache command that does it.
    """
    from featcache.demo.demo import make_data, run_demo

    if data_only:
        make_data(out, scale)
        return
    from featcache.cli import run

    run_demo(lambda words: run(words, context.obj), out, scale)
