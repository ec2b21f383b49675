"""The cache against the brute-force oracle: every token, and what every layer, row and head holds at the end."""

import itertools

import pytest
import torch

from raas_cache import RaaSCache

from ..architectures import build
from ..helpers import generate, prompt, resident_set, tiny_model, use_engine
from ..oracle import OracleCache


STAMPING = [{"alpha": 1e-2}, {"alpha": 1e-3}, {"alpha": 1e-4}, {"top_ratio": 0.5}, {"top_ratio": 0.3}]
# Every value of every setting meets every value of every other: all of GQA x page x stamping, the rest in rotation.
SETTINGS = [
    {"kv_heads": kv_heads, "page_size": page_size, "scoring": scoring, "granularity": granularity, **stamping}
    for (kv_heads, page_size, stamping), (scoring, granularity) in zip(
        itertools.product([4, 2, 1], [4, 8, 16], STAMPING),
        itertools.cycle([("exact", "head"), ("minmax", "head"), ("exact", "layer"), ("minmax", "layer")]),
        strict=False,
    )
]


def compare(model, inputs, steps, budget, min_decode_pages=3, **settings):
    """Same tokens, same residents; returns the pages evicted a head and the oldest decode token kept by any head."""
    cache = RaaSCache(budget, min_decode_pages=min_decode_pages, **settings)
    tokens = generate(model, inputs, cache, steps)
    original = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    oracle = OracleCache(budget, min_decode_pages=min_decode_pages, **settings)
    expected = generate(model, inputs, oracle, steps)
    model.set_attn_implementation(original)
    assert torch.equal(tokens, expected)
    length = inputs["input_ids"].shape[1]
    oldest = tokens.shape[1]
    for layer, row, head in itertools.product(
        range(len(cache)), range(tokens.shape[0]), range(model.config.num_key_value_heads)
    ):
        held = resident_set(cache, layer, row, head)
        assert held == oracle.resident_set(layer, row, head), (layer, row, head)
        assert cache.evicted_pages(layer)[row, head] == oracle.evicted(layer, row, head)
        assert cache.resident_tokens(layer)[row, head] == len(held)
        oldest = min(oldest, *(token for token in held if token >= length))
    return oracle.evicted(0, 0, 0), oldest


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_left_padded_batch(settings):
    settings = dict(settings)
    model = tiny_model(kv_heads=settings.pop("kv_heads"))
    page_size = settings["page_size"]
    evicted, oldest = compare(model, prompt(2, 21, (5, 0)), 300, budget=32 + 5 * page_size, **settings)
    assert evicted * 2 * 2 * model.config.num_key_value_heads >= 40
    if settings.get("top_ratio"):
        assert oldest < 321 - 5 * page_size, "nothing outlived a sliding window: the setting tests too little"


def test_hundreds_of_evictions_for_every_head():
    evicted, oldest = compare(tiny_model(), prompt(1, 9), 900, budget=40, page_size=4, alpha=0.03)
    assert evicted > 200
    assert oldest < 909 - 40


def test_a_budget_below_the_prompt_keeps_the_floor_of_decode_pages():
    with pytest.warns(UserWarning, match=r"budget=16 leaves 0 pages.*9 pages of the prompt.*min_decode_pages=3"):
        evicted, _ = compare(tiny_model(), prompt(2, 36, (0, 30)), 80, budget=16, page_size=4, alpha=1e-2)
    assert evicted == 17


def test_one_decode_page():
    compare(tiny_model(), prompt(1, 5), 60, budget=12, page_size=4, min_decode_pages=1, alpha=1e-2)


def forward_both(model, caches, chunks, mask):
    """The same forwards for the cache and its oracle; `chunks` are token ids `[batch, n]`."""
    original = model.config._attn_implementation
    for chunk in chunks:
        seen = caches[0].get_seq_length() + chunk.shape[1]
        logits = []
        for cache, implementation in zip(caches, (original, "oracle"), strict=True):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits.append(model(chunk, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        visible = mask[:, seen - chunk.shape[1] : seen].bool()
        torch.testing.assert_close(logits[0][visible], logits[1][visible], rtol=1e-9, atol=1e-9)
    model.set_attn_implementation(original)


@pytest.mark.parametrize("scoring", ["exact", "minmax"])
@pytest.mark.parametrize("stamping", [{"alpha": 1e-2}, {"top_ratio": 0.5}], ids=str)
def test_prefill_in_chunks_and_a_second_turn(stamping, scoring):
    """Input tokens after the first forward are pinned, attended causally, and stamp decode pages."""
    model = tiny_model()
    torch.manual_seed(3)
    sizes = [10, 7, *[1] * 70, 13, *[1] * 50, 6, *[1] * 30]
    tokens = torch.randint(1, 97, (2, sum(sizes)))
    mask = torch.ones_like(tokens)
    mask[0, :12] = 0  # the whole first chunk and two of the second
    mask[1, 87:90] = 0  # the second turn is padded for the other row
    settings = {"page_size": 4, "min_decode_pages": 2, "scoring": scoring, **stamping}
    caches = RaaSCache(48, **settings), OracleCache(48, **settings)
    forward_both(model, caches, tokens.split(sizes, dim=1), mask)
    for layer, row, head in itertools.product(range(2), range(2), range(2)):
        assert resident_set(caches[0], layer, row, head) == caches[1].resident_set(layer, row, head)
    assert caches[0].evicted_pages(0).min() > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 1e-2},
        {"top_ratio": 0.5},
        {"alpha": 1e-2, "scoring": "minmax", "granularity": "layer"},
        {"top_ratio": 0.5, "scoring": "minmax"},
    ],
    ids=str,
)
def test_triton_kernels(settings, monkeypatch):
    """In the interpreter where there is no GPU: small, for a program costs milliseconds there."""
    pytest.importorskip("triton")
    use_engine(monkeypatch, "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(layers=1, dtype=torch.float32).to(device)
    inputs = {name: tensor.to(device) for name, tensor in prompt(2, 9, (2, 0)).items()}
    evicted, _ = compare(model, inputs, 60, budget=24, page_size=4, min_decode_pages=2, **settings)
    assert evicted == 11


@pytest.mark.parametrize("name", ["youtu", "gemma2", "gpt_oss", "gemma3n_text"])
def test_triton_kernels_on_a_latent_a_cap_sinks_and_shared_kv(name, monkeypatch):
    """What the model gives reaches the kernels as it left the model: an expanded latent's values are a strided view."""
    pytest.importorskip("triton")
    use_engine(monkeypatch, "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(name, torch.float32).to(device)
    inputs = {name: tensor.to(device) for name, tensor in prompt(2, 9, (2, 0)).items()}
    cache = RaaSCache(24, page_size=4, min_decode_pages=2, alpha=0.1)
    # A step that is compiled on a GPU would keep the engine that it was compiled with.
    eagerly = {"sample": False, "disable_compile": True}
    tokens = generate(model, inputs, cache, 40, **eagerly)
    use_engine(monkeypatch, "torch")
    other = RaaSCache(24, page_size=4, min_decode_pages=2, alpha=0.1)
    assert torch.equal(generate(model, inputs, other, 40, **eagerly), tokens)
    assert torch.equal(*(held.resident_positions(1).sort(-1).values for held in (cache, other)))
    assert cache.evicted_pages(1).min() >= 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_and_torch_engines_generate_alike(dtype, monkeypatch):
    model = tiny_model(head_dim=64, dtype=dtype, sharp=False).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompt(4, 50, (0, 9, 40, 17)).items()}
    results = []
    for engine in ("torch", "triton"):
        use_engine(monkeypatch, engine)
        cache = RaaSCache(256, alpha=5e-3)
        with torch.no_grad():
            logits = [model(**inputs, past_key_values=cache).logits[:, -1]]
            for step in range(600):
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step + 1), value=1)
                token = torch.full((4, 1), 1 + step % 90, device="cuda")
                logits.append(model(token, attention_mask=mask, past_key_values=cache).logits[:, -1])
        results.append((torch.stack(logits).double(), cache.evicted_pages(0), cache.resident_positions(0)))
    (expected, evicted, held), (logits, triton_evicted, triton_held) = results
    assert ((logits - expected).norm() / expected.norm()).item() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(evicted, triton_evicted) and evicted.min() > 20
    if dtype == torch.float32:
        assert torch.equal(held.sort(-1).values, triton_held.sort(-1).values)
