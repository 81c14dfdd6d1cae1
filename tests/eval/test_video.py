"""Video metrics by hand, and clips from folders, animations and arrays."""

import math

import numpy as np
import pytest
import torch

from qgen.errors import BadData
from qgen.eval.video import as_clips, evaluate_video
from qgen.eval.video_consistency import consistency
from qgen.eval.video_flicker import flicker
from qgen.eval.video_psnr import frame_psnr

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def clips(photos):
    """Two clips of four frames that drift by a pixel per frame."""
    return torch.stack([torch.stack([photos[i].roll(t, 1) for t in range(4)]) for i in (0, 4)])


def test_frame_psnr_by_hand():
    x = torch.zeros(2, 4, 4, 3)
    y = x.clone()
    y[0] += 0.1
    y[1] += 0.01
    assert frame_psnr(y, x) == pytest.approx((20 + 40) / 2, rel=1e-4)
    assert frame_psnr(x, x) == math.inf
    y[1] = 0
    assert frame_psnr(y, x) == pytest.approx((20 + 100) / 2, rel=1e-4)


def test_flicker_sees_what_comes_and_goes_alone():
    x = torch.full((3, 4, 4, 3), 0.5)
    steady, blinking = x + 0.1, x.clone()
    blinking[1] += 0.1
    assert flicker(steady, x) == pytest.approx(0, abs=1e-5)
    assert flicker(blinking, x) == pytest.approx(25.5, rel=1e-4)  # 0.1 up, then 0.1 down


def test_consistency_by_hand():
    a = torch.tensor([1.0, -1, 1, -1]).reshape(1, 2, 2, 1).expand(1, 2, 2, 3) * 0.2 + 0.5
    b = torch.tensor([1.0, 1, -1, -1]).reshape(1, 2, 2, 1).expand(1, 2, 2, 3) * 0.2 + 0.5
    assert consistency(torch.cat([a, a])) == pytest.approx(1, rel=1e-6)
    assert consistency(torch.cat([a, b])) == pytest.approx(0, abs=1e-6)
    assert consistency(torch.cat([a, 1 - a])) == pytest.approx(-1, rel=1e-6)
    assert consistency(torch.full((3, 2, 2, 3), 0.5)) == 1


def test_clips_against_themselves_and_more_noise_is_worse(clips):
    perfect = evaluate_video(clips, clips)
    assert perfect["video_psnr"].value == math.inf
    assert perfect["video_flicker"].value == 0 == perfect["video_consistency"].difference
    noise = torch.randn(clips.shape)
    less, more = (evaluate_video((clips + s * noise).clamp(0, 1), clips) for s in (0.05, 0.1))
    assert less["video_psnr"].value > more["video_psnr"].value
    assert 0 < less["video_flicker"].value < more["video_flicker"].value
    assert 0 > less["video_consistency"].difference > more["video_consistency"].difference


def test_forms_of_clips_agree(clips, tmp_path):
    data = (clips * 255).round().to(torch.uint8).numpy()
    for form in ("frames", "npy", "webp"):
        for i, clip in enumerate(data):
            folder = tmp_path / form
            folder.mkdir(exist_ok=True)
            if form == "frames":
                (folder / str(i)).mkdir()
                for t, frame in enumerate(clip):
                    Image.fromarray(frame).save(folder / str(i) / f"{t}.png")
            elif form == "npy":
                np.save(folder / f"{i}.npy", clip)
            else:
                frames = [Image.fromarray(frame) for frame in clip]
                frames[0].save(folder / f"{i}.webp", save_all=True, append_images=frames[1:], lossless=True)
    for form in ("frames", "npy", "webp"):
        found = evaluate_video(tmp_path / form, clips)
        assert found["video_psnr"].value == math.inf, form


def test_bad_clips_are_refused(clips, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        as_clips(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no clips"):
        as_clips(tmp_path)
    with pytest.raises(ValueError, match="two frames"):
        as_clips([clips[0][:1]])
    with pytest.raises(ValueError, match="equal number, length and size"):
        evaluate_video(clips, clips[:1])
    with pytest.raises(ValueError, match="pass reference="):
        evaluate_video(clips, metrics="video_flicker")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a no")
    with pytest.raises(BadData, match=r"broken\.gif"):
        as_clips(tmp_path)
    np.save(tmp_path / "broken.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "broken.gif").unlink()
    with pytest.raises(BadData, match=r"broken\.npy"):
        as_clips(tmp_path)
