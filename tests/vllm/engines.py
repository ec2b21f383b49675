"""vLLM with rows, and what `generate` gives for the same requests."""

import gc
import json
import random
import warnings

import torch

from raas_cache import from_name

from ..helpers import VOCAB


OPTIONS = {"page_size": 4, "min_decode_pages": 2}
BUDGET = 32


class Engines:
    """Starts engines of vLLM in this process, with the settings of the plug-in in the environment."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.engine = monkeypatch, None
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    def start(self, folder, method="raas", budget=BUDGET, max_prompt=64, rows=8, options=None, **arguments):
        """An `LLM` whose memory holds `rows` requests."""
        from vllm import LLM, plugins

        from raas_cache.serving.vllm import settings

        self.stop()
        variables = {
            "BUDGET": budget,
            "METHOD": method,
            "MAX_PROMPT": max_prompt,
            "OPTIONS": {**OPTIONS, **(options or {})},
        }
        for name, value in variables.items():
            text = value if isinstance(value, str) else json.dumps(value)
            self.monkeypatch.setenv(f"RAAS_{name}", text)
        settings.current.cache_clear()
        self.monkeypatch.setattr(plugins, "plugins_loaded", False)  # vLLM loads its plug-ins once in each process
        defaults = {
            "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 512,
            "max_num_seqs": 16, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 1 << 26,
            "num_gpu_blocks_override": rows + 1, "disable_log_stats": True,
        }  # fmt: skip
        self.engine = LLM(folder, **{**defaults, **arguments})
        return self.engine

    def stop(self):
        """Stop the engine, so that another one can start in this process."""
        if self.engine is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        self.engine = None
        gc.collect()
        cleanup_dist_env_and_memory()


def requests(count, longest=60, new=40, seed=0):
    """(prompt, number of new tokens) of `count` random requests."""
    rng = random.Random(seed)
    lengths = [(rng.randint(1, longest), rng.randint(1, new)) for _ in range(count)]
    return [([rng.randrange(1, VOCAB) for _ in range(length)], limit) for length, limit in lengths]


def sampling(new):
    """Greedy decoding of `new` tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)


def answers(engine, asked):
    """The tokens of each request."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    outputs = engine.generate(prompts, [sampling(new) for _, new in asked], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def alone(model, ids, new, method="raas", budget=BUDGET, pinned=None, **options):
    """The tokens that `generate` gives for one request, and the number of evictions.

    Args:
        pinned: number of tokens that are read as the prompt; the others are decoded one by one. None for all.
    """
    cache = from_name(method, budget, **{**OPTIONS, **options})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)
        whole = torch.tensor([ids])
        if pinned is not None and pinned < len(ids):
            model(whole[:, :pinned], past_key_values=cache)
            for place in range(pinned, len(ids) - 1):
                model(whole[:, place : place + 1], past_key_values=cache)
        output = model.generate(
            whole, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return output[0, len(ids) :].tolist(), cache.evictions


def check_alone(model, asked, found, **options):
    """Compare the tokens of all requests with `generate`; returns the number of evictions."""
    evictions, known = 0, {}
    for (prompt, new), tokens in zip(asked, found, strict=True):
        request = (tuple(prompt), new)
        if request not in known:
            known[request] = alone(model, prompt, new, **options)
        expected, evicted = known[request]
        assert tokens == expected, (len(prompt), new)
        evictions += evicted
    return evictions
