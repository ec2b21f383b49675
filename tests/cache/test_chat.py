"""Conversations whose next text is not the last one with more behind it: `rewind`."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from raas_cache import DenseCache, H2OCache, QuestCache, RaaSCache, from_name, record, rewind

from ..architectures import build
from ..helpers import VOCAB, generate, prompt, tiny_model


SMALL = {"page_size": 4, "min_decode_pages": 2}
THINK, ANSWER = 3, 4
# Like Qwen3's: thinking is shown in the turn that is being answered, and left out of all that came before.
TEMPLATE = """
{%- set last = namespace(query=0) %}
{%- for message in messages if message.role == "user" %}{% set last.query = loop.index0 * 2 %}{% endfor %}
{%- for message in messages %}
{%- set text = message.content %}
{%- if message.role == "assistant" and loop.index0 < last.query %}{% set text = text.split("</think>")[-1] %}{% endif %}
{{- "<" + message.role + "> " + text + " " }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<assistant> <think> " }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<user>", "<assistant>", "<think>", "</think>", *(f"w{i}" for i in range(VOCAB - 5))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", chat_template=TEMPLATE, padding_side="left"
    )


@pytest.fixture(scope="module")
def model():
    return sensitive(tiny_model())


def sensitive(model):
    """A model whose every token depends on what it attends to, far away too."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("v_proj.weight", "o_proj.weight", "kv_b_proj.weight")):
                weight.mul_(20)
    return model


def ids_of(tokenizer, messages):
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    encoded = tokenizer.apply_chat_template(messages, **options)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def answer(model, inputs, cache, thinking=25, steps=40):
    """Greedy, but that thinking ends after so many tokens, and not before; returns all ids."""
    start = inputs["input_ids"].shape[1]
    words = list(range(5, VOCAB))

    def allowed(_, ids):
        return [ANSWER] if len(ids) == start + thinking else words

    return generate(model, inputs, cache, steps, sample=False, prefix_allowed_tokens_fn=allowed)


def asked(tokenizer, messages, seed, length=9):
    """The messages, and a question of so many words behind them."""
    question = prompt(length=length, seed=seed)["input_ids"][0] % (VOCAB - 5) + 5
    return [*messages, {"role": "user", "content": tokenizer.decode(question)}]


def answered(tokenizer, messages, out, inputs):
    """The messages, and what the model said, from <think> on."""
    said = out[0, inputs["input_ids"].shape[1] - 1 :]
    return [*messages, {"role": "assistant", "content": tokenizer.decode(said)}]


CACHES = {
    "raas": lambda: RaaSCache(112, alpha=0.05, **SMALL),
    "raas, everything fits": lambda: RaaSCache(512, page_size=4),
    "raas, minmax": lambda: RaaSCache(112, scoring="minmax", **SMALL),
    "raas, select": lambda: RaaSCache(48, prompt="select", **SMALL),
    "raas, int8": lambda: RaaSCache(112, kv_dtype="int8", **SMALL),
    "raas, int4": lambda: RaaSCache(112, kv_dtype="int4", **SMALL),
    "h2o": lambda: H2OCache(112, prompt="pin", **SMALL),
    "quest": lambda: QuestCache(64, page_size=4),
    "dense": lambda: DenseCache(64),
}


# QwenLM/Qwen3 #1826: the template leaves earlier thinking out, so no turn begins with the text of the turn before.
# With codes a first forward reads exact keys, and a later one their codes.
@pytest.mark.parametrize("name", sorted(CACHES.keys() - {"raas, int8", "raas, int4"}))
def test_a_template_that_drops_thinking(model, tokenizer, name):
    new_cache = CACHES[name]
    cache, messages, out = new_cache(), [], None
    for turn in range(4):
        messages = asked(tokenizer, messages, seed=turn)
        inputs = ids_of(tokenizer, messages)
        ids = inputs["input_ids"][0]
        assert ids.tolist().count(THINK) == 1 and ANSWER not in ids, "the template drops thinking"
        if out is not None:
            length = min(len(ids), out.shape[1])
            shared = int((out[0, :length] == ids[:length]).int().cumprod(0).sum())
            assert rewind(cache, out, inputs["input_ids"]) == shared == cache.get_seq_length()
            assert out[0, shared] == THINK
        out = answer(model, inputs, cache)
        assert torch.equal(out, answer(model, inputs, new_cache())), f"turn {turn}"
        messages = answered(tokenizer, messages, out, inputs)
    if name in ("raas", "raas, select", "h2o"):
        assert cache.evictions > 0


@pytest.mark.parametrize("question", [9, 30])
def test_without_rewind_a_turn_is_refused_or_wrong(model, tokenizer, question):
    """The lengths show it, or else the tokens are others: so the test above can fail."""
    messages = asked(tokenizer, [], seed=0)
    inputs = ids_of(tokenizer, messages)
    cache = RaaSCache(512)
    out = answer(model, inputs, cache)
    seen = cache.get_seq_length()
    messages = asked(tokenizer, answered(tokenizer, messages, out, inputs), seed=1, length=question)
    inputs = ids_of(tokenizer, messages)
    if inputs["input_ids"].shape[1] <= seen:
        with pytest.raises(ValueError, match=rf"the cache has seen {seen}: .* call raas_cache.rewind"):
            answer(model, inputs, cache)
        rewind(cache, out, inputs["input_ids"])
        assert torch.equal(answer(model, inputs, cache), answer(model, inputs, DynamicCache()))
    else:
        assert not torch.equal(answer(model, inputs, cache), answer(model, inputs, DynamicCache()))
    assert (question == 9) == (inputs["input_ids"].shape[1] <= seen)


def test_dense_cache_equals_dynamic_cache_after_rewind(model):
    first, second = two_texts()
    cache = RaaSCache(512)
    out = generate(model, first, cache, 30, sample=False)
    assert rewind(cache, out, second["input_ids"]) == 11
    assert torch.equal(
        generate(model, second, cache, 30, sample=False), generate(model, second, DynamicCache(), 30, sample=False)
    )


def test_a_batch_goes_back_to_what_every_row_shares(model):
    cache, fresh = RaaSCache(64, **SMALL), RaaSCache(64, **SMALL)
    first, second = prompt(2, 20, (6, 0)), prompt(2, 40, (6, 0), seed=1)
    second["input_ids"][0, 6:17] = first["input_ids"][0, 6:17]
    second["input_ids"][1, :13] = first["input_ids"][1, :13]
    out = generate(model, first, cache, 60, sample=False)
    assert cache.evictions > 0
    assert rewind(cache, out, second["input_ids"]) == 13
    expected = generate(model, second, fresh, 60, sample=False)
    assert torch.equal(generate(model, second, cache, 60, sample=False), expected)


@pytest.mark.parametrize("steps", [0, 1, 4, 30])
@pytest.mark.parametrize("name", CACHES)
def test_the_cache_is_as_if_it_had_read_the_beginning_alone(model, name, steps):
    """Wherever pages end, over a turn in the middle of a decode page too.

    With 4-bit codes where a page ends: keys that stay in a page count from bounds of the whole page.
    """
    new_cache = CACHES[name]
    ids = prompt(length=64)["input_ids"]
    for place in (12,) if name == "raas, int4" else (9, 12, 17):
        cache, expected = new_cache(), new_cache()
        with torch.no_grad():
            model(ids[:, :17], past_key_values=cache)
            for i in range(17, 17 + steps):
                model(ids[:, i : i + 1], past_key_values=cache)
            model(ids[:, 17 + steps : 22 + steps], past_key_values=cache)
            held = ids[:, : 22 + steps]
            other = torch.cat([held[:, :place], prompt(length=20, seed=3)["input_ids"]], 1)
            other[0, place] = (ids[0, place] + 1) % VOCAB
            assert rewind(cache, held, other) == place
            model(other[:, :place], past_key_values=expected)
            assert cache.get_seq_length() == place
            for layer in range(2):
                for slots in ("resident_positions", "resident_tokens", "evicted_pages"):
                    assert torch.equal(getattr(cache, slots)(layer), getattr(expected, slots)(layer)), slots
            for step in range(place, place + 20):
                logits = [model(other[:, step : step + 1], past_key_values=c).logits for c in (cache, expected)]
                torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
        assert cache.nbytes == expected.nbytes


def test_nothing_is_taken_back_where_the_text_goes_on(model):
    inputs = prompt(length=20)
    cache = CACHES["raas"]()
    out = generate(model, inputs, cache, 60, sample=False)
    seen, before = cache.get_seq_length(), cache.resident_positions(0)
    longer = torch.cat([out, prompt(length=5, seed=2)["input_ids"]], 1)
    assert rewind(cache, out, longer) == seen == out.shape[1] - 1
    assert torch.equal(cache.resident_positions(0), before)


def test_the_same_text_once_more(model):
    """Another answer to the same question: what is left to read counts as input, so it is two tokens."""
    inputs = prompt(length=20)
    cache = CACHES["raas"]()
    out = generate(model, inputs, cache, 60, sample=False)
    assert rewind(cache, out, inputs["input_ids"]) == 18
    assert torch.equal(generate(model, inputs, cache, 60, sample=False), out)


@pytest.mark.parametrize("length", [1, 2])
def test_a_text_too_short_to_share_anything_empties_the_cache(model, length):
    inputs = prompt(length=20)
    cache = CACHES["raas"]()
    out = generate(model, inputs, cache, 10, sample=False)
    new = {name: tensor[:, :length] for name, tensor in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewind(cache, out, new["input_ids"]) == 0
    expected = generate(model, new, CACHES["raas"](), 10, sample=False)
    assert torch.equal(generate(model, new, cache, 10, sample=False), expected)


@pytest.mark.parametrize(("recorded", "kept"), [(True, 50), (False, 20)])
def test_generated_tokens_are_kept_if_they_were_recorded(model, recorded, kept):
    inputs = prompt(length=20)
    cache = RaaSCache(256, page_size=4)
    if recorded:
        cache.activate_past_recording()
    out = generate(model, inputs, cache, 60, sample=False)
    other = torch.cat([out[:, :50], (out[:, 50:55] + 1) % VOCAB], 1)
    assert rewind(cache, out, other) == kept == cache.get_seq_length()
    new = {"input_ids": other, "attention_mask": torch.ones_like(other)}
    expected = generate(model, new, DynamicCache(), 30, sample=False)
    cache.deactivate_past_recording()
    assert torch.equal(generate(model, new, cache, 30, sample=False), expected)


def two_texts(shared=11, length=20):
    """Of `length` and 33 tokens, the first of them alike."""
    first, second = prompt(length=length), prompt(length=33, seed=1)
    second["input_ids"][0, :shared] = first["input_ids"][0, :shared]
    return first, second


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"prompt": "evict"}), ("gemma3_text", {}), ("qwen3_next", {})],
    ids=["evict", "a full window", "linear attention"],
)
def test_where_the_cache_cannot_go_back_it_is_emptied_and_says_so(name, options):
    model = build(name)
    cache, fresh = (RaaSCache(64, config=model.config, **SMALL, **options) for _ in range(2))
    first, second = two_texts()
    out = generate(model, first, cache, 30, sample=False)
    with pytest.warns(UserWarning, match="cannot go back to the 11 tokens .* reads all 33 tokens"):
        assert rewind(cache, out, second["input_ids"]) == 0
    expected = generate(model, second, fresh, 30, sample=False)
    assert torch.equal(generate(model, second, cache, 30, sample=False), expected)


def test_a_window_that_is_not_full_goes_back():
    model = build("gemma3_text")
    cache, fresh = RaaSCache(64, **SMALL), RaaSCache(64, **SMALL)
    first, second = two_texts(shared=7, length=9)
    out = generate(model, first, cache, 5, sample=False)
    assert rewind(cache, out, second["input_ids"]) == 7
    expected = generate(model, second, fresh, 30, sample=False)
    assert torch.equal(generate(model, second, cache, 30, sample=False), expected)


def test_a_latent_goes_back():
    model = sensitive(build("deepseek_v2"))
    cache, fresh = RaaSCache(64, **SMALL), RaaSCache(64, **SMALL)
    first, second = two_texts()
    out = generate(model, first, cache, 60, sample=False)
    assert cache.evictions > 0 and rewind(cache, out, second["input_ids"]) == 11
    expected = generate(model, second, fresh, 60, sample=False)
    assert torch.equal(generate(model, second, cache, 60, sample=False), expected)


def test_a_recording_forgets_what_was_taken_back(model):
    first, second = two_texts()
    cache, fresh = CACHES["raas"](), CACHES["raas"]()
    with record(cache) as recording, record(fresh) as expected:
        out = generate(model, first, cache, 30, sample=False)
        rewind(cache, out, second["input_ids"])
        for one in (cache, fresh):
            generate(model, second, one, 30, sample=False)
    assert recording.history(0, 0).steps.tolist() == expected.history(0, 0).steps.tolist()


def test_what_is_wrong_with_the_arguments(model):
    inputs = prompt(2, 20)
    cache = RaaSCache(256)
    out = generate(model, inputs, cache, 10, sample=False)
    seen = cache.get_seq_length()
    with pytest.raises(TypeError, match="must be a RaaSCache or another paged cache"):
        rewind(DynamicCache(), out, out)
    with pytest.raises(ValueError, match=r"new_ids of shape \(30,\) must be token ids of shape \[batch, tokens\]"):
        rewind(cache, out, out[0])
    with pytest.raises(ValueError, match="held_ids has 2 rows, new_ids has 1 rows"):
        rewind(cache, out, out[:1])
    with pytest.raises(ValueError, match="new_ids has 1 rows, and the cache has 2 rows: all three must be equal"):
        rewind(cache, out[:1], out[:1])
    with pytest.raises(ValueError, match="held_ids has 20 tokens, but the cache has seen 29"):
        rewind(cache, inputs["input_ids"], out)
    assert cache.get_seq_length() == seen, "nothing was taken back"


def test_an_empty_cache_stays_empty():
    cache = from_name("raas", budget=64)
    ids = prompt(length=20)["input_ids"]
    assert rewind(cache, ids[:, :0], ids) == 0
