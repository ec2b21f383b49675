"""Probes: how many facts a model recalls with each cache, in texts in plain English.

`stories.py` writes the texts from the words in `words.py`, and `tokens.py` finds the tokens of their recalls.
`reading.py` reads a batch with all caches side by side. `measure.py` measures a probe, in one process or several, and
`results.py` has the rows and tables. `command.py` is `raas-cache probe`.
"""

from .measure import probe
from .results import ProbeRow, Recalls
from .stories import PROBES, Probe, Recall, Story


__all__ = ["PROBES", "Probe", "ProbeRow", "Recall", "Recalls", "Story", "probe"]
