"""Every decoder that `AutoModelForCausalLM.from_config` builds, as a tiny random model.

`ARCHITECTURES` and `LEFT_OUT` together name each key of transformers 5.24's `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` once.
A listed architecture generates from a left-padded batch with `past_key_values=DynamicCache(config=model.config)`, and
the keys and values end up in that cache.
"""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .tiny_settings import PART, TINY


FULL_ONLY = {"sliding_window": None}
SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR_FULL = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
LINEAR_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2}
CONV_FULL = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
# The later layers read the keys and values of the earlier ones.
SHARED_LAYERS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Latent attention makes one key per query head.
MLA = {"num_key_value_heads": 4}
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "unpadded_vocab_size": 97,
    "rel_extent": 64,
}
ARCHITECTURES: dict[str, dict] = {
    "afmoe": SLIDING_FULL,
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {},
    "aria_text": {},
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": MLA | LINEAR_FULL,
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "bart": {},
    "beam": {},
    "bert": {},
    "bert-generation": {},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "biogpt": {},
    "bitnet": {},
    "blenderbot": {},
    "blenderbot-small": {},
    "bloom": {},
    "camembert": {},
    "codegen": {},
    "cohere": {},
    "cohere2": SLIDING_FULL,
    "cohere2_moe": SLIDING_FULL,
    "cohere_compass_text": SLIDING_FULL
    | {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in SLIDING_FULL["layer_types"]
        }
    },
    # Puts a prompt of its own, of 32 tokens, before the text: the cache is that much longer.
    "cpmant": {"dim_head": 8, "dim_ff": 37, "init_std": 1.0},
    "ctrl": {"dff": 37},
    "cwm": SLIDING_FULL,
    "data2vec-text": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe"] * 3,
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "diffllama": {},
    "doge": FULL_ONLY,
    "dots1": SLIDING_FULL,
    "dots3_note_text": MLA
    | SLIDING_FULL
    | {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    # A loop writes to copies of the cache's layers that the model appends.
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_loops": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "electra": {},
    "emu3": {"text_config": PART},
    "ernie": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": SLIDING_FULL,
    "exaone_moe": SLIDING_FULL,
    "falcon": {},
    "falcon_h1": {},
    "flex_olmo": {},
    "flint": SLIDING_FULL,
    "fuyu": {"text_config": PART},
    "gemma": {},
    "gemma2": SLIDING_FULL,
    "gemma3_text": SLIDING_FULL,
    "gemma3n_text": SHARED_LAYERS | {"laurel_rank": 8},
    "gemma4_text": SHARED_LAYERS | {"global_head_dim": 16},
    "gemma4_unified_text": SLIDING_FULL | {"global_head_dim": 16},
    "git": {"vision_config": PART},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "got_ocr2": {
        "text_config": PART,
        "vision_config": PART | {"output_channels": 8, "image_size": 64, "mlp_dim": 16},
    },
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": SLIDING_FULL,
    "gptj": {},
    "granite": {},
    "granite_swa": SLIDING_FULL,
    "granitemoe": {},
    "granitemoe_swa": SLIDING_FULL,
    "granitemoehybrid": LINEAR_FULL,
    "granitemoeshared": {},
    "helium": {},
    # Counts its layers anew in each cycle: this makes 6.
    "hrm_text": {"num_hidden_layers": 1, "L_cycles": 2},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": MLA,
    "hyperclovax": {},
    "inkling2_loop_text": INKLING
    | {"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2}
    | {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "n_layers_per_attn_res_block": 1},
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": MLA | LINEAR_FULL,
    "kolibri1": SLIDING_FULL,
    "laguna": SLIDING_FULL,
    "lara_mini": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "lfm2": CONV_FULL,
    "lfm2_moe": CONV_FULL,
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama": {},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layer_interval": 2,
        "intermediate_size_mlp": 37,
    },
    # Each of its layers attends twice, so the cache has 4.
    "longcat_flash": MLA | {"num_layers": 2, "ffn_hidden_size": 37, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "marian": {},
    "mbart": {},
    "megatron-bert": {},
    "mellum": SLIDING_FULL,
    "mimo_v2_flash": SLIDING_FULL,
    "minicpm3": MLA,
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "dense_intermediate_size": 37,
        "index_n_heads": 2,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "ministral": SLIDING_FULL,
    "ministral3": FULL_ONLY,
    "mistral": {},
    "mixtral": FULL_ONLY,
    # Without an image its cross-attention layer is skipped, and leaves its layer of the cache empty.
    "mllama": {"text_config": PART | {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 32},
    # Its mask has no window: a small one would only make the cache lose tokens.
    "moshi": {"sliding_window": 4096, "ffn_dim": 38},
    "moss_transcribe_diarize": {"text_config": PART, "audio_config": PART},
    "mpt": {},
    "mvp": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING_FULL,
    "olmo_hybrid": LINEAR_FULL,
    "olmoe": {},
    "opt": {},
    "pegasus": {},
    "persimmon": {},
    "phi": {},
    "phi3": FULL_ONLY,
    "phi4_multimodal": FULL_ONLY
    | {
        "vision_config": PART,
        "audio_config": PART
        | {
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "phimoe": FULL_ONLY,
    "plbart": {},
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 256,  # each forward pass makes tables of this size squared
    },
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": LINEAR_FULL,
    "qwen3_5_text": LINEAR_FULL,
    "qwen3_moe": {"use_sliding_window": False},
    "qwen3_next": LINEAR_FULL,
    "qwen4_exp_text": LINEAR_FULL
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {
        "pronunciation_vocab_size": 97,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 97,
        "shape_embed_dim": 8,
    },
    "roformer": {},
    "sarvam_mla": MLA,
    "sarvam_moe": {},
    "seed_oss": {},
    "smollm3": SLIDING_FULL | {"no_rope_layer_interval": 2},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": FULL_ONLY,
    "trocr": {},
    "vaultgemma": SLIDING_FULL,
    "whisper": {},
    "xglm": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xmod": {"default_language": "en_XX"},
    "youtu": MLA,
    "zamba": LINEAR_HYBRID | {"attention_head_dim": 16},
    "zamba2": LINEAR_HYBRID | {"chunk_size": 8},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "router_hidden_size": 16},
}
LEFT_OUT: dict[str, str] = {
    "blt": "DynamicCache(config=...) finds no num_hidden_layers, and the model wraps the cache in a class of its own",
    "dots3_note": "its text model is listed as dots3_note_text",
    "falcon_mamba": "no KV cache: a pure state-space model",
    "gemma3": "its text model is listed as gemma3_text",
    "gemma3n": "its text model is listed as gemma3n_text",
    "gemma4": "its text model is listed as gemma4_text",
    "gemma4_assistant": "no KV cache of its own: drafts from the keys and values of another model",
    "gemma4_unified": "its text model is listed as gemma4_unified_text",
    "gemma4_unified_assistant": "no KV cache of its own: drafts from the keys and values of another model",
    "gpt-sw3": "the same config and model classes as gpt2",
    "llama4": "its text model is listed as llama4_text",
    "mamba": "no KV cache: a pure state-space model",
    "mamba2": "no KV cache: a pure state-space model",
    "minimax": "refuses every cache but its own MiniMaxCache",
    "musicgen": "from_config fails: the decoder needs its own config class, which the mapping does not name",
    "musicgen_melody": "from_config fails: the decoder needs its own config class, which the mapping does not name",
    "openai-gpt": "no KV cache: takes no past_key_values",
    "qwen3_5": "its text model is listed as qwen3_5_text",
    "qwen3_5_moe": "its text model is listed as qwen3_5_moe_text",
    "qwen4_exp": "its text model is listed as qwen4_exp_text",
    "reformer": "needs its own ReformerDynamicCache of hash buckets and hidden states",
    "rwkv": "no KV cache: a recurrent state, and the passed cache stays empty",
    "xlm": "no KV cache: takes no past_key_values",
    "xlnet": "takes tuples of hidden states (mems) instead of a cache",
    "xlstm": "no KV cache: a recurrent state",
}
# Parts of the names of the weights that make queries and keys
SHARPENED = ("q_proj", "k_proj", "qkv", "query", "key", "c_attn", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj")


def names() -> list[str]:
    """The listed architectures that the installed transformers has."""
    return [name for name in ARCHITECTURES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def require(name: str) -> None:
    """Skip the test where the installed transformers is older than the architecture."""
    if name not in names():
        pytest.skip(f"transformers has {name} only since a later release")


def tiny_config(name):
    config_class = CONFIG_MAPPING[name]
    fields = {field.name for field in dataclasses.fields(config_class)}

    def own_names(settings):
        return {key if key in fields else config_class.attribute_map.get(key, key): settings[key] for key in settings}

    shared = {key: value for key, value in own_names(TINY).items() if key in fields}
    return config_class(**shared | own_names(ARCHITECTURES[name]))


def build(name, dtype=torch.float32, seed=0):
    """The model in eval mode, with attention that has clear favourites, as a trained model's has."""
    torch.manual_seed(seed)
    # The default experts have no kernel for float64.
    model = AutoModelForCausalLM.from_config(tiny_config(name), experts_implementation="eager").to(dtype).eval()
    # Plain greedy generation to the full length, without the forced or suppressed tokens some configs ask for.
    model.generation_config = GenerationConfig(pad_token_id=0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and any(part in parameter_name for part in SHARPENED):
                parameter.mul_(2)
    return model
