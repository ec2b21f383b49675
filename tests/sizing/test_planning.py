"""What is planned from a config is what a run of the model allocates."""

import pytest
import torch
from transformers import DynamicCache

from raas_cache import RaaSCache, embedded_model
from raas_cache.bench.filling import load_config, read_config
from raas_cache.cache.paged_layer import PagedLayer
from raas_cache.common.measure import kv_nbytes
from raas_cache.sizing.plan import Plan, largest_budget, plan

from ..architectures import build, tiny_config
from ..helpers import generate, prompt, refused


LLAMA = load_config("llama-3-8b")


def test_llama_3_8b():
    """32 layers, 8 KV heads of 128: 4.3 GB and 68.7 GB in bfloat16, as README has them."""
    assert plan(LLAMA, 2048, batch_size=16) == Plan(
        nbytes=4_294_967_296,
        dynamic_nbytes=68_719_476_736,
        bytes_per_token=2_097_152,
        saves_from=2049,
        decode_tokens=2048 - 256,
        is_over_budget=False,
        paged_layers=32,
        layers=32,
    )
    assert plan(LLAMA, 2048, batch_size=16).ratio == 16


def test_int8_takes_a_byte_each_and_a_scale_a_token():
    planned = plan(LLAMA, 2048, kv_dtype="int8")
    assert planned.nbytes == 2 * 32 * 8 * 2048 * (128 + 4)
    assert planned.dynamic_nbytes == 2 * 32 * 8 * 32_768 * 128 * 2, "in the model's dtype"
    assert planned.saves_from == 1057


@pytest.mark.parametrize(("page_size", "ratio"), [(16, 0.324), (32, 0.297)])
def test_int4_takes_less_than_a_third(page_size, ratio):
    """Half a byte each; two bounds in bfloat16 for each channel of a page of keys, and for each value; an open page."""
    pages = 2048 // page_size
    keys = 2048 * 64 + 2 * pages * 128 * 2 + page_size * 128 * 2
    planned = plan(LLAMA, 2048, kv_dtype="int4", page_size=page_size)
    assert planned.nbytes == 32 * 8 * (keys + 2048 * (64 + 4))
    assert planned.nbytes / plan(LLAMA, 2048, page_size=page_size).nbytes == pytest.approx(ratio, abs=0.001)


def test_int4_of_a_latent_is_refused():
    with pytest.raises(ValueError, match="kv_dtype='int4' does not support models that cache a latent"):
        plan(tiny_config("deepseek_v3"), 1024, kv_dtype="int4")


# Grouped heads, a latent, a window beside full attention, linear attention in other layers and in the same ones.
NAMES = ["llama", "deepseek_v3", "gemma3_text", "qwen3_next", "falcon_h1"]
PLANNED = [
    (64, {}),
    ([64, 40, 48, 96], {}),
    (64, {"kv_dtype": "int8"}),
    (64, {"page_size": 8, "min_decode_pages": 5}),
    (16, {}),
    (16, {"prompt": "select"}),
    (16, {"prompt": "evict"}),
]
PACKED = [(name, 64, {"kv_dtype": "int4"}) for name in NAMES if name != "deepseek_v3"]  # which caches a latent


@pytest.mark.parametrize(
    ("name", "budget", "options"), [*((name, *case) for name in NAMES for case in PLANNED), *PACKED], ids=str
)
@pytest.mark.filterwarnings("ignore:budget=16 leaves")
def test_plan_is_what_a_run_allocates(name, budget, options):
    model, options = build(name), {"page_size": 4, "min_decode_pages": 3, **options}
    cache, dynamic = RaaSCache(budget, config=model.config, **options), DynamicCache(config=model.config)
    for each in (cache, dynamic):
        generate(model, prompt(3, 21), each, 60, sample=False)

    planned = plan(
        tiny_config(name), budget, batch_size=3, prompt_tokens=21, tokens=21 + 59, dtype=torch.float32, **options
    )
    assert planned.nbytes == cache.nbytes
    assert planned.dynamic_nbytes == kv_nbytes(dynamic)
    assert planned.is_over_budget == cache.is_over_budget == (budget == 16 and options.get("prompt") != "evict")
    paged = [layer for layer in cache.layers if isinstance(layer, PagedLayer) and layer.is_initialized]
    decode_pages = (int(layer.table.counts.limit.min()) * layer.settings.page_size for layer in paged)
    assert planned.decode_tokens == min(decode_pages)
    assert (planned.paged_layers, planned.layers) == (len(paged), len(dynamic.layers))


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
def test_a_dense_cache_is_larger_from_saves_from_on(kv_dtype):
    of = {"prompt_tokens": 4, "page_size": 4, "min_decode_pages": 1, "kv_dtype": kv_dtype, "dtype": torch.float32}
    first = plan(tiny_config("gemma3_text"), 64, **of).saves_from
    at, before = (plan(tiny_config("gemma3_text"), 64, tokens=tokens, **of) for tokens in (first, first - 1))
    assert before.dynamic_nbytes <= before.nbytes and at.nbytes < at.dynamic_nbytes


def test_dtype_is_the_config_s_and_else_bfloat16():
    config = tiny_config("llama")
    in_float32 = plan(config, 512, dtype=torch.float32)
    assert plan(config, 512).nbytes == in_float32.nbytes / 2
    config.dtype = torch.float32
    assert plan(config, 512) == in_float32


def test_the_config_stays_as_it_is():
    config = tiny_config("qwen3_next")
    before = config.to_json_string()
    plan(config, 512)
    assert config.to_json_string() == before


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_largest_budget_fits_and_a_page_more_does_not(batch_size, kv_dtype):
    options = {"batch_size": batch_size, "kv_dtype": kv_dtype}
    budget = largest_budget(LLAMA, 1_000_000_000, **options)
    assert budget % 16 == 0
    assert plan(LLAMA, budget, **options).nbytes <= 1_000_000_000 < plan(LLAMA, budget + 16, **options).nbytes


def test_largest_budget_holds_no_more_than_all_tokens():
    assert largest_budget(LLAMA, 10**12, tokens=1000) == 1008


def test_largest_budget_that_cannot_be():
    least = 2 * 32 * 8 * (256 + 8 * 16) * 128 * 2
    assert largest_budget(LLAMA, least) == 256 + 8 * 16
    with pytest.raises(ValueError, match=f"nbytes={least - 1:,} is too small.* need {least:,} bytes"):
        largest_budget(LLAMA, least - 1)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("llama", {"budget": 8}, ValueError, "budget=8 is less than one page"),
        ("llama", {"budget": [64]}, ValueError, r"budget=\(64,\) has 1 entries, but the model has a layer 1"),
        ("llama", {"budget": 64.0}, TypeError, "budget=64.0 must be an int"),
        ("llama", {"batch_size": 0}, ValueError, "batch_size=0 must be positive"),
        ("llama", {"prompt_tokens": 0}, ValueError, "prompt_tokens=0 must be positive"),
        ("llama", {"tokens": 100}, ValueError, "tokens=100 includes the prompt: make it at least prompt_tokens=256"),
        ("llama", {"kv_dtype": "int2"}, ValueError, "kv_dtype='int2' is unknown"),
        ("mistral", {}, ValueError, "no layer of this 'mistral' has full attention"),
        ("bloom", {}, ValueError, "this 'bloom' cannot run a token.*did not read the paged cache"),
        ("deepseek_v32", {}, ValueError, "layer 0 of 'deepseek_v32' needs a DynamicIndexedLayer"),
        # Its experts count their tokens on the CPU: an error and no guess where a forward does not come to its end.
        ("jetmoe", {}, ValueError, "this 'jetmoe' cannot run a token.*read the cache's nbytes"),
    ],
)
def test_what_cannot_be_planned(name, options, error, message):
    with pytest.raises(error, match=message):
        plan(tiny_config(name), **{"budget": 1024, **options})


def test_read_config(tmp_path):
    assert read_config("small").num_hidden_layers == 6
    assert read_config(embedded_model()).model_type == "llama"
    (tmp_path / "config.json").write_text("{}")
    for name in (tmp_path, "nobody/nothing"):
        with pytest.raises(ValueError, match=f"model='{name}' must be one of small, llama-3-8b"):
            read_config(str(name))


def run(*options):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from raas_cache.cli import app

    return CliRunner().invoke(app, ["plan", *map(str, options)])


def rows(output):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]


def test_command():
    result = run("--model", "llama-3-8b", "--batch", "1,16", "--budget", "1024,2048")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("llama: 32 of 32 layers are paged. They cache 131,072 bytes per token in bfloat16.")
    header, _, *lines = rows(result.output)
    assert header[4] == "dynamic at 32,768" and len(lines) == 2 * 2 * 3
    assert lines[9] == ["16", "2,048", "bfloat16", "4.29 GB", "68.72 GB", "16.0", "2,049", "1,792"]
    assert lines[10][2:6] == ["int8", "2.21 GB", "68.72 GB", "31.0"]
    assert lines[11][2:6] == ["int4", "1.39 GB", "68.72 GB", "49.3"]


def test_command_finds_the_largest_budget():
    result = run("--model", "llama-3-8b", "--batch", 16, "--memory", 10)
    assert [line[1:4] for line in rows(result.output)[2:]] == [
        ["4,768", "bfloat16", "10.00 GB"],
        ["9,232", "int8", "9.98 GB"],
        ["14,848", "int4", "9.99 GB"],
    ]


def test_command_says_where_the_prompt_is_over_the_budget():
    result = run("--model", embedded_model(), "--budget", "256,1024", "--prompt", 1000, "--dtype", "bfloat16")
    assert [line[-1] for line in rows(result.output)[2::2]] == ["128 (over budget)"] * 3
    assert result.output.rstrip().endswith("raise the budget.")
    assert "Over budget" not in run("--model", embedded_model(), "--budget", 512).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nobody/nothing"], "--model"),
        (["--budget", 10], "budget=10 is less than one page"),
        (["--budget", "many"], "--budget"),
        (["--batch", "1,x"], "--batch"),
        (["--batch", 0], "batch_size=0"),
        (["--prompt", 0], "prompt_tokens=0"),
        (["--tokens", 10], "tokens=10"),
        (["--page-size", 12], "page_size=12"),
        (["--dtype", "int4"], "--dtype"),
        (["--memory", 0.001], "nbytes=1,000,000 is too small"),
        (["--memory", 1, "--budget", 512], "--budget"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, message):
    assert message in refused(run("--model", "small", *options))


def test_a_model_without_full_attention_is_refused(tmp_path):
    tiny_config("mistral").save_pretrained(tmp_path)
    assert "no layer of this 'mistral' has full attention" in refused(run("--model", tmp_path))


def test_shares_are_refused():
    with pytest.raises(
        ValueError, match=r"shares: plan takes none\. With a mean of 1 they need the bytes of equal shares"
    ):
        plan(load_config("small"), 1024, shares=[1.0])
