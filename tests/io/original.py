"""A FLUX.1 in the layout of its authors and of ComfyUI, made from diffusers' model by hand: the truth of the conversion of names."""

import torch

OUTER = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2", "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out",
}  # fmt: skip
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}


def flux(model):
    """{original name: tensor} of a FluxTransformer2DModel."""
    state, made = model.state_dict(), {}
    for leaf in ("weight", "bias"):
        for theirs, ours in OUTER.items():
            made[f"{theirs}.{leaf}"] = state[f"{ours}.{leaf}"]
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
        for i in range(model.config.num_layers):
            there, here = f"double_blocks.{i}.", f"transformer_blocks.{i}."
            for theirs, ours in DOUBLE.items():
                made[f"{there}{theirs}.{leaf}"] = state[f"{here}{ours}.{leaf}"]
            made[f"{there}img_attn.qkv.{leaf}"] = torch.cat([state[f"{here}attn.to_{x}.{leaf}"] for x in "qkv"])
            made[f"{there}txt_attn.qkv.{leaf}"] = torch.cat([state[f"{here}attn.add_{x}_proj.{leaf}"] for x in "qkv"])
        for i in range(model.config.num_single_layers):
            there, here = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
            parts = [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]
            made[f"{there}linear1.{leaf}"] = torch.cat([state[f"{here}{part}.{leaf}"] for part in parts])
            made[f"{there}linear2.{leaf}"] = state[f"{here}proj_out.{leaf}"]
            made[f"{there}modulation.lin.{leaf}"] = state[f"{here}norm.linear.{leaf}"]
    for long, short in (("query", "q"), ("key", "k")):
        for i in range(model.config.num_layers):
            for stream, ours in (("img", f"norm_{short}"), ("txt", f"norm_added_{short}")):
                theirs = f"double_blocks.{i}.{stream}_attn.norm.{long}_norm.scale"
                made[theirs] = state[f"transformer_blocks.{i}.attn.{ours}.weight"]
        for i in range(model.config.num_single_layers):
            theirs = f"single_blocks.{i}.norm.{long}_norm.scale"
            made[theirs] = state[f"single_transformer_blocks.{i}.attn.norm_{short}.weight"]
    return {name: tensor.contiguous() for name, tensor in made.items()}
