"""`torchrun -m raas_cache.probes ...` runs the `probe` command in each process."""

import typer

from .command import probe


app: typer.Typer = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(probe)

if __name__ == "__main__":
    app()
