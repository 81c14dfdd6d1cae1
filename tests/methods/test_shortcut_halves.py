"""Shortcuts of UNets read a concatenation of two tensors of unlike ranges (Q-Diffusion, https://arxiv.org/abs/2302.04304).

One scale for both destroys the smaller. Blocks of 64 channels keep halves apart wherever they meet at a multiple of 64; where a scale
covers a whole patch, smoothing, one factor for each channel, does nearly what a scale for each half would do.
"""

import torch
from torch import nn

import qgen
from qgen.methods.smooth import Smooth
from qgen.recipe import Recipe, Spec

QUIET, LOUD, N = 64, 96, 80  # channels of h and of the skip connection; they do not meet in the middle


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_shortcut = nn.Conv2d(QUIET + LOUD, N, 1)

    def forward(self, h, skip):
        return self.conv_shortcut(torch.cat([h, skip], 1))


def made(seed=0):
    """The layer with weights scaled inversely to its inputs, and calls."""
    torch.manual_seed(seed)
    model = Shortcut().requires_grad_(False)
    model.conv_shortcut.weight[:, :QUIET] /= 0.3
    model.conv_shortcut.weight[:, QUIET:] /= 6
    calls = [(0.3 * torch.randn(1, QUIET, 8, 8), 6 * torch.randn(1, LOUD, 8, 8)) for _ in range(8)]
    return model, [(call, {}) for call in calls]


def error(spec, parts=None):
    """Relative squared error on a new input; parts: specs of the two halves, quantized apart, in place of one for both."""
    model, calls = made()
    (h, skip), _ = made(seed=5)[1][0]
    want = model(h, skip) - model.conv_shortcut.bias[:, None, None]
    if parts is None:
        qgen.quantize(model, Recipe(spec), calibration=calls, progress=False)
        got = model(h, skip) - made()[0].conv_shortcut.bias[:, None, None]
    else:
        got = sum(half(model, x, at, spec) for x, at in ((h, slice(0, QUIET)), (skip, slice(QUIET, None))))
    return float((got - want).square().sum() / want.square().sum())


def half(model, x, channels, spec):
    conv = nn.Conv2d(x.shape[1], N, 1, bias=False).requires_grad_(False)
    conv.weight.copy_(model.conv_shortcut.weight[:, channels])
    return qgen.quantize(nn.Sequential(conv), Recipe(spec), progress=False)(x)


def test_smoothing_does_nearly_what_two_halves_do():
    """Per-patch, per-output scales, as an integer kernel for 8 bits has them, here with 4 bits so that the damage shows."""
    joint = error(Spec("int4_row", "int4_row"))
    halves = error(Spec("int4_row", "int4_row"), parts=True)
    smoothed = error(Spec("int4_row", "int4_row", (Smooth(),)))
    assert halves <= 0.2 * joint
    assert smoothed <= 0.2 * joint and smoothed <= 1.25 * halves  # measured: 0.0196 against 0.0170, of 0.997


def test_blocks_keep_halves_apart():
    """64 is where they meet: blocks of 64 channels give each half scales of its own, without calibration."""
    joint = error(Spec("int4_row", "int4_row"))
    assert error(Spec("int4_g64", "int4_g64")) <= 0.2 * joint
