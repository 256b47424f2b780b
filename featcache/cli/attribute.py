import click


@click.command()
def attribute():
    pass
