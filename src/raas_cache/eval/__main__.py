"""`accelerate launch -m raas_cache.eval ...` runs the `eval` command in each process."""

import typer

from .command import evaluate


app: typer.Typer = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(evaluate)

if __name__ == "__main__":
    app()
