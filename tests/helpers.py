"""Small models and comparisons that several test files share."""

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

from raas_kernels import engine


VOCAB = 97
# Of a random model's weights. Without those of v, o and lm_head the attention would hardly reach the logits, and the
# logits would be so much alike that a sampled token says nothing about them.
GAINS = {"embed_tokens": 20, "q_proj": 36, "k_proj": 12, "v_proj": 9, "o_proj": 9, "lm_head": 20}


def tiny_model(
    heads=4, kv_heads=2, layers=2, head_dim=8, dtype=torch.float64, sharp=True, seed=0, cls=LlamaConfig, **kw
):
    """A random decoder. `sharp` makes its attention have clear favourites, as a trained model's attention has, and its
    logits depend on them: a far token that is wrongly hidden or kept changes the logits by about half of their norm.
    """
    torch.manual_seed(seed)
    config = cls(
        hidden_size=heads * head_dim, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1 << 17,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, **{"vocab_size": VOCAB, "head_dim": head_dim, **kw},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if sharp:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                for part, gain in GAINS.items():
                    if f"{part}.weight" in name:
                        weight.mul_(gain)
    return model


def prompt(batch=1, length=20, padding=(), seed=0):
    """Random token ids and mask; `padding[row]` tokens of row `row` are left padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, cache, steps, sample=True, seed=0, **kw):
    torch.manual_seed(seed)
    kw = {"min_new_tokens": steps, "pad_token_id": 0, "do_sample": sample, **kw}
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=steps, **kw)


def compile_anywhere():
    """What makes `generate` compile its steps on a CPU too, where by itself it does not; a graph break is an error."""
    settings = CompileConfig(backend="eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    return settings


def use_engine(monkeypatch, name):
    """Force the kernels' engine, which is otherwise chosen once; `name` None for the device's own."""
    if name is None:
        monkeypatch.delenv("RAAS_KERNELS", raising=False)
    else:
        monkeypatch.setenv("RAAS_KERNELS", name)
    engine.cache_clear()


def refused(result):
    """The one line in which a command said no, with exit code 2 and no traceback."""
    assert result.exit_code == 2, result.output
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert result.output.rstrip().endswith(error)
    assert isinstance(result.exception, SystemExit)
    return error


def resident_set(cache, layer, row, head):
    positions = cache.resident_positions(layer)[row, head]
    kept = positions[positions >= 0].tolist()
    assert len(kept) == len(set(kept)), "a position is held twice"
    return set(kept)
