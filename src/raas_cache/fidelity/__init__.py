"""Fidelity: how much a cache changes what a model predicts, measured on a given text.

`texts.py` reads problems and chains of thought, and turns them into token ids; `traces.jsonl` has twelve of them.
`reading.py` reads a batch with all caches side by side. `measure.py` runs the batches, in one process or several, and
stores their rows. `statistics.py` has the intervals and the sign test, and `results.py` the tables. `command.py` is
`raas-cache fidelity`.
"""

from .measure import measure
from .results import Fidelity, FidelityRow
from .statistics import Difference
from .texts import Text, load_texts


__all__ = ["Difference", "Fidelity", "FidelityRow", "Text", "load_texts", "measure"]
