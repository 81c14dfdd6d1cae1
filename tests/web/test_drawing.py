"""Pictures of a pair: the same noise on both sides, and pictures that are none are said to be none instead of shown as black."""

import math

import numpy as np
import pytest
import torch

from qgen.errors import BadData
from qgen.web.drawing import draw, draw_seeds, psnr
from qgen.web.jobs import Job
from qgen.web.models import Pair

ASKED = {"prompt": "owl", "seed": 3, "count": 2, "steps": 2, "guidance": 1.0, "gain": 4}


class Pipe:
    """Draws its noise, brighter by `shift`; `spoil` is written into one pixel."""

    def __init__(self, shift=0.0, spoil=None, size=8):
        self.net, self.shift, self.spoil, self.size = torch.nn.Identity(), shift, spoil, size

    def __call__(self, prompt, generator, num_inference_steps=1, guidance_scale=1.0, output_type="pil"):
        assert output_type == "np"
        for _ in range(num_inference_steps):
            self.net(torch.zeros(1))
        picture = (torch.rand(1, self.size, self.size, 3, generator=generator) / 2 + self.shift).numpy()
        if self.spoil is not None:
            picture[0, 0, 0, 0] = self.spoil
        return type("Drawn", (), {"images": picture})


@pytest.fixture
def job(tmp_path):
    return Job("0" * 16, "generate", dict(ASKED), tmp_path)


def pair(before, after):
    return Pair(before, after, ("net",), {"bytes16": 8, "nbytes": 2}, ("reference",))


def test_both_sides_start_from_the_same_noise(job):
    draw(pair(Pipe(), Pipe()), job)
    assert job.result["psnr"] is None, "equal"
    draw(pair(Pipe(), Pipe(shift=0.1)), job)
    assert job.result["psnr"] == pytest.approx(20, abs=0.3)
    assert {p.name for p in job.folder.glob("*.png")} == {"16-bit.png", "4-bit.png", "difference.png"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [draw, draw_seeds])
def test_pictures_that_are_no_numbers_are_named_by_side(job, value, make):
    with pytest.raises(BadData, match="the pictures at 16 bits hold NaN or infinity"):
        make(pair(Pipe(spoil=value), Pipe()), job)
    with pytest.raises(BadData, match=r"the pictures at 4 bits hold NaN or infinity; .* try float32"):
        make(pair(Pipe(), Pipe(spoil=value)), job)


def test_sides_of_two_sizes_and_pipelines_without_pictures_are_refused(job):
    with pytest.raises(ValueError, match=r"one size wanted, found \(8, 8\) and \(6, 6\)"):
        draw(pair(Pipe(), Pipe(size=6)), job)

    class Video(Pipe):
        def __call__(self, prompt, generator):
            return type("Drawn", (), {"frames": []})

    with pytest.raises(ValueError, match="Video draws no still picture"):
        draw(pair(Video(), Video()), job)


def test_psnr_by_hand():
    a = np.zeros((2, 2, 3), np.uint8)
    assert psnr(a, a) == math.inf and psnr(a, a + 255) == 0
