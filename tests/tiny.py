"""Tiny random-weight models of several families, and calls that run them: they stand for the real ones in tests.

`FAMILIES[name]` is (make, call): `make()` gives a float32 model in eval mode, the same one every time;
`call(seed)` gives a `Call` that it answers.
Every width is a multiple of 32 and most are 64, so that blocks of 64 need padding in some layers and none in others.
"""

import torch
from torch import nn

from qgen.calibration.base import CalibrationSet, Call, Moment


def _made(build):
    """A decorator: seeds, builds, eval, no gradients."""

    def make():
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)

    return make


def _noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@_made
def pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64, sample_size=8,
        patch_size=2, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip


def pixart_call(seed=0):
    randn = _noise(seed)
    kwargs = {
        "encoder_hidden_states": randn(2, 5, 32),
        "timestep": torch.tensor([100, 700]) + seed,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Call((randn(2, 4, 8, 8),), kwargs, Moment(seed))


@_made
def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip


def unet_call(seed=0):
    randn = _noise(seed)
    return Call(
        (randn(1, 4, 8, 8), torch.tensor([10 + seed])), {"encoder_hidden_states": randn(1, 5, 32)}, Moment(seed)
    )


@_made
def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=[8, 12, 12],
    )  # fmt: skip


def flux_call(seed=0):
    randn = _noise(seed)
    kwargs = {
        "hidden_states": randn(1, 16, 16), "encoder_hidden_states": randn(1, 6, 64), "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return Call((), kwargs, Moment(seed))


@_made
def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def sd3_call(seed=0):
    randn = _noise(seed)
    kwargs = {
        "hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 6, 32), "pooled_projections": randn(1, 64),
        "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    return Call((), kwargs, Moment(seed))


@_made
def wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=128, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def wan_call(seed=0):
    randn = _noise(seed)
    kwargs = {
        "hidden_states": randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 6, 32),
    }
    return Call((), kwargs, Moment(seed))


@_made
def sana():
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32, sample_size=8, patch_size=1,
    )  # fmt: skip


def sana_call(seed=0):
    randn = _noise(seed)
    kwargs = {
        "hidden_states": randn(1, 4, 8, 8),
        "encoder_hidden_states": randn(1, 6, 32),
        "timestep": torch.tensor([500]),
    }
    return Call((), kwargs, Moment(seed))


@_made
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=96,
            tie_word_embeddings=True,
        )
    )


@_made
def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            d_model=64, d_kv=32, num_heads=2, d_ff=128, num_layers=2, vocab_size=96, feed_forward_proj="gated-gelu"
        )
    )


def ids_call(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Call((torch.randint(0, 96, (2, 12), generator=generator),), {}, Moment(seed))


@_made
def plain():
    """Linear, GELU, linear; 40 outputs and no blocks."""
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40))


def plain_call(seed=0):
    return Call((_noise(seed)(2, 24, 64),), {}, Moment(seed))


FAMILIES = {
    "pixart": (pixart, pixart_call),
    "unet": (unet, unet_call),
    "flux": (flux, flux_call),
    "sd3": (sd3, sd3_call),
    "wan": (wan, wan_call),
    "sana": (sana, sana_call),
    "llama": (llama, ids_call),
    "t5": (t5, ids_call),
    "plain": (plain, plain_call),
}


def calls(name, count=4):
    """`count` calls of different samples, none held out yet."""
    return CalibrationSet(tuple(FAMILIES[name][1](seed) for seed in range(count)))


def first(output):
    """The first tensor of a model's output."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def snapshot(module):
    """Every tensor of a module's state, copied: `same` compares it bit for bit."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(module, before):
    """Whether the module's state is what `snapshot` saw, names, dtypes and bits."""
    now = module.state_dict()
    return list(now) == list(before) and all(
        t.dtype == now[n].dtype and torch.equal(t, now[n]) for n, t in before.items()
    )


class Block(nn.Module):
    """Attention-free transformer block: q, k, v share an input; fc2 follows a GELU."""

    def __init__(self, width=64, hidden=128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.o(torch.softmax(self.q(h) @ self.k(h).mT / h.shape[-1] ** 0.5, -1) @ self.v(h))
        return x + self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    """Embedder, blocks with time modulation, head: the smallest thing that has all three roles."""

    def __init__(self, blocks=2, width=64):
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(32, width), nn.Linear(64, width), nn.Linear(width, 32)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, sample, timestep=None):
        t = torch.full((sample.shape[0],), 0.5) if timestep is None else timestep
        angles = t[:, None] * torch.linspace(1, 4, 32)
        x = self.embed(sample) + self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(blocks=2, width=64):
    torch.manual_seed(0)
    return Net(blocks, width).eval().requires_grad_(False)


def net_call(seed=0, step=0, rows=24):
    return Call(
        (_noise(1000 * seed + step)(2, rows, 32),),
        {"timestep": torch.tensor([0.9, 0.9]) - 0.1 * step},
        Moment(seed, step),
    )


def net_calls(samples=5, steps=2, rows=24):
    return CalibrationSet(tuple(net_call(s, t, rows) for s in range(samples) for t in range(steps)))


class Pipe:
    """What a pipeline is to qgen: an object with a denoiser under a known name and a call that takes prompts."""

    def __init__(self, blocks=2, name="transformer"):
        setattr(self, name, net(blocks))
        self._name, self.seen = name, []

    @property
    def components(self):
        return {self._name: getattr(self, self._name)}

    def __call__(self, prompt, generator=None, steps=3):
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.seen.append(prompts)
        x = torch.randn(len(prompts), 16, 32, generator=generator)
        shift = torch.tensor([[float(sum(map(ord, p)) % 7)] for p in prompts])[:, None] / 7
        for i in range(steps):
            t = torch.full((len(prompts),), 1.0 - i / steps)
            x = x - getattr(self, self._name)(x + shift, timestep=t) / steps
        return x
