"""What one forward pass tells of real architectures: order, blocks, shared inputs, producers, roles."""

import pytest
import torch
from torch import nn

from qgen.calibration.base import Call
from qgen.errors import NotQuantizable
from qgen.probe import probe
from tests import tiny


@pytest.fixture(scope="module")
def sites():
    """sites(family) → {path: Site}, each family probed once."""
    known = {}

    def of(name):
        if name not in known:
            make, call = tiny.FAMILIES[name]
            known[name] = {site.path: site for site in probe(make(), call())}
        return known[name]

    return of


def inputs(found, *paths):
    return {found[path].shares for path in paths}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_layer_that_runs_is_found_once_in_order_with_its_shape(sites, name):
    make, call = tiny.FAMILIES[name]
    model, ran = make(), []
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and getattr(layer, "groups", 1) == 1
    }
    hooks = [layer.register_forward_pre_hook(lambda m, a, p=path: ran.append(p)) for path, layer in layers.items()]
    call().run(model)
    for hook in hooks:
        hook.remove()
    found = sites(name)
    assert list(found) == list(dict.fromkeys(ran)) and [s.order for s in found.values()] == list(range(len(found)))
    assert all(s.shape == (layers[p].weight.shape[0], layers[p].weight[0].numel()) for p, s in found.items())
    assert all((s.kind == "conv2d") == isinstance(layers[p], nn.Conv2d) for p, s in found.items())
    assert all((s.kind == "conv3d") == isinstance(layers[p], nn.Conv3d) for p, s in found.items())


def test_probing_leaves_no_hook_and_no_change():
    model = tiny.pixart()
    before = tiny.snapshot(model)
    probe(model, tiny.pixart_call())
    assert tiny.same(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pixart(sites):
    found = sites("pixart")
    for b in ("transformer_blocks.0", "transformer_blocks.1"):
        assert len(inputs(found, *(f"{b}.attn1.to_{x}" for x in "qkv"))) == 1
        assert inputs(found, f"{b}.attn2.to_q") != inputs(found, f"{b}.attn2.to_k")
        assert found[f"{b}.ff.net.2"].after == "GELU" and found[f"{b}.ff.net.2"].block == b
    across = inputs(found, *(f"transformer_blocks.{i}.attn2.to_{x}" for i in (0, 1) for x in "kv"))
    assert len(across) == 1, "the text is one input for the keys and values of all blocks"
    assert inputs(found, "transformer_blocks.0.attn1.to_q") != inputs(found, "transformer_blocks.1.attn1.to_q")
    assert {p for p, s in found.items() if s.role == "outside"} == {
        "pos_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2", "proj_out",
    }  # fmt: skip
    assert {p for p, s in found.items() if s.role == "vector"} == {
        "adaln_single.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_2", "adaln_single.linear",
    }  # fmt: skip
    assert (
        found["transformer_blocks.0.attn1.to_q"].tokens == 16 and found["transformer_blocks.0.attn2.to_k"].tokens == 5
    )


def test_flux(sites):
    found = sites("flux")
    b = "transformer_blocks.0"
    assert len(inputs(found, *(f"{b}.attn.to_{x}" for x in "qkv"))) == 1
    assert len(inputs(found, *(f"{b}.attn.add_{x}_proj" for x in "qkv"))) == 1
    single = "single_transformer_blocks.0"
    assert len(inputs(found, *(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp")) == 1
    assert found[f"{b}.norm1.linear"].role == "vector" and found[f"{single}.norm.linear"].role == "vector"
    assert found["proj_out"].role == "outside" and found[f"{single}.proj_out"].role == "inside"


def test_unet(sites):
    found = sites("unet")
    a = "mid_block.attentions.0.transformer_blocks.0"
    assert len(inputs(found, *(f"{a}.attn1.to_{x}" for x in "qkv"))) == 1
    assert len({s.shares for p, s in found.items() if ".attn2.to_k" in p or ".attn2.to_v" in p}) == 1
    assert found["conv_in"].role == found["conv_out"].role == "outside"
    assert (
        found["mid_block.resnets.0.time_emb_proj"].role == "vector"
        and found["time_embedding.linear_1"].role == "vector"
    )
    conv = found["down_blocks.1.resnets.0.conv1"]
    assert (conv.kind, conv.after, conv.shape, conv.block) == ("conv2d", "SiLU", (64, 32 * 9), "down_blocks.1")
    assert found[f"{a}.ff.net.2"].after == "GEGLU"


@pytest.mark.parametrize(
    "name, block", [("sd3", "transformer_blocks.1"), ("wan", "blocks.1"), ("sana", "transformer_blocks.1")]
)
def test_other_transformers_share_q_k_v(sites, name, block):
    found = sites(name)
    attention = "attn" if name == "sd3" else "attn1"
    assert len(inputs(found, *(f"{block}.{attention}.to_{x}" for x in "qkv"))) == 1
    assert any(s.role == "vector" for s in found.values()) and found["proj_out"].role == "outside"


def test_text_that_several_blocks_read_is_context(sites):
    for name, layers in (("pixart", ("attn2.to_k", "attn2.to_v")), ("wan", ("attn2.to_k", "attn2.to_v"))):
        found = sites(name)
        context = {path for path, site in found.items() if site.role == "context"}
        assert context and all(path.endswith(layers) for path in context), name
    assert not any(s.role == "context" for name in ("llama", "plain") for s in sites(name).values())


def test_llama_and_t5_share_gates(sites):
    found = sites("llama")
    assert len(inputs(found, "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")) == 1
    assert found["lm_head"].role == "outside" and found["model.layers.1.mlp.down_proj"].block == "model.layers.1"
    found = sites("t5")
    assert len(inputs(found, *(f"encoder.block.0.layer.1.DenseReluDense.wi_{i}" for i in (0, 1)))) == 1


def test_plain_has_no_blocks_and_everything_is_inside(sites):
    found = sites("plain")
    assert (
        [s.role for s in found.values()] == ["inside", "inside"]
        and found["2"].after == "GELU"
        and found["0"].block == ""
    )


class Inception(nn.Module):
    """One image into convolutions of several kernels and strides: their unfolded rows have different widths and numbers."""

    def __init__(self):
        super().__init__()
        self.narrow, self.again, self.wide = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.narrow(x) + self.again(x) + self.wide(x)


def test_convolutions_share_an_input_only_if_they_unfold_it_alike():
    narrow, again, wide = probe(Inception(), Call((torch.randn(1, 8, 4, 4),), {}))
    assert narrow.shares == again.shares != wide.shares


class Tricky(nn.Module):
    """Inputs that look shared and are not: changed in place, or in memory that was given back and taken again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        x.add_(1)
        y = y + self.b(x)
        for layer in (self.c, self.d):
            y = y + layer(x * 2)
        return y


def test_changed_or_recycled_memory_is_not_shared():
    found = probe(Tricky(), Call((torch.randn(3, 5, 16),), {}))
    assert len({s.shares for s in found}) == 4


def test_layers_that_do_not_run_or_cannot_be_packed_are_no_sites():
    model = nn.ModuleDict(
        {"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8), "grouped": nn.Conv2d(8, 8, 3, groups=8, padding=1)}
    )
    model.forward = lambda x: model["grouped"](model["used"](x).mT.unflatten(2, (2, 2)))
    assert [s.path for s in probe(model, Call((torch.randn(1, 4, 8),), {}))] == ["used"]


def test_inference_tensors_are_fine():
    with torch.inference_mode():
        x = torch.randn(1, 4, 64)
    assert len(probe(tiny.plain(), Call((x,), {}))) == 2
    with torch.inference_mode():
        assert len(probe(tiny.plain(), Call((x,), {}))) == 2


class Flat(nn.Module):
    """Flattens tokens before its layer, as mixtures of experts do; the time embedding has one row per sample."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"expert": nn.Linear(16, 16), "time": nn.Linear(16, 16)})])

    def forward(self, x, t):
        block = self.blocks[0]
        return block["expert"](x.flatten(0, 1)).view_as(x) + block["time"](t[:, None].expand(-1, 16))[:, None]


def test_flattened_tokens_are_no_vectors():
    expert, time = probe(Flat(), Call((torch.randn(2, 9, 16), torch.rand(2)), {}))
    assert (expert.role, expert.tokens, time.role, time.tokens) == ("inside", 9, "vector", 1)


def test_nothing_to_find_is_an_error():
    with pytest.raises(NotQuantizable, match=r"GELU ran no nn\.Linear or convolution layer"):
        probe(nn.GELU(), Call((torch.randn(2, 3),), {}))
