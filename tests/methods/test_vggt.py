"""VGGT's structure with planted special tokens at W4A4: smoothing and rotation together beat either alone and rounding to nearest."""

import copy
import random

import pytest
import torch

import qgen
from qgen.calibration.noise_filtered import noise_filtered
from qgen.methods.rotate import Rotate
from qgen.methods.smooth import Smooth
from qgen.methods.temporal import Static
from qgen.recipe import Recipe, Rule, Spec
from tests import vggt

METHODS = {"rtn": (), "smooth": (Smooth(),), "rotate": (Rotate(128),), "both": (Smooth(), Rotate(128))}
OUTPUTS = ("pose_enc", "depth")


@pytest.fixture(scope="module")
def model():
    return vggt.make(large=20.0, channels=4)


@pytest.fixture(scope="module")
def truth(model):
    scenes = [vggt.scene(100 + i) for i in range(6)]
    return [(x, model(x)) for x in scenes]


def quantized(model, methods, scenes):
    made = copy.deepcopy(model)
    rules = (Rule("*", None), Rule("aggregator.*_blocks.*", Spec("int4_row", "int4_row", methods)))
    return qgen.quantize(made, Recipe(None, rules), calibration=scenes, progress=False)


def errors(model, truth):
    """Relative errors of cameras and depth, mean over scenes."""
    made = [
        [float((got[n] - want[n]).norm() / want[n].norm()) for n in OUTPUTS]
        for got, want in ((model(x), w) for x, w in truth)
    ]
    return torch.tensor(made).mean(0)


def test_planted_channels_leave_the_function(model):
    """Scaling a norm's channel up and its reader down changes nothing; the special tokens do have a heavy tail."""
    x = vggt.scene(3)
    plain = vggt.make(large=1.0)
    assert torch.allclose(plain(x)["depth"], model(x)["depth"], rtol=1e-3)
    seen = []
    hook = model.aggregator.frame_blocks[1].norm1.register_forward_hook(lambda m, a, out: seen.append(out))
    model(x)
    hook.remove()
    tail = (seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean(0)  # per token, over frames
    assert float(tail.max()) > 5
    assert len(model(x)["pose_enc"][0]) == 3 and not torch.equal(model(x)["pose_enc"], model(vggt.scene(4))["pose_enc"])


def test_everything_in_the_blocks_is_quantized_and_saved(model, tmp_path):
    made = quantized(model, (), [vggt.scene(0)])
    packed = [path for path, layer in made.named_modules() if isinstance(layer, qgen.nn.packed.Packed)]
    assert len(packed) == 2 * 4 * 4
    x = vggt.scene(9)
    qgen.save(made, tmp_path)
    loaded = qgen.load(tmp_path, into=copy.deepcopy(model))
    assert torch.equal(loaded(x)["depth"], made(x)["depth"])


def test_attention_of_frames_and_of_all_frames_in_low_bits(model, truth):
    made = quantized(model, (), [vggt.scene(0)])
    plain = errors(made, truth)
    made = copy.deepcopy(model)
    rules = (Rule("*", None), Rule("aggregator.*_blocks.*", Spec("int4_row", "int4_row")))
    qgen.quantize(made, Recipe(None, rules), calibration=[vggt.scene(0)], attention="int8", progress=False)
    served = made.qgen_attention.layers
    assert {path.rpartition(".blocks")[0] or path.split(".")[1] for path in served} >= {"frame_blocks", "global_blocks"}
    assert bool((errors(made, truth) < plain + 0.02).all())


@pytest.mark.slow
def test_both_beat_either_alone_and_rounding_to_nearest(model, truth):
    scenes = [vggt.scene(i) for i in range(8)]
    found = {name: errors(quantized(model, methods, scenes), truth) for name, methods in METHODS.items()}
    for name in ("rtn", "smooth", "rotate"):
        assert bool((found["both"] < found[name]).all()), found
    assert bool((found["both"] < 0.6 * found["rtn"]).all()), found


def test_noise_filtered_scenes_hold_no_corrupted_one(model):
    """Every tenth scene is corrupted; of six random scenes of these forty, one on average in two draws is."""
    scenes = [vggt.scene(i, corrupt=i % 10 == 3) for i in range(40)]
    layers = [f"aggregator.{kind}_blocks.{i}.norm1" for kind in ("frame", "global") for i in (2, 3)]
    found = noise_filtered(model, scenes, layers, count=6, frames=3)
    assert set(found.dropped) >= {i for i in range(40) if i % 10 == 3}
    assert not any(i % 10 == 3 for i in found.chosen)
    assert len(found.dropped) <= 6


LAYERS = [
    "aggregator.patch_embed",
    *(f"aggregator.{kind}_blocks.{i}.norm1" for kind in ("frame", "global") for i in (2, 3)),
]


def draws(model, seed, count=6):
    """Forty scenes, four of them corrupted: the numbers of those, of a filtered and of a random choice, and the scenes."""
    bad = set(random.Random(seed).sample(range(40), 4))
    scenes = [vggt.scene(1000 * seed + i, corrupt=i in bad) for i in range(40)]
    filtered = noise_filtered(model, scenes, LAYERS, count=count, frames=3, seed=seed)
    return bad, filtered, random.Random(100 + seed).sample(range(40), count), scenes


@pytest.mark.slow
def test_filtered_scenes_beat_random_ones_where_scales_are_fixed_beforehand(model, truth):
    """The patch embedding reads pixels, which no norm bounds: a static scale must cover what calibration saw. Random draws of six
    scenes, one in two of which holds a corrupted one, against filtered ones: mean error of cameras and of depth over eight seeds."""
    static = Rule("aggregator.patch_embed", Spec("int8_row", "int8_row", (Static(),)))
    recipe = Recipe(None, (Rule("aggregator.*_blocks.*", Spec("int4_row", "int8_row")), static))

    def error(scenes):
        return errors(qgen.quantize(copy.deepcopy(model), recipe, calibration=scenes, progress=False), truth)

    mine, theirs, spoiled = [], [], 0
    for seed in range(8):
        bad, filtered, drawn, scenes = draws(model, seed)
        assert not bad & set(filtered.chosen) and set(filtered.dropped) >= bad and len(filtered.dropped) <= len(bad) + 6
        spoiled += bool(bad & set(drawn))
        mine.append(error(filtered.calls))
        theirs.append(error([scenes[i] for i in drawn]))
    mine, theirs = torch.stack(mine), torch.stack(theirs)
    assert spoiled >= 2
    assert bool((mine.mean(0) < theirs.mean(0)).all()), (mine.mean(0), theirs.mean(0))
    assert float(theirs.mean(0)[1] / mine.mean(0)[1]) > 1.2, (mine, theirs)
