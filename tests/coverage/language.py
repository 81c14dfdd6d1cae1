"""Architectures of transformers, tiny: language models, mixtures of experts, state spaces, text encoders, vision models.

`CASES[name] = (class, config arguments, inputs)`: configs of one family name the same things alike (`hidden_size`, `num_hidden_layers`
…), and an argument that a config class does not take is left out, so that a line holds only what is special.
"""

__all__ = ["CASES", "TITLE", "classes", "model_and_call"]

import inspect

import torch

from qgen.calibration.base import Call
from tests.coverage import derive

TITLE = "Architectures of transformers"
_SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "image_size": 32, "patch_size": 8,
    "projection_dim": 64,
}  # fmt: skip
_IDS = lambda r: {"input_ids": torch.arange(3, 15)[None]}  # noqa: E731
_PIXELS = lambda r: {"pixel_values": r(1, 3, 32, 32)}  # noqa: E731

_DECODERS = (
    "Llama", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Mistral", "Phi", "Phi3", "Olmo", "Olmo2", "StableLm", "Starcoder2", "Cohere",
    "Granite", "Glm", "Glm4", "GPTNeoX", "Persimmon", "Nemotron", "SmolLM3", "Helium", "GPTJ", "GPT2", "OPT", "Bloom",
    "Falcon", "CodeGen", "GPTBigCode", "MiniMax", "Mixtral", "Qwen2Moe", "Qwen3Moe", "OlmoE", "PhiMoE", "GraniteMoe", "DeepseekV3",
    "GptOss", "Mamba", "Mamba2", "FalconMamba", "Bamba", "RecurrentGemma", "Jamba",
)  # fmt: skip

_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 128}
_MAMBA2 = {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16, "chunk_size": 4}
_SPECIAL = {
    "Gemma": {"head_dim": 32}, "GPT2": _GPT2, "GPTJ": {**_GPT2, "rotary_dim": 16}, "CodeGen": {**_GPT2, "rotary_dim": 16},
    "GPTBigCode": _GPT2, "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "Bloom": {"n_layer": 2, "n_head": 2},
    "Nemotron": {"head_dim": 32}, "PhiMoE": {"num_key_value_heads": 2}, "Mamba2": _MAMBA2, "GptOss": {"layer_types": None},
    "DeepseekV3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2,
    },
    "Bamba": {
        "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 4,
    },
    "Jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 32,
        "mamba_d_state": 16, "use_mamba_kernels": False,
    },
    "RecurrentGemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    "MiniMax": {"block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
_D_MODEL = {
    "d_model": 64,
    "d_kv": 32,
    "num_heads": 2,
    "d_ff": 128,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
}
_SEQ = {
    **_D_MODEL, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "decoder_start_token_id": 1,
}  # fmt: skip
_BOTH = lambda r: {"input_ids": torch.arange(3, 15)[None], "decoder_input_ids": torch.arange(3, 9)[None]}  # noqa: E731

CASES = {
    **{f"{name}ForCausalLM": (_SPECIAL.get(name, {}), _IDS) for name in _DECODERS},
    "GPT2LMHeadModel": (_GPT2, _IDS),
    "T5EncoderModel": ({**_D_MODEL, "feed_forward_proj": "gated-gelu"}, _IDS),
    "UMT5EncoderModel": (_D_MODEL, _IDS),
    "MT5EncoderModel": (_D_MODEL, _IDS),
    "T5ForConditionalGeneration": (_D_MODEL, _BOTH),
    "BartForConditionalGeneration": (_SEQ, _BOTH),
    "CLIPTextModelWithProjection": ({}, _IDS),
    "CLIPTextModel": ({}, _IDS),
    "CLIPVisionModelWithProjection": ({}, _PIXELS),
    "SiglipVisionModel": ({}, _PIXELS),
    "BertModel": ({}, _IDS),
    "RobertaModel": ({}, _IDS),
    "ModernBertModel": ({"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, _IDS),
    "ViTModel": ({}, _PIXELS),
    "DeiTModel": ({}, _PIXELS),
    "BeitModel": ({}, _PIXELS),
    "Dinov2Model": ({}, _PIXELS),
    "DINOv3ViTModel": ({}, _PIXELS),
    "SwinModel": ({"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}, _PIXELS),
    "ConvNextModel": ({"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}, _PIXELS),
    "SegformerModel": (
        {"hidden_sizes": [32, 64], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
         "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2]}, _PIXELS),
    "WhisperModel": (
        {**_SEQ, "num_mel_bins": 16, "max_source_positions": 8, "max_target_positions": 16},
        lambda r: {"input_features": r(1, 16, 16), "decoder_input_ids": torch.arange(3, 9)[None]},
    ),
    "Wav2Vec2Model": (
        {"conv_dim": [32, 32], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 2}, lambda r: {"input_values": r(1, 200)}),
}  # fmt: skip
_ALIASES = {
    "GPT2ForCausalLM": "GPT2LMHeadModel",
    "OlmoEForCausalLM": "OlmoeForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}
for _old, _new in _ALIASES.items():
    CASES[_new] = CASES.pop(_old)


def classes():
    """{name: class} of the cases that the installed transformers has."""
    import transformers

    return {name: getattr(transformers, name) for name in CASES if hasattr(transformers, name)}


def model_and_call(name):
    """make, call: `make()` gives the tiny float32 model, the same one every time; `call` is a Call that it answers."""
    kind = classes()[name]
    given, asked = CASES[name]
    names = getattr(kind.config_class, "attribute_map", {})
    taken = {*inspect.signature(kind.config_class).parameters, *names}
    usual = {key: value for key, value in _SMALL.items() if key in taken and names.get(key) not in given}
    config = kind.config_class(**{**usual, **given})

    def make():
        torch.manual_seed(0)
        return derive.randomize(kind(config))

    generator = torch.Generator().manual_seed(1)
    kwargs = asked(lambda *shape: torch.randn(*shape, generator=generator))
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        kwargs["use_cache"] = False
    return make, Call((), kwargs)
