"""Configurations of tiny models of every family."""

from typing import Any

from mgpu.protocol.checkpoint.huggingface.borrowed import BORROWED

TINY = {
    "vocab_size": 101,  # divides by no number of ranks
    "hidden_size": 64,
    "intermediate_size": 94,  # divides by 2 but not by 4
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(family: str) -> Any:
    """Return a transformers configuration of a family, small but with all of the family's peculiarities."""
    import transformers as hf

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}
    halves = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * index for index in range(8)]}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 16, **halves}
    gemma_rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    }
    gemma4 = TINY | {
        "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7,
        "final_logit_softcapping": 1.5, "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    small = {
        "num_hidden_layers": 6, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 103,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] + ["sliding_attention"] * 2
        + ["full_attention"],
    }  # fmt: skip
    gemma4_vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 2, "position_embedding_size": 16,
    }  # fmt: skip
    gpt_oss_rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 64,
    }  # fmt: skip
    phi_rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * at for at in range(12)], "long_factor": [2.0 + at for at in range(12)],
    }  # fmt: skip
    ministral_rope = gpt_oss_rope | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    granite = {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    pixtral = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16,
    }  # fmt: skip
    siglip = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    qwen_vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    }  # fmt: skip
    experts = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
    linear_heads = {
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
        "head_dim": 32, "tie_word_embeddings": False,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }  # fmt: skip
    hybrid = TINY | linear_heads
    hybrid_experts = {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 30, "shared_expert_intermediate_size": 46,
    }  # fmt: skip
    latent = TINY | {
        "kv_lora_rank": 32, "q_lora_rank": 20, "qk_rope_head_dim": 16, "qk_nope_head_dim": 12, "v_head_dim": 10,
        "num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 30,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    latent_yarn = gpt_oss_rope | {"truncate": True, "mscale": 0.8, "mscale_all_dim": 0.6}
    grouped = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7, "norm_topk_prob": True}
    pattern = ["sliding_attention", "sliding_attention", "full_attention"]
    configs = {
        "llama": lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=False),
        "llama3-rope": lambda: hf.LlamaConfig(**TINY, rope_parameters=llama3, tie_word_embeddings=True),
        "llama-linear-bias": lambda: hf.LlamaConfig(
            **TINY, rope_parameters=linear, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
        ),
        "llama-longrope": lambda: hf.LlamaConfig(**TINY, rope_parameters=longrope, tie_word_embeddings=False),
        "qwen2-yarn": lambda: hf.Qwen2Config(**TINY, rope_parameters=yarn, tie_word_embeddings=False),
        "mistral-window": lambda: hf.MistralConfig(**TINY, sliding_window=7, tie_word_embeddings=False),
        "qwen2": lambda: hf.Qwen2Config(**TINY, tie_word_embeddings=True),
        "qwen3": lambda: hf.Qwen3Config(**TINY, head_dim=32, tie_word_embeddings=False),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **(TINY | {"num_key_value_heads": 1}),
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=7,
            layer_types=pattern,
            rope_parameters=gemma_rope,
            tie_word_embeddings=True,
        ),
        "gemma3-vl": lambda: hf.Gemma3Config(
            text_config=TINY
            | {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 7, "layer_types": pattern}
            | {"rope_parameters": gemma_rope},
            vision_config=siglip,
            mm_tokens_per_image=4,
        ),
        "gemma4": lambda: hf.Gemma4TextConfig(**gemma4),
        "gemma4-moe": lambda: hf.Gemma4TextConfig(
            **gemma4, enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=30
        ),
        "gemma4-small": lambda: hf.Gemma4TextConfig(**(gemma4 | small)),
        "gemma4-vl": lambda: hf.Gemma4Config(
            text_config=gemma4 | {"attention_k_eq_v": False, "use_bidirectional_attention": "vision"},
            vision_config=gemma4_vision,
            audio_config=None,
        ),
        "mixtral": lambda: hf.MixtralConfig(**TINY, **experts, num_local_experts=6),
        "mixtral-window": lambda: hf.MixtralConfig(**TINY, **experts, num_local_experts=6, sliding_window=7),
        "qwen3-moe": lambda: hf.Qwen3MoeConfig(
            **TINY,
            **experts,
            head_dim=32,
            num_experts=6,
            moe_intermediate_size=30,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        ),
        "qwen3-moe-plain": lambda: hf.Qwen3MoeConfig(
            **TINY,
            **experts,
            head_dim=32,
            num_experts=6,
            moe_intermediate_size=30,
            norm_topk_prob=False,
        ),
        "qwen2-moe": lambda: hf.Qwen2MoeConfig(
            **TINY,
            **experts,
            num_experts=6,
            moe_intermediate_size=30,
            shared_expert_intermediate_size=46,
            mlp_only_layers=[1],
        ),
        "gpt-oss": lambda: hf.GptOssConfig(
            **TINY,
            **experts,
            num_local_experts=6,
            head_dim=32,
            sliding_window=7,
            swiglu_limit=0.5,
            rope_parameters=gpt_oss_rope,
        ),
        "gemma2": lambda: hf.Gemma2Config(
            **TINY,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=7,
            attn_logit_softcapping=0.7,
            final_logit_softcapping=1.5,
            tie_word_embeddings=True,
        ),
        "granite": lambda: hf.GraniteConfig(**TINY, **granite, attention_bias=True, mlp_bias=True),
        "granite-moe": lambda: hf.GraniteMoeConfig(**TINY, **granite, num_local_experts=6, num_experts_per_tok=2),
        "granite-moe-shared": lambda: hf.GraniteMoeSharedConfig(
            **TINY, **granite, num_local_experts=6, num_experts_per_tok=2, shared_intermediate_size=50
        ),
        "olmo2": lambda: hf.Olmo2Config(**TINY, tie_word_embeddings=False),
        "olmo3": lambda: hf.Olmo3Config(**TINY, sliding_window=7, layer_types=pattern, tie_word_embeddings=False),
        "smollm3": lambda: hf.SmolLM3Config(**TINY, no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
        "phi3": lambda: hf.Phi3Config(**TINY, sliding_window=9),
        "phi4-mini": lambda: hf.Phi3Config(
            **(TINY | {"hidden_size": 128}),
            original_max_position_embeddings=256,
            rope_parameters=phi_rope,
            tie_word_embeddings=True,
        ),
        "ministral": lambda: hf.MinistralConfig(
            **TINY, head_dim=32, sliding_window=7, layer_types=pattern, tie_word_embeddings=False
        ),
        "ministral3": lambda: hf.Ministral3Config(**TINY, head_dim=32, rope_parameters=ministral_rope),
        "mistral3": lambda: hf.Mistral3Config(
            text_config=dict(TINY, model_type="mistral", sliding_window=None),
            vision_config=pixtral,
            tie_word_embeddings=False,
        ),
        "qwen3-next": lambda: hf.Qwen3NextConfig(**hybrid, **hybrid_experts, mlp_only_layers=[1]),
        "qwen3.5": lambda: hf.Qwen3_5TextConfig(**hybrid),
        "qwen3.5-moe": lambda: hf.Qwen3_5MoeTextConfig(**hybrid, **hybrid_experts),
        "qwen3.5-vl": lambda: hf.Qwen3_5Config(
            text_config=dict(hybrid, rope_parameters=mrope | {"partial_rotary_factor": 0.5}),
            vision_config=qwen_vision,
        ),
        "qwen3.5-moe-vl": lambda: hf.Qwen3_5MoeConfig(
            text_config=dict(hybrid | hybrid_experts, rope_parameters=mrope | {"partial_rotary_factor": 0.5}),
            vision_config=qwen_vision,
        ),
        "deepseek-v2": lambda: hf.DeepseekV2Config(
            **latent, **grouped, topk_method="group_limited_greedy", rope_parameters=latent_yarn
        ),
        "deepseek-v2-lite": lambda: hf.DeepseekV2Config(
            **(latent | {"q_lora_rank": None, "kv_lora_rank": 24}), topk_method="greedy", rms_norm_eps=1e-2
        ),
        "deepseek-v3": lambda: hf.DeepseekV3Config(**latent, **grouped, rope_parameters=latent_yarn),
        "mistral4": lambda: hf.Mistral4Config(
            **latent,
            rope_interleave=False,
            rope_parameters=latent_yarn
            | {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 8, "factor": 32.0},
        ),
        "glm4-moe": lambda: hf.Glm4MoeConfig(**TINY, **_PECULIAR["glm4_moe"], attention_bias=True),
        "minimax-m2": lambda: hf.MiniMaxM2Config(**(TINY | _PECULIAR["minimax_m2"]), rotary_dim=16),
        "llama4": lambda: hf.Llama4TextConfig(
            **TINY,
            head_dim=32,
            intermediate_size_mlp=80,
            num_local_experts=4,
            moe_layers=[0, 2],
            no_rope_layers=[1, 0, 1],
            attention_chunk_size=7,
            floor_scale=8,
            attn_scale=0.4,
        ),
        "qwen2.5-vl": lambda: hf.Qwen2_5_VLConfig(
            text_config=dict(TINY, rope_parameters=mrope), vision_config=qwen_vision
        ),
    }
    if family in WIDE_HYBRIDS:
        config: Any = configs[family.removesuffix("-wide")]()
        config.linear_key_head_dim = config.linear_value_head_dim = 64
        return config
    if family in BORROWED.values():
        return hf.CONFIG_MAPPING[family](**(TINY | _PECULIAR.get(family, {})))
    return configs[family]()


_SHARES = {"n_shared_experts": 1, "routed_scaling_factor": 1.5, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
_WIDTH = {"moe_intermediate_size": 30, "num_experts_per_tok": 2}
_PECULIAR: dict[str, dict[str, object]] = {
    "dots1": {**_WIDTH, **_SHARES, "n_routed_experts": 6, "first_k_dense_replace": 1},
    "ernie4_5_moe": {
        "moe_intermediate_size": 30,
        "moe_k": 2,
        "moe_num_experts": 6,
        "moe_num_shared_experts": 1,
        "tie_word_embeddings": False,
    },
    "exaone_moe": {
        **_WIDTH,
        **_SHARES,
        "num_experts": 6,
        "num_shared_experts": 1,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
    },
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 30},
    "glm4_moe": {**_WIDTH, **_SHARES, "n_routed_experts": 6, "use_qk_norm": True, "head_dim": 32},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "intermediate_size": 30, "head_dim": 32},
    "mellum": {
        **_WIDTH,
        "num_local_experts": 6,
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 30, "head_dim": 32},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 30},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 30},
    "solar_open": {**_WIDTH, **_SHARES, "n_routed_experts": 6, "head_dim": 32},
    "helium": {"head_dim": 16},
    "persimmon": {"num_key_value_heads": 4},
}
"""What the tiny model of a borrowed family has beside `TINY`."""
HYBRID_MODELS = ("qwen3-next", "qwen3.5", "qwen3.5-moe", "qwen3.5-vl", "qwen3.5-moe-vl")
WIDE_HYBRIDS = ("qwen3-next-wide", "qwen3.5-wide", "qwen3.5-moe-wide")
"""The same with heads that the kernels of GPUs take in two bytes."""
MULTIMODAL = ("mistral3", "qwen2.5-vl", "qwen3.5-vl", "qwen3.5-moe-vl", "gemma3-vl", "gemma4-vl")
