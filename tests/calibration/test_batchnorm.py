"""Images from batch norms' statistics: nearer to real ranges than noise, and the module that gave them stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgen
from qgen.calibration.base import calibrators
from qgen.calibration.batchnorm import BatchNormMatch, mismatch
from qgen.methods.gptq import GPTQ
from qgen.recipe import Recipe, Spec

SHAPE = (3, 16, 16)


def coloured(count, seed):
    """Low-frequency noise: few cells, enlarged, at mean 0 and deviation 1 per image, as real pictures are more than white noise is."""
    x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, size=16, mode="bicubic")
    return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)


def trained(seed=0):
    """Two convolutions with batch norms, trained for a while to tell how an image is tilted."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip
    head = nn.Linear(8, 2)
    adam = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-2)
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / 40)  # so that statistics catch up
    for step in range(40):
        x = coloured(16, 1000 * seed + step)
        tilt = torch.stack([x[..., 8:].mean((1, 2, 3)), x[:, :, 8:].mean((1, 2, 3))], 1)
        loss = F.mse_loss(head(net(x).mean((2, 3))), tilt)
        adam.zero_grad()
        loss.backward()
        adam.step()
        fall.step()
    return net.eval().requires_grad_(False)


def test_matched_images_have_the_ranges_of_real_ones():
    """ZeroQ's card, test 1: the loss falls to 2 %, and ranges of the output are nearer to real ones, over five seeds."""
    matched, white = [], []
    for seed in range(5):
        net, noise = trained(seed), torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(seed))
        x = BatchNormMatch(SHAPE, images=32, steps=60, rate=0.2).draw(net, seed)
        assert float(mismatch(net, x)) <= 0.02 * float(mismatch(net, noise))
        real = net(coloured(64, 99_000 + seed)).amax((0, 2, 3))
        off = lambda x, real=real, net=net: float((net(x).amax((0, 2, 3)) / real).log().abs().mean())  # noqa: E731
        matched.append(off(x))
        white.append(off(noise))
    assert sum(matched) < sum(white), (matched, white)


def test_the_same_seed_is_the_same_set_and_the_module_stays():
    net = trained().train()
    before = copy.deepcopy(net.state_dict())
    make = calibrators["batchnorm"](SHAPE, images=20, steps=5)
    sets = [make.calls(net, {"": net}, seed=seed)[""] for seed in (1, 1, 2)]
    assert sets[0].digest() == sets[1].digest() != sets[2].digest()
    assert [len(call.args[0]) for call in sets[0].calls] == [8, 8, 4] and sum(c.moment.held for c in sets[0].calls) == 1
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(m.training for m in net.modules()) and not any(m._forward_pre_hooks for m in net.modules())


def test_a_net_is_quantized_without_any_data():
    recipe = Recipe(Spec("int4_row", "int8_row", (GPTQ(),)))
    x, net = coloured(32, 7), trained()
    want = net(x)
    plain = qgen.quantize(trained(), Recipe(Spec("int4_row", "int8_row")), progress=False)
    made = qgen.quantize(trained(), recipe, calibration=BatchNormMatch(SHAPE, images=32, steps=30), progress=False)
    assert type(made[0]).__name__ == "QuantConv2d"
    assert (made(x) - want).norm() < (plain(x) - want).norm()


def test_norms_that_remember_nothing_are_refused():
    for norm in (nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False)):
        with pytest.raises(ValueError, match="no batch norm with running statistics"):
            BatchNormMatch(SHAPE).draw(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
