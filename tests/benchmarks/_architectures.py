"""Small random models of dense, sparse, windowed and recurrent architectures.

They have two to four blocks.
"""

from typing import Any

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 192}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {**_GROUPED, "sliding_window": 8}
_EXPERTS = {
    **_GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_SSM = {
    **_GROUPED,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_DELTA = {
    **_GROUPED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # dense
    "gpt2": _OLD,
    "gpt_neox": {},
    "gptj": {**_OLD, "rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 192},
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "cohere": _GROUPED,
    "stablelm": _GROUPED,
    "smollm3": _GROUPED,
    "diffllama": _GROUPED,
    # mixtures of experts, latent attention
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 192,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    # windows
    "mistral": _WINDOW,
    "gemma2": {**_WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": _WINDOW,
    "gpt_oss": {**_EXPERTS, "sliding_window": 8},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 8,
        "intermediate_size": 64,
    },
    "gemma3n_text": {
        **_WINDOW,
        "num_hidden_layers": 3,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 3,
        "intermediate_size": [64] * 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "llama4_text": {**_EXPERTS, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
    # recurrent and hybrid
    "mamba": {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
    "mamba2": {
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 8,
    },
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 192},
    "recurrent_gemma": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "lfm2": {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "bamba": {**_SSM, "attn_layer_indices": [1]},
    "jamba": {
        "num_key_value_heads": 2,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "granitemoehybrid": {
        **_EXPERTS,
        **_SSM,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "use_mem_rope": False,
    },
    "falcon_h1": {**_SSM, "mamba_d_ssm": 64},
    "zamba": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },  # two hybrid layers: they share weights
    "kimi_linear": {
        **_EXPERTS,
        **_LATENT,
        "q_lora_rank": None,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    # 64: its least
    "xlstm": {
        "hidden_size": 64,
        "num_heads": 4,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0,
        "chunk_size": 8,
    },
}


def random_model(kind: str, *, vocabulary: int, seed: int = 0, **changes: Any) -> Any:
    """Return a random model of an architecture.

    Its weights are so wide that no two answers are nearly as likely.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, **{**_SIZES, **ARCHITECTURES[kind], "vocab_size": vocabulary, **changes}
    )
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.15
    return AutoModelForCausalLM.from_config(config).eval()
