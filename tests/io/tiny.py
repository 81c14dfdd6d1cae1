"""Tiny models of several families with random weights, and a quantizer of tests that needs no engine."""

import torch
from torch import nn

from qgen.nn import QuantConv2d, QuantLinear
from qgen.recipe import Recipe, Spec
from qgen.site import Draft, Site

SPEC = Spec("int4_g64", "int4_g64")


def packed(layer, path, spec, rank, dtype):
    """A packed twin of a float layer, with smoothing and a branch of random rank where rank > 0, so that every slot is there."""
    weight = layer.weight.detach().float().flatten(1)
    site = Site(path, "conv2d" if isinstance(layer, nn.Conv2d) else "linear", "", 0, path, tuple(weight.shape))
    extra = {}
    if rank:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        extra = {"up": u[:, :rank] * s[:rank], "down": v[:rank], "smooth": torch.rand(weight.shape[1]) + 0.5}
    bias = None if layer.bias is None else layer.bias.detach().float()
    draft = Draft((site,), spec, weight, bias, **extra).rounded()
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d.from_draft(draft, layer, dtype=dtype)
    return QuantLinear.from_draft(draft, dtype=dtype)


def quantize(model, spec=SPEC, rank=8, least=32, skip=("proj_out", "lm_head")):
    """Packs all layers of at least `least` inputs and outputs, in place, leaves recipe and report, returns the model."""
    rows = []
    for path, layer in list(model.named_modules()):
        ours = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if not ours or path.split(".")[-1] in skip or not path:
            continue
        if min(layer.weight.shape[0], layer.weight[0].numel()) < least:
            continue
        dtype = layer.weight.dtype
        new = packed(layer, path, spec, rank, dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
        rows.append({"path": path, "kind": "linear", "kernel": new.prepare(), "sqnr_db": 19.25, "log": {}})
    model.qgen_recipe, model.qgen_report = Recipe(spec, name="tiny"), rows
    return model.eval().requires_grad_(False)


def pixart(dtype=torch.float32):
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64, sample_size=8,
        patch_size=2, caption_channels=32, use_additional_conditions=False,
    ).to(dtype).eval()  # fmt: skip


def run_pixart(model, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=g).to(dtype)
    text = torch.randn(2, 5, 32, generator=g).to(dtype)
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(
            x, encoder_hidden_states=text, timestep=torch.tensor([10, 500]), added_cond_kwargs=conditions
        ).sample


def flux(dtype=torch.float32):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=[8, 12, 12],
    ).to(dtype).eval()  # fmt: skip


def run_flux(model, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 16, generator=g).to(dtype),
            encoder_hidden_states=torch.randn(1, 6, 64, generator=g).to(dtype),
            pooled_projections=torch.randn(1, 32, generator=g).to(dtype),
            timestep=torch.tensor([0.5]).to(dtype),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(6, 3),
        ).sample  # fmt: skip


def unet(dtype=torch.float32):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    ).to(dtype).eval()  # fmt: skip


def run_unet(model, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        x, text = torch.randn(1, 4, 8, 8, generator=g).to(dtype), torch.randn(1, 5, 32, generator=g).to(dtype)
        return model(x, torch.tensor([10]), encoder_hidden_states=text).sample


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def run_llama(model, dtype=None):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def t5(dtype=torch.float32):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2, vocab_size=96, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).to(dtype).eval()


def run_t5(model, dtype=None):
    with torch.no_grad():
        return model(torch.arange(10)[None]).last_hidden_state


def bare(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.BatchNorm1d(96), nn.Linear(96, 40)).to(dtype).eval()


def run_bare(model, dtype=torch.float32):
    with torch.no_grad():
        return model(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype))
