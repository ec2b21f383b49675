"""Presets of `raas-cache eval`: defaults for several options at once."""

from __future__ import annotations

from typing import Any

import typer


PRESETS: dict[str, dict[str, Any]] = {
    # The experiments of "RaaS: Reasoning-Aware Attention Sparsity" (Hu et al., Findings of ACL 2025), section 4.
    "raas-paper": {
        "dataset": "gsm8k,math500,aime24",
        "limit": 200,
        "method": "dynamic,streaming_llm,h2o,quest,raas",
        "budget": "64,128,256,512,1024",
        "page_size": 16,
        "max_new_tokens": 10_240,
        "temperature": 0.0,
    },
}
"""Preset -> argument of the command -> value."""


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of `--preset`: the values of the preset replace the defaults, so options on the command line win."""
    if name is not None:
        if name not in PRESETS:
            raise typer.BadParameter(f"{name!r} is not a preset: use {' or '.join(PRESETS)}.")
        context.default_map = PRESETS[name]
    return name


def in_words(name: str) -> str:
    """The options of a preset, as they would stand on the command line."""
    return " ".join(f"--{option.replace('_', '-')} {value}" for option, value in PRESETS[name].items())
