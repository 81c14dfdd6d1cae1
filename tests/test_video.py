"""Video pipelines, tiny and random: both experts of Wan 2.2, CogVideoX; frames do not disturb each other; flicker and PSNR by frame."""

import copy

import pytest
import torch

import qgen
from qgen.calibration.recorder import Recorder
from qgen.eval.generate import seed_of
from qgen.eval.video import evaluate_video
from qgen.nn.packed import Packed
from tests import tiny

pytest.importorskip("diffusers", reason="the pipelines are diffusers'")

PROMPTS = [f"a thing that moves {way}" for way in ("left", "right", "up", "down", "away", "near")]
SIZE = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}


def embedded(base, tokens, width):
    """A pipeline class that turns prompts into embeddings without a text encoder."""

    class Tiny(base):
        def encode_prompt(self, prompt=None, negative_prompt=None, *args, **kwargs):
            found = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed_of(p))) for p in prompt]
            return torch.stack(found), torch.zeros(len(found), tokens, width)

    return Tiny


def wan():
    """Wan 2.2: one expert for the noisy half of the steps, one for the rest."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    second = tiny.wan()
    generator = torch.Generator().manual_seed(1)
    for p in second.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=generator))
    nothing = {"vae": None, "text_encoder": None, "tokenizer": None}
    return embedded(WanPipeline, 6, 32)(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny.wan(), transformer_2=second, boundary_ratio=0.6, **nothing
    )  # fmt: skip


def cogvideox():
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=32, text_embed_dim=32, num_layers=2,
        sample_width=8, sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=6, use_rotary_positional_embeddings=False,
    )  # fmt: skip
    nothing = {"vae": None, "text_encoder": None, "tokenizer": None}
    return embedded(CogVideoXPipeline, 6, 32)(
        scheduler=CogVideoXDDIMScheduler(), transformer=model.eval().requires_grad_(False), **nothing
    )


MADE = {"wan": (wan, {}), "cogvideox": (cogvideox, {"max_sequence_length": 6})}


def films(pipe, options):
    """(n, T, H, W, 3) in [0, 1] from latents by one fixed map, so that frames can be compared."""
    noise = [torch.Generator().manual_seed(seed_of(p)) for p in PROMPTS]
    pipe.set_progress_bar_config(disable=True)
    x = pipe(prompt=PROMPTS, generator=noise, **SIZE, **options).frames
    x = x if x.shape[1] == 4 else x.transpose(1, 2)  # (n, C, T, H, W)
    return torch.sigmoid(x[:, :3]).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("name", MADE)
def test_quantized_films_and_their_scores(name):
    make, options = MADE[name]
    pipe = make()
    parts = qgen.models.adapter_for(pipe).denoisers(pipe)
    assert set(parts) == ({"transformer", "transformer_2"} if name == "wan" else {"transformer"})
    wanted = films(pipe, options)
    assert wanted.shape[:2] == (len(PROMPTS), 3)
    calls = Recorder(samples=6, steps=4).calls(pipe, parts, PROMPTS, {**SIZE, **options})
    assert set(calls) == set(parts)
    if name == "wan":  # each expert is calibrated on its own side of the boundary
        low = max(call.moment.t for call in calls["transformer_2"].calls)
        assert low < min(call.moment.t for call in calls["transformer"].calls)
    scores = {}
    for recipe in ("rtn-int4", "w4a8"):
        made = copy.deepcopy(pipe)
        qgen.quantize(made, recipe, calibration=calls, progress=False)
        for part in parts:
            blocks = [
                p for p, layer in getattr(made, part).named_modules() if isinstance(layer, Packed) and "blocks" in p
            ]
            assert len(blocks) >= 12
        scores[recipe] = evaluate_video(films(made, options), wanted)
    better, worse = scores["w4a8"], scores["rtn-int4"]
    assert better["video_psnr"].value > worse["video_psnr"].value + 3
    assert better["video_flicker"].value < worse["video_flicker"].value
    assert 0 < worse["video_flicker"].value < 255


@pytest.mark.parametrize("recipe", ["rtn-int4", "fp8", "rtn-nvfp4"])
def test_a_loud_frame_changes_no_code_of_the_others(recipe):
    """Scales are measured for each token, so that time needs no scales of its own."""
    model = qgen.quantize(tiny.net(1), recipe, progress=False)
    layer, x = model.blocks[0].fc1, torch.randn(1, 4 * 16, 64)  # four frames of sixteen tokens
    loud = x.clone()
    loud[:, 16:32] *= 100
    quiet = torch.arange(64).div(16, rounding_mode="floor") != 1
    with torch.no_grad():
        assert torch.equal(layer(loud)[:, quiet], layer(x)[:, quiet])
        assert not torch.equal(layer(loud), layer(x))
