"""A row of an evaluation, for tests that need no model."""

from raas_cache.eval import Row


ROW = Row(
    index=0, sample=0, seed=0, prompt_hash="", method="raas", budget=512, options={"page_size": 4}, output="",
    answer=None, gold="é", correct=True, prompt_tokens=5, tokens=9, truncated=False, over_budget=False, seconds=2.0,
    batch=0, kv_bytes=10, mean_kv_bytes=8.0, evictions=4, device="CPU",
)  # fmt: skip
