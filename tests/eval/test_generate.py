"""Noise belongs to the prompt: not to its place, its batch or the order of prompts."""

import pytest
import torch

from qgen.errors import BadData
from qgen.eval.generate import generate, seed_of


class Result:
    def __init__(self, images):
        self.images = images


class Painter:
    """Pictures are nothing but each prompt's noise; remembers how it was called."""

    def __init__(self):
        self.calls = []
        self._progress_bar_config = {"leave": False}

    def set_progress_bar_config(self, **options):
        self._progress_bar_config = options

    def __call__(self, prompt, generator, output_type="pil", num_inference_steps=50, guidance_scale=1.0, height=8):
        self.calls.append((len(prompt), num_inference_steps, guidance_scale, height, dict(self._progress_bar_config)))
        return Result(torch.stack([torch.rand(height, 8, 3, generator=g) for g in generator]).numpy())


PROMPTS = ["noto owl", "flat owl", "noto pizza", "flat penguin", "noto frog"]


def test_noise_depends_on_prompt_and_seed_alone():
    whole = generate(Painter(), PROMPTS, batch_size=5, progress=False)
    assert whole.shape == (5, 8, 8, 3)
    assert whole.dtype == torch.float32
    for size in (1, 2, 3):
        assert torch.equal(generate(Painter(), PROMPTS, batch_size=size, progress=False), whole)
    assert torch.equal(generate(Painter(), PROMPTS[::-1], batch_size=2, progress=False), whole.flip(0))
    other = generate(Painter(), PROMPTS, seed=1, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_seed_is_the_same_everywhere():
    assert seed_of("noto owl") == seed_of("noto owl", 0)
    assert len({seed_of(p, s) for p in PROMPTS for s in range(3)}) == 15
    assert all(0 <= seed_of(p) < 2**63 for p in PROMPTS)


def test_options_reach_the_pipeline_only_if_given_and_its_bar_comes_back():
    painter = Painter()
    generate(painter, PROMPTS, batch_size=4, progress=False)
    generate(painter, PROMPTS[:1], steps=7, guidance=3.5, height=16, progress=False)
    quiet = {"leave": False, "disable": True}
    assert painter.calls == [(4, 50, 1.0, 8, quiet), (1, 50, 1.0, 8, quiet), (1, 7, 3.5, 16, quiet)]
    assert painter._progress_bar_config == {"leave": False}


def test_bytes_are_rounded_floats():
    floats, whole = (generate(Painter(), PROMPTS, progress=False, dtype=d) for d in (torch.float32, torch.uint8))
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, (floats * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "a list of prompts wanted"),
        ("noto owl", {}, "a list of prompts wanted, found 'noto owl'"),
        (PROMPTS, {"batch_size": 0}, "batch_size"),
        (PROMPTS, {"dtype": torch.float16}, "float32 or torch.uint8"),
        (PROMPTS, {"width": 8}, "Painter takes no argument width"),
    ],
    ids=["no-prompts", "a-string", "batch-size", "dtype", "unknown-option"],
)
def test_refuses(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(Painter(), prompts, progress=False, **options)


def test_nan_pictures_are_an_error():
    class Overflow(Painter):
        def __call__(self, prompt, generator, output_type="pil"):
            return Result(torch.full((len(prompt), 8, 8, 3), torch.nan).numpy())

    with pytest.raises(BadData, match="NaN"):
        generate(Overflow(), PROMPTS, progress=False)


def test_a_pipeline_without_pictures_is_an_error():
    class Talker(Painter):
        def __call__(self, prompt, generator, output_type="pil"):
            return "words"

    with pytest.raises(ValueError, match="returned str without images"):
        generate(Talker(), PROMPTS, progress=False)


def test_the_demo_pipeline_agrees_across_batch_sizes():
    pytest.importorskip("diffusers")
    from qgen.demo import demo_pipeline

    pipe = demo_pipeline()
    one, three = (generate(pipe, PROMPTS[:3], steps=4, batch_size=b, progress=False) for b in (1, 3))
    assert one.shape == (3, 64, 64, 3)
    assert torch.allclose(one, three, atol=1e-3)
