"""Figures of a recording: what pages score, how long they live, how much is held, and what eviction costs.

A figure is a matplotlib `Figure`, which a notebook shows and `figure.savefig(path)` writes; `tokens` gives HTML. Only
drawing needs matplotlib.
"""

# The cache must work without this folder: it imports `html` only when a notebook shows it.
from .figures import LostMass, lifetimes, lost_mass, occupancy, regret, tokens, waterfall


__all__ = ["LostMass", "lifetimes", "lost_mass", "occupancy", "regret", "tokens", "waterfall"]
