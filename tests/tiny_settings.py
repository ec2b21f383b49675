"""The settings that make a config of any architecture tiny."""

# Enough for the parts of a composite model, and harmless to a part that has no such setting.
PART = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,  # some config classes refuse None
    "eos_token_id": None,
    "pad_token_id": 0,
    "is_decoder": True,
    # The default, 0.02, makes layers this narrow add next to nothing to the residual stream, and tied embeddings
    # then repeat the last token.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
# A config class gets those of these settings for which it has a field, directly or through its `attribute_map`.
TINY = PART | {
    # Smaller than the texts of the tests, so that it matters which tokens a layer may see.
    "sliding_window": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 16,
    "index_topk": 8,
    # Few heads would give many keys the score 0, and ties are broken differently at different lengths.
    "index_n_heads": 16,
    "index_head_dim": 16,
    # Mixture of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    # Multi-head latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # State-space and linear-attention layers
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # The common sizes under names of their own
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 37,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "ffn_dim": 37,
    "embedding_size": 32,
    "rotary_dim": 4,
    "max_seq_len": 4096,
    "init_std": 0.2,
    "query_pre_attn_scalar": 8,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "hc_mult": 2,
}
