"""Every denoiser class of the installed diffusers, tiny: what the rules of `derive.py` cannot know of a class.

`CASES[name] = (constructor arguments, inputs)`: both win over the rules; an input of None is left out, `...` leaves an argument at its
default. Inputs are a function of `randn`. Classes without a line follow the rules alone.
"""

__all__ = ["CASES", "NOT_DENOISERS", "TITLE", "classes", "model_and_call"]

import torch

from qgen.calibration.base import Call
from tests.coverage import derive

TITLE = "Denoisers of diffusers"

# Exported beside the denoisers, but nothing that can be called on its own.
NOT_DENOISERS = {
    "MotionAdapter": "a container of motion modules that UNetMotionModel takes over; has no forward",
    "ControlNetXSAdapter": "a container that UNetControlNetXSModel takes over; has no forward",
    "MultiControlNetModel": "a list of ControlNets",
    "FluxMultiControlNetModel": "a list of ControlNets",
    "HunyuanDiT2DMultiControlNetModel": "a list of ControlNets",
    "QwenImageMultiControlNetModel": "a list of ControlNets",
    "SD3MultiControlNetModel": "a list of ControlNets",
}
_FOLDERS = ("diffusers.models.transformers.", "diffusers.models.unets.", "diffusers.models.controlnets.")
_ELSEWHERE = ("AudioLDM2UNet2DConditionModel",)


def classes():
    """{name: class} of all denoisers that the installed diffusers exports."""
    import diffusers

    found = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin) or name in NOT_DENOISERS:
            continue
        if kind.__module__.startswith(_FOLDERS) or name in _ELSEWHERE:
            found[name] = kind
    return found


def model_and_call(name):
    """make, call: `make()` gives the tiny float32 model, the same one every time; `call` is a Call that it answers.

    `make.complete`: whether its config alone makes such a model.
    """
    kind = classes()[name]
    given, asked = CASES.get(name, ({}, None))
    arguments = derive.config(kind, **given)

    def make():
        torch.manual_seed(0)
        with derive.unfilled_is_nan():
            model = _COMPLETED.get(name, lambda model: model)(kind(**arguments))
        return derive.randomize(model)

    make.complete = name not in _COMPLETED

    generator = torch.Generator().manual_seed(1)
    kwargs = derive.inputs(kind, arguments, lambda *shape: torch.randn(*shape, generator=generator))
    kwargs.update(asked(lambda *shape: torch.randn(*shape, generator=generator)) if asked else {})
    return make, Call((), {key: value for key, value in kwargs.items() if value is not None})


def _z_image_controlnet(model):
    """Embedders, refiners and padding are those of the transformer that it controls, as `ZImageControlNetPipeline` puts them together."""
    kind = classes()["ZImageTransformer2DModel"]
    return type(model).from_transformer(model, kind(**derive.config(kind, n_layers=2)))


_COMPLETED = {"ZImageControlNetModel": _z_image_controlnet}


def _rope(length, dim):
    angles = torch.arange(length)[:, None] * torch.linspace(1, 0.1, dim // 2).repeat_interleave(2)
    return angles.cos(), angles.sin()


def _ids(rows, axes=3):
    return torch.arange(rows)[:, None].expand(rows, axes).clone()


def _hunyuan_dit(r):
    """What both HunyuanDiT classes ask for beside the latents."""
    return {
        "encoder_hidden_states": r(1, 6, 32), "encoder_hidden_states_t5": r(1, 5, 32), "text_embedding_mask": torch.ones(1, 6),
        "text_embedding_mask_t5": torch.ones(1, 5), "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]]), "style": torch.tensor([0]),
        "image_rotary_emb": list(_rope(16, 32)),
    }  # fmt: skip


def _lumina():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(32, 16, 16, linear_factor=1.0, ntk_factor=1.0)


def _wan_cache():
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(2)


_MICRO = {
    "original_size": torch.tensor([[64, 64]]),
    "target_size": torch.tensor([[64, 64]]),
    "crop_coords": torch.tensor([[0, 0]]),
}
_BOOL = torch.ones(1, 6, dtype=torch.bool)

CASES = {
    "AceStepTransformer1DModel": (
        {"in_channels": 96, "audio_acoustic_hidden_dim": 32},
        lambda r: {
            "hidden_states": r(1, 16, 32),
            "timestep": torch.tensor([0.5]),
            "timestep_r": torch.tensor([0.4]),
            "encoder_hidden_states": r(1, 6, 64),
            "context_latents": r(1, 16, 64),
        },
    ),
    "AnyFlowFARTransformer3DModel": (
        {"full_chunk_limit": 3},
        lambda r: {
            "hidden_states": r(1, 4, 4, 8, 8),
            "timestep": torch.full((1, 4), 500.0),
            "r_timestep": torch.full((1, 4), 250.0),
            "chunk_partition": [2, 2],
        },
    ),
    "Cosmos3OmniTransformer": (
        {
            "latent_channel": 4,
            "latent_patch_size": 1,
            "patch_latent_dim": 4,
            "num_key_value_heads": 1,
            "rope_axes_dim": [4, 6, 6],
            "dtype": "float32",
        },
        lambda r: {
            "input_ids": torch.tensor([1, 2]),
            "text_indexes": torch.tensor([0, 1]),
            "position_ids": torch.zeros(3, 6, dtype=torch.long),
            "und_len": 2,
            "sequence_length": 6,
            "vision_tokens": [r(1, 4, 1, 2, 2)],
            "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(2, 6),
            "vision_mse_loss_indexes": torch.arange(2, 6),
            "vision_timesteps": torch.ones(4),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
            "hidden_states": None,
        },
    ),
    "DiTTransformer2DModel": ({}, lambda r: {"timestep": torch.tensor([50]), "class_labels": torch.tensor([3])}),
    "HeliosTransformer3DModel": (
        {},
        lambda r: {
            "timestep": torch.tensor([500]),
            "indices_hidden_states": torch.ones(1, 2),
            "indices_latents_history_short": torch.ones(1, 1),
            "indices_latents_history_mid": torch.ones(1, 1),
            "indices_latents_history_long": torch.ones(1, 4),
            "latents_history_short": r(1, 4, 1, 8, 8),
            "latents_history_mid": r(1, 4, 1, 8, 8),
            "latents_history_long": r(1, 4, 4, 8, 8),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "out_channels": 4,
            "num_layers": 1,
            "caption_channels": [32, 32],
            "axes_dims_rope": (16, 8, 8),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
            "num_routed_experts": 2,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 8),
            "img_ids": None,
            "timesteps": torch.tensor([500]),
            "encoder_hidden_states_t5": r(1, 6, 32),
            "encoder_hidden_states_llama3": r(2, 1, 6, 32),
            "pooled_embeds": r(1, 32),
        },
    ),
    "AnyFlowTransformer3DModel": (
        {},
        lambda r: {
            "hidden_states": r(1, 2, 4, 8, 8),
            "timestep": torch.full((1, 2), 500.0),
            "r_timestep": torch.full((1, 2), 250.0),
        },
    ),
    "AudioLDM2UNet2DConditionModel": (
        {"num_attention_heads": ..., "attention_head_dim": 8, "cross_attention_dim": ([None, 32, 64], [None, 32, 64])},
        lambda r: {"encoder_hidden_states": r(1, 6, 32), "encoder_hidden_states_1": r(1, 5, 64)},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "axes_dims": (8, 12, 12),
            "axes_lens": (512, 64, 64),
            "injection_layer_ids": (1,),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "perceiver_num_layers": 1,
        },
        lambda r: {"encoder_hidden_states": r(1, 2, 6, 32), "timestep": torch.tensor([0.5])},
    ),
    "BriaFiboTransformer2DModel": ({"text_encoder_dim": 32}, lambda r: {"text_encoder_layers": [r(1, 6, 32)] * 3}),
    "CogVideoXTransformer3DModel": (
        {"sample_frames": 5, "max_text_seq_length": 6},
        lambda r: {"hidden_states": r(1, 2, 4, 8, 8)},
    ),
    "CogView3PlusTransformer2DModel": ({}, lambda r: _MICRO),
    "CogView4Transformer2DModel": ({"rope_axes_dim": (8, 8)}, lambda r: _MICRO),
    "ConsisIDTransformer3DModel": (
        {"sample_frames": 5, "max_text_seq_length": 6},
        lambda r: {"hidden_states": r(1, 2, 4, 8, 8)},
    ),
    "ControlNetUnionModel": (
        {
            "encoder_hid_dim": ...,
            "num_trans_channel": 32,
            "num_proj_channel": 32,
            "num_trans_head": 2,
            "num_attention_heads": ...,
            "projection_class_embeddings_input_dim": 48,
            "addition_time_embed_dim": 8,
            "conditioning_embedding_out_channels": (8, 16),
        },
        lambda r: {
            "controlnet_cond": [r(1, 3, 16, 16)],
            "control_type": torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
            "control_type_idx": [0],
        },
    ),
    "CosmosControlNetModel": (
        {
            "n_controlnet_blocks": 2,
            "in_channels": 10,
            "latent_channels": 6,
            "model_channels": 64,
            "max_size": (4, 32, 32),
            "img_context_dim_out": 64,
            "encoder_hidden_states_channels": 32,
            "text_embed_dim": 32,
        },
        lambda r: {
            "controls_latents": r(1, 4, 1, 8, 8),
            "latents": r(1, 4, 1, 8, 8),
            "condition_mask": torch.ones(1, 1, 1, 8, 8),
            "padding_mask": torch.zeros(1, 1, 8, 8),
            "encoder_hidden_states": r(1, 6, 32),
        },
    ),
    "CosmosTransformer3DModel": (
        {"max_size": (4, 32, 32)},
        lambda r: {"fps": 30, "padding_mask": torch.zeros(1, 1, 8, 8)},
    ),
    "DreamLiteTransformer2DModel": (
        {"in_channels": 64, "num_layers": 1, "cross_attention_dim": 32},
        lambda r: {"hidden_states": r(1, 64, 8, 8), "timestep": None},
    ),
    "DreamLiteUNetModel": (
        {
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "num_attention_heads": ...,
            "num_kv_heads": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
        },
        None,
    ),
    "EasyAnimateTransformer3DModel": ({"in_channels": 4, "out_channels": 4, "patch_size": 2}, None),
    "ErnieImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 16},
        lambda r: {"hidden_states": r(1, 16, 8, 8), "text_bth": r(1, 6, 32), "text_lens": torch.tensor([6])},
    ),
    "FluxControlNetModel": ({}, lambda r: {"controlnet_cond": r(1, 16, 4)}),
    "GlmImageTransformer2DModel": (
        {"prior_vq_quantizer_codebook_size": 32},
        lambda r: {
            "prior_token_id": torch.arange(16)[None],
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": torch.tensor([[64.0, 64.0]]),
            "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
    ),
    "HunyuanDiT2DControlNetModel": (
        {
            "transformer_num_layers": 6,
            "in_channels": 4,
            "patch_size": 2,
            "text_len": 6,
            "text_len_t5": 5,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
        },
        lambda r: {"controlnet_cond": r(1, 4, 8, 8), **_hunyuan_dit(r)},
    ),
    "HunyuanDiT2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "text_len": 6,
            "text_len_t5": 5,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
        },
        lambda r: _hunyuan_dit(r),
    ),
    "HunyuanVideo15Transformer3DModel": (
        {"text_embed_2_dim": 32, "image_embed_dim": 32, "target_size": 8, "task_type": "t2v"},
        lambda r: {
            "encoder_attention_mask": _BOOL,
            "encoder_hidden_states_2": r(1, 6, 32),
            "encoder_attention_mask_2": _BOOL,
            "image_embeds": r(1, 3, 32),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {"has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True},
        lambda r: {
            "image_embeds": r(1, 6, 32),
            "indices_latents": torch.ones(2),
            "latents_clean": r(1, 4, 1, 8, 8),
            "indices_latents_clean": torch.ones(1),
            "latents_history_2x": r(1, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.ones(2),
            "latents_history_4x": r(1, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.ones(4),
        },
    ),
    "I2VGenXLUNet": (
        {"num_attention_heads": 2, "attention_head_dim": ..., "cross_attention_dim": 32},
        lambda r: {
            "sample": r(1, 4, 2, 8, 8),
            "image_latents": r(1, 4, 2, 8, 8),
            "image_embeddings": r(1, 32),
            "fps": torch.tensor([8]),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {"llm_features_dim": 32, "mrope_section": (6, 5, 5)},
        lambda r: {
            "hidden_states": r(1, 20, 4),
            "encoder_hidden_states": r(1, 20, 32),
            "position_ids": _ids(20)[None],
            "segment_ids": torch.ones(1, 20, dtype=torch.long),
            "indicator": torch.tensor([[3] * 4 + [2] * 16]),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {"patch_size": [1, 2, 2]},
        lambda r: {"hidden_states": r(1, 8, 4, 1, 2, 2), "shape_list": [[(1, 2, 2), (1, 2, 2)]]},
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 64,
            "block_out_channels": (32, 64),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "groups": 8,
            "encoder_hid_dim": 32,
            "cross_attention_dim": 32,
        },
        lambda r: {"encoder_hidden_states": r(1, 6, 32), "encoder_attention_mask": torch.ones(1, 6)},
    ),
    "Kandinsky5Transformer3DModel": (
        {"axes_dims": (16, 24, 24), "model_dim": 128},
        lambda r: {
            "hidden_states": r(1, 2, 8, 8, 4),
            "pooled_projections": r(1, 32),
            "encoder_hidden_states": r(1, 6, 32),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(6),
        },
    ),
    "Kandinsky6Transformer3DModel": (
        {"axes_dims": (16, 24, 24), "model_dim": 128},
        lambda r: {
            "hidden_states": r(1, 2, 8, 8, 9),
            "pooled_projections": r(1, 32),
            "encoder_hidden_states": r(1, 6, 32),
            "audio_hidden_states": r(1, 5, 20),
        },
    ),
    "Kandinsky6SRTransformer3DModel": (
        {"axes_dims": (16, 24, 24), "model_dim": 128},
        lambda r: {"hidden_states": r(1, 2, 16, 16, 9)},
    ),
    "Krea2Transformer2DModel": (
        {
            "num_key_value_heads": 1,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "num_text_layers": 3,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        lambda r: {
            "hidden_states": r(1, 16, 4),
            "encoder_hidden_states": r(1, 6, 3, 32),
            "position_ids": _ids(22).float(),
            "encoder_attention_mask": _BOOL,
        },
    ),
    "LTX2VideoTransformer3DModel": (
        {"cross_attention_dim": 64, "audio_cross_attention_dim": 64, "base_height": 64, "base_width": 64},
        lambda r: {
            "hidden_states": r(1, 32, 4),
            "audio_hidden_states": r(1, 5, 4),
            "audio_encoder_hidden_states": r(1, 6, 32),
            "encoder_hidden_states": r(1, 6, 32),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 5,
        },
    ),
    "LTXVideoTransformer3DModel": (
        {},
        lambda r: {"hidden_states": r(1, 32, 4), "num_frames": 2, "height": 4, "width": 4},
    ),
    "LatteTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "caption_channels": 32,
            "norm_type": "ada_norm_single",
            "cross_attention_dim": 64,
            "video_length": 2,
            "num_embeds_ada_norm": 1000,
        },
        lambda r: {"encoder_hidden_states": r(1, 6, 32), "encoder_attention_mask": None},
    ),
    # 64 latent channels, as the class has them: the error is nearly the same for every token, and what four random rows of the last
    # projection make of it is luck (10 to 28 dB over seeds, while the layer before them is at 19).
    "LongCatAudioDiTTransformer": (
        {"latent_dim": ...},
        lambda r: {
            "hidden_states": r(1, 16, 64),
            "encoder_attention_mask": _BOOL,
            "latent_cond": r(1, 16, 64),
            "timestep": torch.tensor([0.5]),
        },
    ),
    "Lumina2Transformer2DModel": (
        {"axes_lens": (64, 64, 64), "num_kv_heads": 1, "multiple_of": 32},
        lambda r: {"encoder_attention_mask": _BOOL},
    ),
    "LuminaNextDiT2DModel": (
        {"num_kv_heads": 1, "multiple_of": 32},
        lambda r: {
            "encoder_mask": torch.ones(1, 6),
            "image_rotary_emb": _lumina(),
            "encoder_hidden_states": r(1, 6, 64),
            "cross_attention_kwargs": {},
        },
    ),
    "MiniMaxH3Transformer3DModel": (
        {"audio_in_channels": 8, "time_embed_hidden_dim": 64, "rope_freq_dim": 4},
        lambda r: {
            "hidden_states": r(1, 8, 16),
            "audio_hidden_states": r(1, 3, 8),
            "timestep": torch.tensor([0.7, 0.3]),
            "timestep_indices": torch.tensor([0] * 6 + [1] * 3 + [0] * 8),
            "token_tags": torch.tensor([1] * 6 + [2] * 3 + [0] * 8),
            "position_ids": _ids(17).float(),
            "text_indices": torch.arange(6),
            "audio_indices": torch.arange(6, 9),
            "video_indices": torch.arange(9, 17),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"audio_vocab_size": 32, "num_codebooks": 4},
        lambda r: {"inputs_embeds": r(1, 4, 64)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {"rotary_dim": 16},
        lambda r: {
            "hidden_states": r(1, 4, 16),
            "encoder_hidden_states": r(1, 16, 32),
            "timestep": torch.tensor([0.5]),
        },
    ),
    # Experts choose their tokens. With room for a fourth of them, choices of the random router that flip decide the number (9 to 19 dB over
    # six seeds); with room for all there is nothing to flip, and every expert runs (19 to 21 dB).
    "NucleusMoEImageTransformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "capacity_factors": [4.0, 4.0],
            "num_experts": 4,
            "moe_intermediate_dim": 64,
            "num_key_value_heads": 1,
            "dense_moe_strategy": "leave_first_block_dense",
        },
        lambda r: {
            "hidden_states": r(1, 16, 16),
            "img_shapes": [(1, 4, 4)],
            "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long),
            "timestep": torch.tensor([0.5]),
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "pad_token_id": 0,
            "num_key_value_heads": 1,
            "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        },
        lambda r: {
            "input_img_latents": [r(1, 4, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": torch.ones(1, 39, 39),
            "position_ids": torch.arange(39)[None],
            "input_ids": torch.arange(22)[None],
        },
    ),
    "PRXTransformer2DModel": ({"num_heads": 2, "axes_dim": (16, 16)}, lambda r: {"attention_mask": torch.ones(1, 6)}),
    "PriorTransformer": (
        {"embedding_dim": 64, "num_embeddings": 6, "additional_embeddings": 4},
        lambda r: {
            "hidden_states": r(1, 64),
            "proj_embedding": r(1, 64),
            "encoder_hidden_states": r(1, 6, 64),
            "attention_mask": _BOOL,
        },
    ),
    "QwenImage21Transformer2DModel": (
        {"in_channels": 16, "out_channels": 16},
        lambda r: {
            "hidden_states": r(1, 16, 16),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[0] * 6 + [1] * 4]).bool(),
            "timestep": torch.tensor([0.5]),
        },
    ),
    "QwenImageControlNetModel": (
        {"in_channels": 16},
        lambda r: {
            "hidden_states": r(1, 16, 16),
            "controlnet_cond": r(1, 16, 16),
            "img_shapes": [(1, 4, 4)],
            "timestep": torch.tensor([0.5]),
        },
    ),
    "QwenImageTransformer2DModel": (
        {"in_channels": 16},
        lambda r: {"hidden_states": r(1, 16, 16), "img_shapes": [(1, 4, 4)], "timestep": torch.tensor([0.5])},
    ),
    "RFD4ProteinaTransformer": (
        {
            "dim_cond": 32,
            "pair_repr_dim": 32,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 8,
            "t_emb_dim": 32,
            "tri_mult_c": 32,
            "latent_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        lambda r: {
            "bb_ca": r(1, 8, 3),
            "local_latents": r(1, 8, 8),
            "bb_ca_time": torch.tensor([0.5]),
            "local_latents_time": torch.tensor([0.5]),
            "padding_mask": torch.ones(1, 8, dtype=torch.bool),
            "token_type": torch.zeros(1, 8, dtype=torch.long),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 8, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 8, dtype=torch.bool),
            },
        },
    ),
    "SD3ControlNetModel": ({}, lambda r: {"controlnet_cond": r(1, 4, 8, 8)}),
    "SanaControlNetModel": ({}, lambda r: {"controlnet_cond": r(1, 4, 8, 8)}),
    "SanaVideoTransformer3DModel": ({"num_layers": 2}, None),
    "SanaWMTransformer3DModel": (
        {
            "caption_channels": 32,
            "softmax_every_n": 2,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 2,
            "image_size": 256,
            "mixed_precision": "no",
        },
        lambda r: {
            "hidden_states": r(1, 4, 2, 4, 4),
            "encoder_hidden_states": r(1, 1, 6, 32),
            "chunk_plucker": r(1, 8, 2, 4, 4),
            "timestep": torch.full((1, 1, 2), 500.0),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        {"cross_attention_dim": 64, "audio_cross_attention_dim": 64},
        lambda r: {
            "hidden_states": r(1, 32, 4),
            "video_rotary_emb": _rope(32, 64),
            "encoder_hidden_states": r(1, 6, 32),
        },
    ),
    "SparseControlNetModel": (
        {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "motion_num_attention_heads": 2,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "num_attention_heads": ...,
        },
        lambda r: {
            "sample": r(1, 4, 2, 8, 8),
            "controlnet_cond": r(1, 4, 2, 8, 8),
            "conditioning_mask": torch.ones(1, 1, 2, 8, 8),
            "encoder_hidden_states": r(2, 6, 32),
        },
    ),
    "StableAudio3DiTModel": (
        {"local_add_cond_dim": 5, "num_memory_tokens": 4},
        lambda r: {
            "hidden_states": r(1, 4, 16),
            "encoder_hidden_states": r(1, 6, 32),
            "global_hidden_states": r(1, 32),
            "local_add_cond": r(1, 5, 16),
            "timestep": torch.tensor([0.5]),
        },
    ),
    "StableAudioDiTModel": (
        {
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 32,
            "cross_attention_input_dim": 32,
            "global_states_input_dim": 64,
        },
        lambda r: {
            "hidden_states": r(1, 4, 16),
            "encoder_hidden_states": r(1, 6, 32),
            "global_hidden_states": r(1, 1, 64),
            "timestep": torch.tensor([0.5]),
            "rotary_embedding": _rope(17, 16),
        },
    ),
    "StableCascadeUNet": (
        {
            "num_attention_heads": (2, 2),
            "conditioning_dim": 32,
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 32,
            "clip_text_pooled_in_channels": 32,
            "clip_image_in_channels": 32,
            "timestep_ratio_embedding_dim": 16,
        },
        lambda r: {
            "sample": r(1, 4, 8, 8),
            "timestep_ratio": torch.tensor([0.5]),
            "clip_text_pooled": r(1, 1, 32),
            "clip_text": r(1, 6, 32),
            "clip_img": r(1, 1, 32),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 32, "targets_length": 16},
        lambda r: {
            "encodings_and_masks": [(r(1, 6, 64), torch.ones(1, 6))],
            "decoder_input_tokens": r(1, 16, 32),
            "decoder_noise_time": torch.tensor([0.5]),
        },
    ),
    "Transformer2DModel": (
        {"in_channels": 64, "num_layers": 1, "cross_attention_dim": 32, "sample_size": ...},
        lambda r: {"hidden_states": r(1, 64, 8, 8), "encoder_hidden_states": r(1, 6, 32), "timestep": None},
    ),
    "TransformerTemporalModel": (
        {"in_channels": 64, "num_layers": 1, "sample_size": ...},
        lambda r: {"hidden_states": r(2, 64, 4, 4), "num_frames": 2, "timestep": None, "encoder_hidden_states": None},
    ),
    "UNet1DModel": (
        {
            "in_channels": 14,
            "out_channels": 14,
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1.0,
            "out_block_type": "OutConv1DBlock",
            "mid_block_type": "MidResTemporalBlock1D",
            "act_fn": "swish",
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
            "up_block_types": ("UpResnetBlock1D",),
            "sample_size": 16,
        },
        lambda r: {"sample": r(1, 14, 16), "timestep": torch.tensor([10])},
    ),
    "UNet2DConditionModel": (
        {"num_attention_heads": ..., "attention_head_dim": 8, "cross_attention_dim": 32, "encoder_hid_dim": ...},
        None,
    ),
    "UNet3DConditionModel": (
        {"num_attention_heads": ..., "attention_head_dim": 8, "cross_attention_dim": 32, "layers_per_block": 1},
        lambda r: {"sample": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, 6, 32)},
    ),
    "UNetControlNetXSModel": (
        {
            "num_attention_heads": 2,
            "ctrl_num_attention_heads": 2,
            "ctrl_block_out_channels": (16, 32),
            "ctrl_max_norm_num_groups": 8,
            "ctrl_conditioning_embedding_out_channels": (8, 16),
            "cross_attention_dim": 32,
        },
        lambda r: {"controlnet_cond": r(1, 3, 16, 16), "encoder_hidden_states": r(1, 6, 32)},
    ),
    "UNetMotionModel": (
        {"cross_attention_dim": 32, "motion_num_attention_heads": 2},
        lambda r: {"sample": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(2, 6, 32)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "in_channels": 8,
            "num_attention_heads": (2, 2),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
            "num_frames": 2,
            "block_out_channels": (32, 64),
        },
        lambda r: {
            "sample": r(1, 2, 8, 8, 8),
            "encoder_hidden_states": r(1, 1, 32),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        },
    ),
    "UVit2DModel": (
        {
            "block_out_channels": 64,
            "in_channels": 64,
            "cond_embed_dim": 32,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 32,
            "codebook_size": 64,
            "block_num_heads": 2,
            "num_res_blocks": 1,
        },
        lambda r: {
            "input_ids": torch.arange(64).reshape(1, 8, 8),
            "encoder_hidden_states": r(1, 6, 32),
            "pooled_text_emb": r(1, 32),
            "micro_conds": torch.ones(1, 5),
        },
    ),
    "WanAnimate2Transformer3DModel": (
        {"in_dim": 8, "out_dim": 4, "text_len": 6, "dim": 128},
        lambda r: {
            "hidden_states": [r(4, 2, 8, 8)],
            "encoder_hidden_states": [r(6, 32)],
            "condition_latents": [r(4, 2, 8, 8)],
            "encoder_hidden_states_image": r(1, 257, 1280),
            "kv_cache": _wan_cache(),
            "kv_cache_mode": "extract",
            "seq_len": 32,
            "offset_grid_sizes": torch.tensor([[2, 4, 4]]),
        },
    ),
    "WanAnimateTransformer3DModel": (
        {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 32,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 32,
            "motion_dim": 4,
            "motion_encoder_dim": 32,
            "face_encoder_hidden_dim": 32,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda r: {
            "hidden_states": r(1, 12, 3, 8, 8),
            "encoder_hidden_states_image": r(1, 5, 32),
            "pose_hidden_states": r(1, 4, 2, 8, 8),
            "face_pixel_values": r(1, 3, 5, 16, 16),
        },
    ),
    "WanVACETransformer3DModel": (
        {"vace_layers": [0, 1], "vace_in_channels": 8},
        lambda r: {"control_hidden_states": r(1, 8, 2, 8, 8), "control_hidden_states_scale": torch.ones(2)},
    ),
    "ZImageControlNetModel": (
        {"control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 4},
        lambda r: {
            "x": [r(4, 1, 8, 8)],
            "t": torch.tensor([0.5]),
            "cap_feats": [r(6, 32)],
            "control_context": [r(4, 1, 8, 8)],
        },
    ),
    "ZImageTransformer2DModel": (
        {"n_layers": 2},
        lambda r: {"x": [r(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [r(6, 32)]},
    ),
}
