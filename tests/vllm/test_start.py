"""What vLLM cannot serve with rows is refused when it starts, with the name of the option."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DeepseekV3Config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from raas_cache.serving.vllm import register
from raas_cache.serving.vllm.layer_rows import LayerRows
from raas_cache.serving.vllm.refusals import check_config, check_layer
from raas_cache.serving.vllm.settings import RowSettings, current

from ..helpers import tiny_model
from .engines import answers, requests


@pytest.fixture
def environment(monkeypatch):
    """Sets `RAAS_` variables for one test."""
    current.cache_clear()
    yield lambda **variables: [monkeypatch.setenv(f"RAAS_{name}", value) for name, value in variables.items()]
    current.cache_clear()


def test_without_a_budget_vllm_stays_as_it_is(monkeypatch):
    for member in AttentionBackendEnum:
        member.clear_override()
    monkeypatch.delenv("RAAS_BUDGET", raising=False)
    register()
    assert not any(member.is_overridden() for member in AttentionBackendEnum)


def test_the_log_says_what_is_on(environment, caplog):
    environment(BUDGET="1024", METHOD="h2o", OPTIONS='{"page_size": 32}')
    with caplog.at_level("INFO", logger="vllm.raas_cache"):
        register()
    (line,) = [record.message for record in caplog.records if record.name == "vllm.raas_cache"]
    assert 'budget 1024, method h2o, options {"page_size": 32}; longest prompt: 768 tokens' in line


def test_a_gpu_needs_an_option(environment, monkeypatch, caplog):
    AttentionBackendEnum.CPU_ATTN.clear_override()
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    environment(BUDGET="1024")
    with caplog.at_level("INFO", logger="vllm.raas_cache"):
        register()
    assert AttentionBackendEnum.CUSTOM.get_class().get_name() == "CUSTOM"
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
    assert "It has no effect without --attention-backend CUSTOM." in caplog.text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BUDGET": "many"}, "RAAS_BUDGET='many' must be a number of tokens"),
        ({"BUDGET": "0"}, "budget=0 must be positive"),
        ({"BUDGET": "64", "METHOD": "rass"}, "did you mean 'raas'?"),
        ({"BUDGET": "64", "METHOD": "quest"}, "RAAS_METHOD=quest: this method never evicts"),
        ({"BUDGET": "64", "METHOD": "triattention"}, "RAAS_METHOD=triattention: this method needs the rotary"),
        ({"BUDGET": "64", "MAX_PROMPT": "-1"}, "RAAS_MAX_PROMPT=-1 must be a number of tokens"),
        ({"BUDGET": "64", "MAX_PROMPT": "1.5"}, "RAAS_MAX_PROMPT=1.5 must be a number of tokens"),
        ({"BUDGET": "64", "OPTIONS": "page_size=16"}, "RAAS_OPTIONS='page_size=16' must be a JSON object"),
        ({"BUDGET": "64", "OPTIONS": '{"pages": 16}'}, "has no option 'pages'"),
        ({"BUDGET": "64", "OPTIONS": '{"kv_dtype": "int8"}'}, "RAAS_OPTIONS has 'kv_dtype'"),
    ],
)
def test_variables_that_cannot_be_used(environment, variables, message):
    environment(**variables)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        register()


DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculative_config": DRAFTS}, "--speculative-config"),
        ({"kv_transfer_config": TRANSFER}, "--kv-transfer-config"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 4}, "--decode-context-parallel-size"),
    ],
    ids=str,
)
def test_options_of_vllm_that_rows_do_not_support(folder, options, named):
    check_config(EngineArgs(folder, skip_tokenizer_init=True, tensor_parallel_size=2).create_engine_config())
    config = EngineArgs(folder, skip_tokenizer_init=True, **options).create_engine_config()
    with pytest.raises(ValueError, match=named):
        check_config(config)


def test_vllm_does_not_start_with_a_quantized_cache(folder, engines):
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8 is not supported with RAAS_BUDGET"):
        engines.start(folder, kv_cache_dtype="fp8")


def test_shares_for_another_number_of_heads():
    settings = RowSettings(32, options={"page_size": 4, "shares": [[0.5, 1.5]]})
    with pytest.raises(ValueError, match="RAAS_OPTIONS: shares has 2 entries for a layer, but a process has 1"):
        settings.slots(kv_heads=1, block_size=16)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (0, [0.5], "ALiBi"), (1, 128, "a sliding window"), (2, "fp8", "--kv-cache-dtype fp8"),
        (3, "encoder_only", "'encoder_only'"), (4, "layers.0", "the KV cache of another layer"),
    ],
)  # fmt: skip
def test_layers_that_rows_do_not_support(place, value, named):
    plain = [None, None, "auto", "decoder", None]
    check_layer(*plain)
    plain[place] = value
    with pytest.raises(ValueError, match=named):
        check_layer(*plain)


def test_a_latent_is_refused(engines, tmp_path):
    sizes = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    model = tiny_model(cls=DeepseekV3Config, first_k_dense_replace=2, kv_heads=4, dtype=torch.float32, **sizes)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("RAAS_BUDGET: this model caches a latent (MLA)")):
        engines.start(str(tmp_path))


def test_memory_that_is_not_one_piece():
    memory = torch.zeros(3, 2, 32, 20)[..., :16]
    settings = RowSettings(32, options={"page_size": 4})
    with pytest.raises(ValueError, match="vLLM pads the rows of this model"):
        LayerRows(settings.layer(0), memory, 8, 8, settings)


def test_a_row_that_has_lost_its_request_is_noticed(folder, engines):
    engine = engines.start(folder)
    answers(engine, requests(2))
    model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    attention = model.model.layers[0].self_attn.attn.impl
    with pytest.raises(RuntimeError, match=r"Row 1 holds a sequence of .* tokens, but vLLM has computed 9999"):
        attention.rows._check(1, 9999)


def test_tokens_of_an_image_that_see_each_other(folder):
    config = EngineArgs(folder, skip_tokenizer_init=True).create_engine_config()
    config.model_config = SimpleNamespace(is_mm_prefix_lm=True)
    with pytest.raises(ValueError, match="the tokens of an image see each other"):
        check_config(config)
