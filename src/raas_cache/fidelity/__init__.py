"""Fidelity: how much a cache changes what a model predicts, measured on a given text.

`texts.py` reads problems and chains of thought, and turns them into token ids; `traces.jsonl` has twelve of them.
`reading.py` reads a batch with all caches side by side. `batches.py` runs the batches, in one process or several, and
stores their rows. `measure.py` measures the fidelity, and `results.py` has the tables, with the intervals and the sign
test of `common/statistics.py`. `command.py` is `raas-cache fidelity`.
"""

from ..common.statistics import Difference
from .measure import measure
from .results import Fidelity, FidelityRow
from .texts import Text, load_texts


__all__ = ["Difference", "Fidelity", "FidelityRow", "Text", "load_texts", "measure"]
