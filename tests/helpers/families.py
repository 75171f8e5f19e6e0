"""Tiny random models of many architecture families, by transformers' configurations.

They have four blocks (or what a family needs) and a width of 32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCKS = 4
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
OLDER = {
    "vocab_size": 1024,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

# family -> (model type, what differs from SIZES); a model type of the older names starts from OLDER
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3, with vision": (
        "gemma3",
        {"text_config": {"sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "Gemma 3n": (
        "gemma3n_text",
        {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 1024,
            "num_kv_shared_layers": 1,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * BLOCKS,
            "intermediate_size": [64] * BLOCKS,
        },
    ),
    "Phi": ("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "Phi-3": ("phi3", {"resid_pdrop": 0.1, "original_max_position_embeddings": 1024}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {"sliding_window": 8}),
    "Granite": ("granite", {}),
    "SmolLM3": ("smollm3", {"no_rope_layer_interval": 2}),
    "StarCoder 2": (
        "starcoder2",
        {"use_bias": True, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    ),
    "StableLM": ("stablelm", {"hidden_dropout": 0.1}),
    "GLM-4": ("glm4", {}),
    "Nemotron": ("nemotron", {}),
    "EXAONE 4": ("exaone4", {"sliding_window": 8}),
    "DiffLlama": ("diffllama", {}),
    "BitNet": ("bitnet", {}),
    "GPT-2": ("gpt2", OLDER),
    "GPT-BigCode": ("gpt_bigcode", OLDER),
    "GPT-Neo": (
        "gpt_neo",
        {
            "num_layers": BLOCKS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], BLOCKS // 2]],
            "window_size": 8,
        },
    ),
    "GPT-J": ("gptj", OLDER | {"rotary_dim": 4}),
    "CodeGen": ("codegen", OLDER | {"rotary_dim": 4}),
    "GPT-NeoX": ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.2}),
    "Bloom": (
        "bloom",
        {"n_layer": BLOCKS, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    ),
    "Falcon": (
        "falcon",
        {
            "head_dim": None,
            "new_decoder_architecture": False,
            "multi_query": True,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
    ),
    "MPT": (
        "mpt",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": BLOCKS,
            "expansion_ratio": 2,
            "max_seq_len": 1024,
        },
    ),
    "XGLM": (
        "xglm",
        {
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": BLOCKS,
            "attention_heads": 4,
            "dropout": 0.1,
            "layerdrop": 0.2,
        },
    ),
    "BioGPT": ("biogpt", {"hidden_dropout_prob": 0.1, "layerdrop": 0.2}),
    "Persimmon": ("persimmon", {}),
    "Mixtral": ("mixtral", EXPERTS | {"router_jitter_noise": 0.1}),
    "Qwen2-MoE": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    ),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [1]}),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite MoE": ("granitemoe", EXPERTS),
    "PhiMoE": ("phimoe", EXPERTS | {"input_jitter_noise": 0.1}),
    "DeepSeek-V2": ("deepseek_v2", DEEPSEEK | {"topk_method": "greedy", "norm_topk_prob": False}),
    "DeepSeek-V3": ("deepseek_v3", DEEPSEEK),
    "GLM-4-MoE": (
        "glm4_moe",
        EXPERTS
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "Llama 4": (
        "llama4_text",
        EXPERTS
        | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    ),
    "GPT-OSS": ("gpt_oss", EXPERTS | {"sliding_window": 8}),
    "ERNIE 4.5 MoE": (
        "ernie4_5_moe",
        EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "DBRX": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": BLOCKS,
            "max_seq_len": 1024,
            "ffn_config": {
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 32,
            },
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
    ),
    "Mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "Mamba 2": (
        "mamba2",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    ),
    "Falcon Mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 4}),
    "RWKV": ("rwkv", {"attention_hidden_size": 32, "context_length": 1024}),
    "LFM2": (
        "lfm2",
        {
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "Qwen3-Next": (
        "qwen3_next",
        EXPERTS
        | LINEAR
        | {
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "Bamba": ("bamba", MAMBA | {"attn_layer_indices": [1, 3]}),
    "Falcon-H1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 64}),
    "Jamba": (
        "jamba",
        EXPERTS
        | {
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "Granite MoE Hybrid": (
        "granitemoehybrid",
        MAMBA
        | EXPERTS
        | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2},
    ),
    "Zamba 2": (
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_key_value_heads": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Zamba": (
        "zamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "attention_hidden_size": 64,
            "head_dim": 16,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_key_value_heads": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Kimi Linear": (
        "kimi_linear",
        EXPERTS
        | {
            "n_shared_experts": 1,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse"] * 2,
        },
    ),
    # 64: its least
    "xLSTM": (
        "xlstm",
        {
            "hidden_size": 64,
            "num_heads": 4,
            "qk_dim_factor": 1.0,
            "v_dim_factor": 1.0,
            "chunk_size": 8,
        },
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
}


def random_family(name: str, *, seed: int = 0, spread: float = 0.1) -> Any:
    """Return a random model of a family in eval mode; `spread` is the deviation of its weights.

    Small weights would hide what a cut does.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = FAMILIES[name]
    torch.manual_seed(seed)
    if "text_config" in changes:
        settings = {**changes, "text_config": {**SIZES, **changes["text_config"]}}
    else:
        settings = {**(OLDER if changes.get("n_embd") else SIZES), **changes}
    settings = {
        key: value for key, value in settings.items() if key != "head_dim" or value is not None
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=spread)
            elif parameter.ndim == 1 and parameter.numel() > 1 and not parameter.any():
                parameter.normal_(std=spread)  # biases that start at 0 would hide being lost
    return model


def saved_family(name: str, folder: Path, **changes: Any) -> Any:
    """Save a random model of a family with the embedded tokenizer; return its checkpoint."""
    from transformers import AutoTokenizer

    from harness.models.checkpoint import describe
    from harness.models.resolve import EMBEDDED

    model = random_family(name, **changes)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "tiny").save_pretrained(folder)
    return describe(folder, name=name)
