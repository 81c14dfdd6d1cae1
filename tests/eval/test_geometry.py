"""Poses, depth and points by hand and against scipy."""

import math

import numpy as np
import pytest
import torch

from qgen.errors import BadData
from qgen.eval.chamfer import chamfer
from qgen.eval.depth import abs_rel
from qgen.eval.geometry import evaluate_geometry, load_scene
from qgen.eval.pose import pose_auc, relative_errors


def pose(degrees, t=(0.0, 0.0, 0.0)):
    """World to camera: a turn about z, then a shift."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = [[c, -s, 0, t[0]], [s, c, 0, t[1]], [0, 0, 1, t[2]], [0, 0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


def test_pose_errors_by_hand():
    """Three views at 0, 10 and 20 degrees; the prediction turns the second by 6 and the third by 2 more. Pairs: 6, 2, 4."""
    truth = torch.stack([pose(0), pose(10), pose(20)])
    predicted = torch.stack([pose(0), pose(16), pose(22)])
    rotation, translation = relative_errors(predicted, truth)
    assert rotation.tolist() == pytest.approx([6, 2, 4], abs=1e-9)
    assert translation.tolist() == [0, 0, 0]
    # mean of max(0, 1 - e / τ): at 5 → (0 + .6 + .2) / 3; at 30 → 1 - 4 / 30
    assert pose_auc(rotation, 5) == pytest.approx(100 * 0.8 / 3)
    assert pose_auc(rotation, 30) == pytest.approx(100 * (1 - 4 / 30))


def test_translation_counts_by_direction_without_sign():
    truth = torch.stack([pose(0), pose(0, (1, 0, 0))])
    for t, want in (((5, 0, 0), 0), ((-2, 0, 0), 0), ((1, 1, 0), 45), ((0, 1, 0), 90), ((0, 0, 0), 90)):
        assert float(relative_errors(torch.stack([pose(0), pose(0, t)]), truth)[1]) == pytest.approx(want, abs=1e-9)


def test_one_motion_of_the_whole_scene_changes_nothing():
    truth = torch.stack([pose(10 * i, (i, 1.0, 0.5 * i * i)) for i in range(4)])
    moved = truth @ pose(33, (1, 2, 3))
    assert float(torch.maximum(*relative_errors(moved, truth)).max()) < 1e-6


def test_auc_is_the_area_under_the_share_of_pairs():
    errors = torch.rand(500, dtype=torch.float64) * 40
    grid = np.linspace(0, 30, 30001)
    share = [(errors.numpy() < e).mean() for e in grid]
    assert pose_auc(errors, 30) == pytest.approx(100 * np.trapezoid(share, grid) / 30, abs=0.01)


def test_depth_by_hand():
    truth = torch.tensor([[1.0, 2.0, 4.0, 0.0, math.nan]])
    predicted = torch.tensor([[2.0, 4.0, 10.0, 3.0, 3.0]])
    assert abs_rel(predicted, truth) == pytest.approx((0 + 0 + 0.25) / 3)
    assert abs_rel(predicted, truth, align=False) == pytest.approx((1 + 1 + 1.5) / 3)
    with pytest.raises(ValueError, match="no pixel"):
        abs_rel(torch.zeros(2, 2), truth[:, :2].reshape(1, 2).expand(2, 2))


def test_chamfer_is_scipys_nearest_neighbours():
    spatial = pytest.importorskip("scipy.spatial")
    a, b = torch.randn(300, 3), torch.randn(200, 3) + 0.2
    want = [spatial.cKDTree(y).query(x)[0].mean() for x, y in ((a.numpy(), b.numpy()), (b.numpy(), a.numpy()))]
    assert chamfer(a, b, rows=64) == pytest.approx(sum(want) / 2, rel=1e-6)
    assert chamfer(a, a) == 0
    assert chamfer(torch.tensor([[0.0, 0, 0], [math.nan, 0, 0]]), torch.tensor([[3.0, 4, 0]])) == pytest.approx(5)


def test_scenes_from_files_perfect_and_noisy(tmp_path):
    poses = torch.stack([pose(10 * i, (i, 1.0, 0.0)) for i in range(4)])
    truth = {"poses": poses, "depth": 1 + torch.rand(4, 6, 6).double(), "points": torch.rand(50, 3).double()}
    np.savez(tmp_path / "scene.npz", **{k: v.numpy() for k, v in truth.items()})
    perfect = evaluate_geometry([load_scene(tmp_path / "scene.npz")], [truth])
    assert [row.value for row in perfect.rows] == pytest.approx([100, 100, 100, 0, 0], abs=1e-4)
    found = []
    for sigma in (0.01, 0.03):
        noise = torch.Generator().manual_seed(0)
        worse = {k: v + sigma * torch.randn(v.shape, generator=noise, dtype=v.dtype) for k, v in truth.items()}
        worse["poses"] = torch.stack([pose(10 * i + 100 * sigma * i, (i, 1.0, 0.0)) for i in range(4)])
        found.append(evaluate_geometry([worse], [truth]))
    for a, b in zip(found[0].rows, found[1].rows, strict=True):
        assert a.value > b.value if a.better == "higher" else a.value < b.value, a.metric


def test_bad_scenes_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(BadData, match=r"x\.npz"):
        load_scene(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="none of poses"):
        load_scene(tmp_path / "y.npz")
    with pytest.raises(ValueError, match="nothing to compare"):
        evaluate_geometry([{"depth": torch.ones(1, 2, 2)}], [{"points": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match="found 1 and 0"):
        evaluate_geometry([{}], [])
    with pytest.raises(ValueError, match="S >= 2"):
        relative_errors(pose(0)[None], pose(0)[None])
