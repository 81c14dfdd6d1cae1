"""Named recipes: each is a few lines of data. `get(name)`, `names()`, and `auto(device)` which picks by what the device runs fastest."""

__all__ = ["auto", "get", "names"]

from dataclasses import replace
from typing import Any

import torch

from qgen.errors import unknown
from qgen.methods.adaround import AdaRound
from qgen.methods.awq import AWQ
from qgen.methods.balance import Balance
from qgen.methods.bias import BiasCorrection
from qgen.methods.clip import Clip
from qgen.methods.dither import Dither
from qgen.methods.format_search import FormatSearch
from qgen.methods.gptq import GPTQ
from qgen.methods.learned_bases import LearnedBases
from qgen.methods.lowrank import LowRank
from qgen.methods.reconstruct import Reconstruct
from qgen.methods.reparametrize import Reparametrize
from qgen.methods.rotate import Rotate
from qgen.methods.signround import SignRound
from qgen.methods.smooth import Smooth
from qgen.methods.start_token import StartToken
from qgen.methods.temporal import Center, Static, TemporalBias
from qgen.methods.vq4dit import VQ4DiT
from qgen.recipe import Recipe, Rule, Spec

_SVDQUANT = (Balance(), LowRank(32, rounds=3), GPTQ(), Reconstruct(rounds=3), BiasCorrection())
# One bias serves all timesteps, and one curve the centres where it is worth its row: a row for each bin costs as much as so many ranks.
_CENTER, _BIAS = Center(curves=1, worth=0.03), TemporalBias(curves=0)
_TIMED = (_CENTER, *_SVDQUANT[:-1], Dither(), _BIAS)
_STATIC = (_CENTER, *_SVDQUANT[:-1], Static(), _BIAS)
_STATIC4 = (*_STATIC[:-1], Dither(), _STATIC[-1])
_FINE = 32  # bins: most runs have a step in each
_SPLITS = tuple(f"fp4_{split}_g64" for split in ("e1m2", "e2m1", "e3m0"))
_UNSIGNED = tuple(f"ufp4_{split}_g64" for split in ("e1m3", "e2m2", "e3m1"))
_OUTSIDE = Rule("*", None, role="outside", why="embedder or head, outside the repeated blocks")
_VECTOR = Rule(
    "*",
    Spec("int4_g64", None),
    role="vector",
    why="one row per sample (time or modulation): 4-bit weights, 16-bit input",
)
_NARROW = Rule("*", None, below=32, why="fewer than 32 inputs or outputs")
_RULES = (_VECTOR, _OUTSIDE, _NARROW)
# Recipes for whole models whose convolutions have 8 bits, and how; those named after a published method keep that method's formats.
_CONVOLVED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("svdquant-int4", "svdquant-nvfp4", "temporal-int4", "temporal-nvfp4", "w4a8"), (Smooth(),)),
    **dict.fromkeys(("w4a8-static", "w4a4-static"), (Smooth(), Static())),
    **dict.fromkeys(("rtn-int4", "rtn-nvfp4"), ()),
}


def _context(*methods: Any) -> Rule:
    """Few rows, the same at every step: what rounding adds to them does not average out over the steps, and 8 bits cost little there."""
    spec = Spec("int4_s8_g64", "int8_row", methods)
    return Rule("*", spec, role="context", kind="linear", why="text, the same at every step: 8-bit input")


def _convolutions(spec: Spec, methods: tuple[Any, ...]) -> tuple[Rule, ...]:
    """Convolutions of UNets in 8 bits, weights and inputs: a pixel that stands out spoils the few scales of all patches that hold it.

    Whole output of the demo's UNet on held-out calls, "svdquant-int4": 36.1 dB, 26.2 with 4 bits (`demos/unet.py --samples 12 --steps 3`).
    Q-Diffusion stays above 4-bit inputs as well (https://arxiv.org/abs/2302.04304). `Recipe.without("conv*")` takes these rules out.
    Sana's feed-forward layers are convolutions of 1 x 1 by name alone, and are treated as linear layers.
    """
    eight = Spec("int8_row", "int8_row", methods, bins=spec.bins if any(m.name == "static" for m in methods) else 1)
    linear = (Rule(p, spec, kind="conv*", why="feed-forward layer of a transformer") for p in ("*.ff.*", "*.mlp.*"))
    return (Rule("*", eight, kind="conv*", why="convolution: 8 bits"), *linear)


def _recipes() -> dict[str, Recipe]:
    full, plain = (_context(*_SVDQUANT),), (_context(),)
    made = {
        "svdquant-int4": (
            Spec("int4_g64", "uint4_g64", _SVDQUANT),
            "W4A4, integer: learned smoothing, rank 32, GPTQ, zero points; text and convolutions in 8 bits",
            full,
        ),
        "svdquant-nvfp4": (
            Spec("nvfp4", "nvfp4_dynamic", _SVDQUANT),
            "W4A4, NVFP4: learned smoothing, rank 32, GPTQ; text and convolutions in 8 bits",
            full,
        ),
        "w4a8": (
            Spec("int4_s8_g64", "int8_row", _SVDQUANT),
            "4-bit weights with integer sub-scales, 8-bit activations, rank 32; convolutions in 8 bits",
            (),
        ),
        "temporal-int4": (
            Spec("int4_g64", "uint4_g64", _TIMED, bins=_FINE),
            "svdquant-int4 with inputs centred, and dithered from timestep to timestep so that errors do not add up",
            full,
        ),
        "temporal-nvfp4": (
            Spec("nvfp4", "nvfp4_dynamic", _TIMED, bins=_FINE),
            "svdquant-nvfp4 with inputs centred, and dithered from timestep to timestep so that errors do not add up",
            full,
        ),
        "w4a8-static": (
            Spec("int4_s8_g64", "int8_row", _STATIC, bins=_FINE),
            "w4a8 with activation scales fixed for each of up to 32 timesteps: nothing is measured at run time",
            (),
        ),
        "w4a4-static": (
            Spec("int4_g64", "int4_g64", _STATIC4, bins=_FINE),
            "W4A4, integer, with activation scales fixed for each of up to 32 timesteps; text and convolutions in 8 bits",
            (_context(*_STATIC),),
        ),
        "w4a16": (Spec("uint4_g64", None, _SVDQUANT), "4-bit weights, 16-bit activations, rank 32", ()),
        "nunchaku-int4": (
            Spec("int4_g64", "int4_g64", _SVDQUANT, share=True),
            "W4A4 as Nunchaku's files hold it: signed inputs, one smoothing for layers that share an input",
            (),
        ),
        "nunchaku-nvfp4": (
            Spec("nvfp4", "nvfp4_dynamic", _SVDQUANT, share=True),
            "W4A4, NVFP4, as Nunchaku's files hold it",
            (),
        ),
        "vidit-q": (
            Spec("int4_row", "int8_row", (Smooth(), Rotate())),
            "4-bit weights per channel, 8-bit activations per token, smoothed and rotated",
            (),
        ),
        "fp4dit": (
            Spec("fp4_e2m1_g128", "fp8_e4m3_row", (AdaRound(),)),
            "FP4 weights with learned rounding, FP8 activations",
            (),
        ),
        "fp-search": (
            Spec("fp4_e2m1_g64", "fp4_e2m1_g64", (FormatSearch(_SPLITS, (*_SPLITS, *_UNSIGNED)), AdaRound())),
            "W4A4, floats: the split of exponent and mantissa, sign and clipping searched layer by layer (LLM-FP4, MSFP)",
            (),
        ),
        "repquant": (
            Spec("int4_g64", "int8_row", (Center("middle"), Reparametrize(), AdaRound(), Static(), TemporalBias())),
            "4-bit weights, 8-bit activations under one static scale, channels evened out before it (RepQuant)",
            (),
        ),
        "dgq": (
            Spec(
                "int4_g64",
                "int8_row",
                (Center("middle"), Reparametrize(groups=16), AdaRound(), Static(), TemporalBias()),
                bins=8,
            ),
            "as repquant with 16 groups of channels and 8 bins of timesteps (DGQ)",
            (),
        ),
        "tfmq": (
            Spec("int4_g64", "int8_row", (AdaRound(), Static()), bins=8),
            "4-bit weights, static 8-bit activations in 8 bins; time and modulation layers learned on their timesteps (TFMQ-DM)",
            (),
        ),
        "mixdq": (
            Spec("int4_g64", "int8_row", (GPTQ(), Static(), BiasCorrection())),
            "4-bit weights, one static 8-bit scale for each input, the start token of texts apart (MixDQ)",
            (_context(StartToken(), GPTQ(), Static(), BiasCorrection()),),
        ),
        "genie": (
            Spec("int4_row", "int8_row", (AdaRound(step_rate=1e-3),)),
            "4-bit weights, steps and roundings learned together",
            (),
        ),
        "binarydm": (
            Spec("binary2_g64", None, (LearnedBases(),)),
            "sums of two binary planes with learned scales: 2 bits",
            (),
        ),
        "signround": (Spec("uint4_g64", None, (SignRound(),)), "4-bit weights with learned rounding and clipping", ()),
        **_language(),
        "vq4dit": (
            Spec("vq2_d4", None, (VQ4DiT(),)),
            "2-bit weights: vectors of four and a learned codebook per layer",
            (),
        ),
        "w8a8": (Spec("int8_row", "int8_row", (Smooth(),)), "8-bit integers", ()),
        "fp8": (Spec("fp8_e4m3_row", "fp8_e4m3_row"), "8-bit floats, no calibration", ()),
        "rtn-int4": (Spec("int4_g64", "int4_g64"), "W4A4 rounded to nearest, no calibration: the baseline", plain),
        "rtn-w4a16": (
            Spec("uint4_g64"),
            "4-bit weights rounded to nearest, 16-bit activations, no calibration: works while loading",
            (),
        ),
        "rtn-nvfp4": (Spec("nvfp4", "nvfp4_dynamic"), "W4A4 NVFP4 rounded to nearest, no calibration", plain),
    }
    found = {name: Recipe(spec, (*rules, *_RULES), name, about) for name, (spec, about, rules) in made.items()}
    vector = replace(_VECTOR, spec=replace(_VECTOR.spec, methods=(AdaRound(),)))
    for name, methods in _CONVOLVED.items():
        rules = _convolutions(found[name].default, methods)
        found[name] = replace(found[name], rules=(*rules, *found[name].rules))
    found["tfmq"] = replace(found["tfmq"], rules=(vector, *found["tfmq"].rules[1:]))
    return found


def _language() -> dict[str, tuple[Spec, str, tuple[Rule, ...]]]:
    """Recipes for language models, under the names of what they follow; they serve any other model as well."""
    return {
        "awq-w4a16": (
            Spec("uint4_g64", None, (AWQ(), Clip())),
            "4-bit weights, 16-bit activations: salient channels on a finer grid, ranges clipped",
            (),
        ),
        "gptq-w4a16": (
            Spec("uint4_g64", None, (GPTQ(),)),
            "4-bit weights rounded one column after another, 16-bit activations",
            (),
        ),
        "loftq-w4a16": (
            Spec("uint4_g64", None, (LowRank(32, rounds=5),)),
            "4-bit weights and rank 32, fitted in turns, 16-bit activations",
            (),
        ),
        "qoq-w4a8": (
            Spec("int4_s8_g64", "int8_row", (Smooth(), Rotate(), GPTQ())),
            "4-bit weights with integer sub-scales, 8-bit activations per token, smoothed and rotated",
            (),
        ),
        "quarot-w4a4": (
            Spec("int4_g64", "int4_g64", (Rotate(), GPTQ())),
            "W4A4, integer: inputs rotated where they enter a layer, GPTQ",
            (),
        ),
    }


def names() -> list[str]:
    """All recipe names, "auto" included."""
    return ["auto", *_recipes()]


def get(name: str, device: torch.device | str = "cpu") -> Recipe:
    """The recipe called `name`; "auto" picks for `device`. ValueError with the nearest name if there is none."""
    if name == "auto":
        return auto(device)
    made = _recipes()
    if name not in made:
        raise ValueError(unknown("recipe", name, names()))
    return made[name]


def auto(device: torch.device | str = "cpu") -> Recipe:
    """NVFP4 where tensor cores run it (capability 10.0 and up), integer W4A8 elsewhere: on int8 units 4-bit activations are no faster."""
    device = torch.device(device)
    blackwell = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (10, 0)
    return replace(get("svdquant-nvfp4" if blackwell else "w4a8"), name="auto")
