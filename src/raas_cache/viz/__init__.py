"""Figures of a recording: page scores, lifetimes of pages, tokens held, and the cost of eviction.

A figure is a matplotlib `Figure`: a notebook displays it, and `figure.savefig(path)` writes it to a file. `tokens`
returns HTML. Only the figures need matplotlib.
"""

# The cache must work without this folder. It imports `html` only when a notebook displays the cache.
from .figures import LostMass, lifetimes, lost_mass, occupancy, regret, tokens, waterfall


__all__ = ["LostMass", "lifetimes", "lost_mass", "occupancy", "regret", "tokens", "waterfall"]
