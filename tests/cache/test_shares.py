"""Shares of the decode pages: for each layer, and for each KV head."""

import json
import re

import pytest
import torch
from transformers import DynamicCache

from raas_cache import DenseCache, H2OCache, RaaSCache, from_name, record
from raas_cache.cache.shares_file import write_shares

from ..helpers import generate, prompt, tiny_model


PAGE = 4
BY_HEAD = [[1.5, 0.5], [0.5, 1.5]]


def cache(shares=None, method="raas", budget=64, **options):
    return from_name(method, budget, page_size=PAGE, shares=shares, **options)


def read(model, ids, filled, prompt_tokens=20):
    """Logits `[tokens, batch, vocabulary]` of the tokens after the prompt, one decode step each."""
    logits = [model(ids[:, :prompt_tokens], past_key_values=filled).logits[:, -1]]
    for token in ids[:, prompt_tokens:].split(1, 1):
        logits.append(model(token, past_key_values=filled).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("method", ["raas", "window", "h2o", "streaming_llm", "rkv", "lazy_eviction", "gkv"])
@pytest.mark.parametrize("more", [{"prompt": "pin"}, {"prompt": "evict"}, {"kv_dtype": "int8"}, {"kv_dtype": "int4"}])
def test_each_head_holds_what_it_holds_alone(method, more):
    """In a model of one layer, a head's pages depend on its own share only."""
    model, ids = tiny_model(layers=1), prompt(2, 150)["input_ids"]
    ours = cache([[1.5, 0.5]], method, **more)
    read(model, ids, ours)
    for head, share in enumerate([1.5, 0.5]):
        alone = cache([share], method, **more)
        read(model, ids, alone)
        held = [sorted(row[row >= 0].tolist()) for row in ours.resident_positions(0)[:, head]]
        assert held == [sorted(row[row >= 0].tolist()) for row in alone.resident_positions(0)[:, head]]
        assert torch.equal(ours.evicted_pages(0)[:, head], alone.evicted_pages(0)[:, head])
        assert torch.equal(ours.resident_tokens(0)[:, head], alone.resident_tokens(0)[:, head])


def test_attention_reads_each_heads_own_pages():
    """The step's output equals attention over the tokens that each KV head holds."""
    model, ids = tiny_model(layers=1, dtype=torch.float64), prompt(1, 120)["input_ids"]
    ours, dynamic = cache([[1.5, 0.5]]), DynamicCache()
    logits = read(model, ids, ours)[-1]
    positions = ours.resident_positions(0)  # before any other step
    kept = torch.stack([torch.isin(torch.arange(120), head) for head in positions[0]])  # [kv_heads, tokens]
    attention = model.model.layers[0].self_attn
    groups = attention.num_key_value_groups
    bias = torch.zeros(1, len(kept) * groups, 1, 120, dtype=torch.float64)
    bias.masked_fill_(~kept.repeat_interleave(groups, 0)[None, :, None], float("-inf"))
    model(ids[:, :-1], past_key_values=dynamic)
    expected = model(ids[:, -1:], past_key_values=dynamic, attention_mask=bias).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_equal_shares_change_nothing():
    model, inputs = tiny_model(), prompt(2, 20, (5, 0))
    plain = generate(model, inputs, cache(), 120)
    assert torch.equal(plain, generate(model, inputs, cache([1, [1.0, 1.0]]), 120))
    assert not torch.equal(plain, generate(model, inputs, cache(BY_HEAD), 120))


def test_nothing_evicted_equals_dynamic():
    model, inputs = tiny_model(), prompt(2, 20, (5, 0))
    ours = generate(model, inputs, cache(BY_HEAD, budget=512), 60)
    assert torch.equal(ours, generate(model, inputs, DynamicCache(), 60))


def test_the_bytes_are_those_of_equal_shares():
    model, inputs = tiny_model(), prompt()
    plain, by_head, by_layer = cache(), cache(BY_HEAD), cache([1.5, 0.5])
    for each in (plain, by_head, by_layer):
        generate(model, inputs, each, 120)
    assert plain.nbytes == by_head.nbytes == by_layer.nbytes
    # The prompt has 5 pages of 4 tokens, and leaves 11 pages: 16 for the first head, 6 for the second.
    assert by_head.evicted_pages(0)[0].tolist() == [30 - 16, 30 - 6]


@pytest.mark.parametrize("method", ["raas", "rkv"])
def test_a_row_gives_what_it_gives_alone(method):
    model, inputs = tiny_model(), prompt(3, 24, (9, 0, 4))
    together = generate(model, inputs, cache(BY_HEAD, method), 100, sample=False)
    for row, padding in enumerate((9, 0, 4)):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, padding:]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        single = generate(model, alone, cache(BY_HEAD, method), 100, sample=False)
        assert torch.equal(together[row, 24:], single[0, 24 - padding :])


def test_beams_and_assisted_decoding():
    model, inputs = tiny_model(), prompt(1, 20)
    beams = generate(model, inputs, cache(BY_HEAD, budget=512), 40, num_beams=3)
    assert torch.equal(beams, generate(model, inputs, DynamicCache(), 40, num_beams=3))
    plain = generate(model, inputs, cache(BY_HEAD), 100, sample=False)
    looked_up = generate(model, inputs, cache(BY_HEAD), 100, sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)


def test_crop_takes_tokens_back():
    model, ids = tiny_model(), prompt(2, 130)["input_ids"]
    ours, straight = cache(BY_HEAD), cache(BY_HEAD)
    for each in (ours, straight):
        each.activate_past_recording()
        model(ids[:, :20], past_key_values=each)
    for token in ids[:, 20:110].split(1, 1):
        for each in (ours, straight):
            model(token, past_key_values=each)
            each.crop(0)
    model(ids[:, 110:116], past_key_values=ours)
    ours.crop(-6)
    for token in ids[:, 116:].split(1, 1):
        expected = model(token, past_key_values=straight).logits
        assert torch.equal(model(token, past_key_values=ours).logits, expected)


def test_a_compiled_step_is_one_graph():
    model, ids = tiny_model(), prompt(2, 100)["input_ids"]
    ours, eager = cache(BY_HEAD), cache(BY_HEAD)
    ours.preallocate()
    expected = read(model, ids, eager)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = [model(ids[:, :20], past_key_values=ours).logits[:, -1]]
        for token in ids[:, 20:].split(1, 1):
            logits.append(compiled(token, past_key_values=ours).logits[:, -1])
    torch.testing.assert_close(torch.stack(logits), expected)


def test_rows_that_start_at_different_steps():
    model, first, second = tiny_model(), prompt(1, 20)["input_ids"], prompt(1, 13, seed=3)["input_ids"]
    ours, alone = cache(BY_HEAD), cache(BY_HEAD)
    expected = read(model, torch.cat([second, first], 1), alone, 13)
    with ours.admit(0, batch_size=2):
        model(first, past_key_values=ours)
    with ours.admit(1):
        logits = [model(second, past_key_values=ours).logits[:, -1]]
    for token in first.split(1, 1):
        step = token.expand(2, 1)
        logits.append(model(step, position_ids=ours.seen_tokens[:, None], past_key_values=ours).logits[1:, -1])
    torch.testing.assert_close(torch.stack(logits), expected)


def test_layers_of_one_share_can_be_recorded():
    model, by_layer = tiny_model(), cache([1.5, 0.5])
    with record(by_layer) as recording:
        generate(model, prompt(), by_layer, 60)
    assert set(recording.layers) == {0, 1}
    by_head, alone = cache([1.0, [1.5, 0.5]]), cache([1.0, [1.5, 0.5]])
    message = r"shares differ between the KV heads of layer 1, which raas_cache\.record cannot show"
    with pytest.raises(ValueError, match=message), record(by_head):
        raise AssertionError("the block must not run")
    with record(by_head, layers=[0]) as recording:
        generated = generate(model, prompt(), by_head, 60)
    assert recording.recorded == [0]
    assert torch.equal(generated, generate(model, prompt(), alone, 60))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: RaaSCache(64, shares=1.0), TypeError, "must be a list with one entry per layer"),
        (lambda: RaaSCache(64, shares=[]), TypeError, "must be a list with one entry per layer"),
        (lambda: RaaSCache(64, shares=[1.0, 0]), ValueError, r"shares\[1\]=0 must be a positive number"),
        (lambda: RaaSCache(64, shares=[[1.0, float("nan")]]), ValueError, r"shares\[0\]=.* must be a positive number"),
        (lambda: DenseCache(64, shares=[1.0]), ValueError, "DensePolicy never evicts, so there is nothing to share"),
        (lambda: H2OCache(64, shares=BY_HEAD, granularity="layer"), ValueError, "granularity='layer' evicts the same"),
    ],
)
def test_refusals(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_shares_for_another_model():
    model = tiny_model()
    with pytest.raises(ValueError, match="shares has 1 entries, but the model has a layer 1"):
        generate(model, prompt(), cache([1.0]), 10)
    with pytest.raises(ValueError, match="shares has 3 entries for a layer, but the layer stores 2 KV heads"):
        generate(model, prompt(), cache([[1.0, 2.0, 0.5]] * 2), 10)


class TestFiles:
    def test_a_file_gives_the_same_cache(self, tmp_path):
        file = tmp_path / "shares.json"
        write_shares(file, BY_HEAD, {"model": "tiny", "budget": 64, "prompt": 20, "page_size": PAGE})
        assert json.loads(file.read_text()) == {
            "model": "tiny", "budget": 64, "prompt": 20, "page_size": 4, "shares": BY_HEAD,
        }  # fmt: skip
        model, inputs = tiny_model(), prompt()
        expected = generate(model, inputs, cache(BY_HEAD), 100)
        for path in (file, str(file)):
            assert torch.equal(generate(model, inputs, cache(path), 100), expected)

    def test_missing(self, tmp_path):
        with pytest.raises(
            ValueError,
            match=r"shares='.*none\.json' does not exist: write .*raas-cache shares --model .*--out .*none\.json",
        ):
            cache(tmp_path / "none.json")

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[[1.0]]", b'{"shares": 1}', b'{"shares": []}', b"\xff\xfe", b"[" * 100_000]
    )
    def test_damaged(self, tmp_path, content):
        file = tmp_path / "shares.json"
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"shares='.*shares\.json' is not a file of shares \(.+\): write it again with"
        ):
            cache(file)

    def test_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is not a file of shares"):
            cache(tmp_path)

    def test_wrong_numbers_are_refused_as_in_a_list(self, tmp_path):
        file = tmp_path / "shares.json"
        file.write_text('{"shares": [[1.0, -1.0]]}')
        with pytest.raises(ValueError, match=r"shares\[0\]=.* must be a positive number"):
            cache(file)


def test_jupyter_shows_the_groups():
    model = tiny_model()
    by_head = cache([[1.5, 0.5], [1.0, 1.0]], config=model.config)
    assert "layer 0: HeadGroupsLayer, no pages" in by_head._repr_html_()
    generate(model, prompt(), by_head, 120)
    lines = re.sub(r"<[^>]*>", "", by_head._repr_html_().replace("</div>", "\n")).splitlines()
    found = [line.partition(";")[0] for line in lines if line.startswith("layer")]
    # The prompt has 5 pages of 4 tokens, and leaves 11 pages: 16 for the first head, 6 for the second.
    held = by_head.resident_tokens(0)[0].tolist()
    assert found == [
        f"layer 0, KV head 0: {held[0]} of 139 tokens held, budget 64, share 1.5",
        f"layer 0, KV head 1: {held[1]} of 139 tokens held, budget 64, share 0.5",
        f"layer 1: {by_head.resident_tokens(1).max()} of 139 tokens held, budget 64",
    ]
    assert "5 pinned" in by_head._repr_html_() and "16 evictable" in by_head._repr_html_()
