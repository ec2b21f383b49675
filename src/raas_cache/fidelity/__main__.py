"""`torchrun -m raas_cache.fidelity ...` runs the `fidelity` command in each process."""

import typer

from .command import fidelity


app: typer.Typer = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(fidelity)

if __name__ == "__main__":
    app()
