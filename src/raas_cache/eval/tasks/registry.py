"""The registry of named data sets: where each is on the Hub, and which task is made of its rows."""

from .hub_set import HubSet
from .maths import maths_task
from .multiple_choice import multiple_choice_task
from .programs import programs_task


HUB_SETS = {
    "gsm8k": HubSet("openai/gsm8k", maths_task, "question", name="main", max_new_tokens=4096),
    "math500": HubSet("HuggingFaceH4/MATH-500", maths_task, "problem"),
    "aime24": HubSet("HuggingFaceH4/aime_2024", maths_task, "problem", split="train"),
    "aime25": HubSet("math-ai/aime25", maths_task, "problem"),
    "aime26": HubSet("MathArena/aime_2026", maths_task, "problem", split="train"),
    "hmmt25": HubSet("MathArena/hmmt_feb_2025", maths_task, "problem", split="train"),
    "amc23": HubSet("math-ai/amc23", maths_task, "question"),
    "gpqa-diamond": HubSet("Idavidrein/gpqa", multiple_choice_task, name="gpqa_diamond", split="train"),
    # The repository has a loading script, which `datasets` no longer runs. The six files are release_v6.
    "livecodebench": HubSet(
        "livecodebench/code_generation_lite",
        programs_task,
        files=("test.jsonl", *(f"test{part}.jsonl" for part in range(2, 7))),
        runs_code=True,
    ),
}
