"""ComfyUI's formats against comfy-kitchen's own plain-torch functions: the same bytes for a million random values and all special ones.

Where the two differ on purpose, a test says by how much: zeros, blocks below 2^-127, float32 logarithms, sums in another order.
"""

import pytest
import torch

from qgen import formats
from qgen.io.peers.base import Layer
from qgen.io.peers.comfy_blocked import blocked, blocked_shape, unblocked
from qgen.io.peers.comfy_formats import FORMATS
from qgen.io.peers.floats import dequantized
from qgen.kernels import reference
from qgen.kernels.slots import Slots
from qgen.nn.packed import Layout

pytest.importorskip("comfy_kitchen", reason="the truth of these tests is comfy-kitchen: pip install comfy-kitchen")
from comfy_kitchen.backends.eager import awq, convrot_w4a4, quantization, svdquant

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, -1e-38, 3e35, -1e30, 65504.0, 448.0, -448.0, 464.0, 1e-10, -1e-12]
SPECIAL += [i / 4 for i in range(-28, 29)] + [(i + 0.5) / 127 for i in range(-127, 127)] + [127.0, -127.0, 127.5]
SPECIAL += [2.0**e for e in range(-140, 100, 3)] + [-1.75 * 2.0**e for e in range(-130, 100, 7)]


def random_weight(rows=1024, columns=1024):
    """A million values whose size varies over rows and columns, so that no two scales are alike."""
    w = torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1)) * torch.exp(torch.randn(1, columns))
    return 0.02 * w


def special_weight():
    """Every special value in every place of a block, beside others of its kind, beside all others, and beside random ones."""
    values = torch.tensor(SPECIAL)
    values = values[torch.randperm(len(values))].repeat(5)[:1024]
    shifted = torch.stack([values.roll(i) for i in range(64)])
    alone = torch.zeros(64, 1024)
    alone[:, ::37] = shifted[:, ::37]
    return torch.cat([shifted, shifted.sort(-1).values, alone, random_weight(64) * (1 + shifted.abs().clamp(max=1e3))])


def fp8(w, dtype):
    scale = w.abs().amax() / torch.finfo(dtype).max
    codes = quantization.quantize_per_tensor_fp8(w, scale, dtype)
    return {"weight": codes, "weight_scale": scale}, quantization.dequantize_per_tensor_fp8(codes, scale, torch.float32)


def nvfp4(w):
    scale = w.abs().amax() / (448 * 6)
    codes, scales = quantization.quantize_nvfp4(w, scale)
    values = quantization.dequantize_nvfp4(codes, scale, scales, torch.float32)
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": scale}, values


def mxfp8(w):
    codes, scales = quantization.quantize_mxfp8(w)
    values = quantization.dequantize_mxfp8(codes, scales, torch.float32)
    return {"weight": codes, "weight_scale": scales}, values


def int8(w):
    codes, scales = quantization.quantize_int8_rowwise(w)
    return {"weight": codes, "weight_scale": scales}, quantization.dequantize_int8_simple(codes, scales)


def int8_convrot(w):
    codes, scales = quantization.quantize_int8_convrot_weight(w, 256)
    return {"weight": codes, "weight_scale": scales}, quantization.dequantize_int8_convrot_weight(codes, scales, 256)


def convrot(w):
    codes, scales = convrot_w4a4.quantize_convrot_w4a4_weight(w, 256)
    return {"weight": codes, "weight_scale": scales}, convrot_w4a4.dequantize_convrot_w4a4_weight(codes, scales, 256)


THEIRS = {
    "fp8": lambda w: fp8(w, torch.float8_e4m3fn),
    "fp8_e5m2": lambda w: fp8(w, torch.float8_e5m2),
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "int8": int8,
    "int8_convrot": int8_convrot,
    "convrot_w4a4": convrot,
}
ROTATED = ("int8_convrot", "convrot_w4a4")


def same(ours, theirs):
    """Equal bit for bit, signs of zeros included."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    return torch.equal(ours.contiguous().view(width), theirs.contiguous().view(width))


def kept(name, w):
    """(tensors that would be stored, the layer)."""
    layer = FORMATS[name].quantize("x", w, torch.bfloat16)
    assert FORMATS[name].refusal(layer) == ""
    return FORMATS[name].store(layer)[0], layer


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("values", ["random", "special"])
def test_the_bytes_are_comfy_kitchens(name, values):
    w = random_weight() if values == "random" else special_weight()
    (theirs, meant), (ours, layer) = THEIRS[name](w), kept(name, w)
    assert sorted(theirs) == sorted(ours)
    if (
        name == "mxfp8"
    ):  # blocks whose scale is 0: comfy-kitchen divides by it, so zeros are NaN there; here all their codes are 0
        dead = unblocked(theirs["weight_scale"].view(torch.uint8), len(w), 32).eq(0).repeat_interleave(32, 1)
        assert bool(dead.any()) == (values == "special") and bool(dead[meant.isnan()].all())
        theirs["weight"] = theirs["weight"].view(torch.uint8).masked_fill(dead, 0).view(torch.float8_e4m3fn)
        meant = meant.masked_fill(dead, 0)
    for suffix, tensor in theirs.items():
        assert same(ours[suffix], tensor), suffix
    if name not in ROTATED:
        assert torch.equal(dequantized(layer)[0], meant)


@pytest.mark.parametrize("name", ROTATED)
def test_rotated_weights_mean_the_same(name):
    """Codes and scales are equal; rotating back sums 256 terms in another order."""
    w = random_weight(256)
    _, meant = THEIRS[name](w)
    values = dequantized(kept(name, w)[1])[0]
    assert float((values - meant).norm() / meant.norm()) < 1e-6


@pytest.mark.parametrize("name", THEIRS)
def test_rows_of_zeros(name):
    """Zeros stay zeros. The scale that nothing is multiplied by may be another one: comfy-kitchen avoids 0 for integers."""
    w = random_weight(64, 512)
    w[3], w[17, :64] = 0, 0
    (theirs, _), (ours, layer) = THEIRS[name](w), kept(name, w)
    assert same(ours["weight"], theirs["weight"])
    assert bool((dequantized(layer)[0][3] == 0).all())
    layer = FORMATS[name].quantize("x", torch.zeros(64, 512), torch.bfloat16)
    assert bool((dequantized(layer)[0] == 0).all())


def test_mxfp8_exponents_are_exact_where_a_logarithm_rounds():
    """448 · 2^e and the next float32 above it: e, and e + 1; comfy-kitchen's float32 logarithm gives e twice far from e = 0."""
    top = torch.tensor([448 * 2.0**e for e in range(-60, 60)])
    above = torch.nextafter(top, torch.tensor(torch.inf))
    scales = [
        kept("mxfp8", x[:, None].expand(-1, 32).repeat(8, 1)[:96].contiguous())[1].slots["scales"] for x in (top, above)
    ]
    assert torch.equal(scales[0] + 1, scales[1])
    theirs = quantization.quantize_mxfp8(above[:96, None].expand(-1, 32).contiguous())[1].view(torch.uint8)
    differ = (unblocked(theirs, 96, 1) != scales[1]).float().mean()
    assert 0.5 < differ < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_awq_values(dtype):
    n, k = 256, 512
    stored = {"weight": torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)}
    stored |= {name: torch.randn(k // 64, n).to(dtype) for name in ("weight_scale", "weight_zeros")}
    layer = loaded("awq_w4a16", stored, dtype)
    params = {"wscales": stored["weight_scale"].float(), "wzeros": stored["weight_zeros"].float()}
    theirs = awq.gemv_awq_w4a16(torch.eye(k), stored["weight"], **params).T
    assert torch.equal(dequantized(layer)[0], theirs) and layer.layout.weight.startswith("int4o_g64")
    x = torch.randn(8, k)
    y, want = run(layer, x), awq.gemv_awq_w4a16(x, stored["weight"], **params)
    assert float((y - want).norm() / want.norm()) < 1e-5


def loaded(format, stored, dtype=torch.bfloat16, **options):
    """The layer that the importer makes of tensors by suffix."""
    from qgen.io.peers import comfy_marks
    from qgen.io.peers.comfy_found import Found
    from tests.io.peers.conftest import DictSource

    source = DictSource({f"x.{suffix}": tensor for suffix, tensor in stored.items()})
    (layer,) = FORMATS[format].load(Found(source, "x", comfy_marks.Mark(FORMATS[format].format, options)))
    assert isinstance(layer, Layer)
    return layer


def run(layer, x):
    layout = layer.layout
    return reference.linear(x, Slots.of(layer.slots, layout.weight, layout.act, layer.shape[0], layout.hadamard))


def svdquant_layer(n=256, k=512, rank=32, unsigned=False):
    stored = {
        "weight": torch.randint(-128, 128, (n, k // 2), dtype=torch.int8),
        "weight_scale": (0.01 * torch.rand(k // 64, n) + 0.001).bfloat16(),
        "smooth_factor": torch.exp(0.5 * torch.randn(k)).bfloat16(),
        "proj_down": (0.1 * torch.randn(k, rank)).bfloat16(),
        "proj_up": (0.1 * torch.randn(n, rank)).bfloat16(),
        "bias": torch.randn(n).bfloat16(),
    }
    return stored, loaded("svdquant_w4a4", stored, **({"act_unsigned": True} if unsigned else {}))


def svdquant_theirs(stored, x, unsigned=False):
    shifted = x + 0.171875 if unsigned else x
    args = (shifted, stored["smooth_factor"].to(x.dtype), stored["proj_down"].to(x.dtype))
    codes, scales, low = svdquant.quantize_svdquant_w4a4(*args, act_unsigned=unsigned, lora_x=x)
    weights = (stored["weight"], scales, stored["weight_scale"].to(x.dtype), low, stored["proj_up"].to(x.dtype))
    codes, scales = (codes, *weights), stored["bias"].to(x.dtype)
    return svdquant.scaled_mm_svdquant_w4a4(codes[0], *codes[1:], bias=scales, act_unsigned=unsigned)[: len(x)]


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_svdquant_on_the_same_codes(unsigned, dtype):
    """Inputs that lie on the grid after smoothing get the same codes from both; what is left is the rounding of sums."""
    stored, _ = svdquant_layer()
    stored["smooth_factor"] = 2.0 ** torch.randint(-2, 3, (512,)).bfloat16()
    codes = torch.randint(0 if unsigned else -7, 16 if unsigned else 8, (64, 8, 64)).float()
    codes[..., 0] = 15 if unsigned else 7  # the largest, which sets the scale
    codes = codes * 2.0 ** torch.randint(-4, 1, (64, 8, 1)) if not unsigned else codes / 64
    x = codes.flatten(1) * stored["smooth_factor"].float() - (0.171875 if unsigned else 0)
    x = x.to(dtype)
    layer = loaded("svdquant_w4a4", stored, **({"act_unsigned": True} if unsigned else {}))
    theirs = svdquant_theirs(stored, x, unsigned).float()
    error = float((run(layer, x).float() - theirs).norm() / theirs.norm())
    assert error <= (1e-6 if dtype == torch.float32 else 8e-3), error


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_svdquant_on_any_input(unsigned, dtype):
    """Scales of activations are bfloat16 here; comfy-kitchen smooths and divides in x's dtype. Both move values across midpoints."""
    stored, layer = svdquant_layer(unsigned=unsigned)
    x = torch.nn.functional.gelu(torch.randn(64, 512)) if unsigned else torch.randn(64, 512)
    x = x.to(dtype)
    theirs = svdquant_theirs(stored, x, unsigned).float()
    error = float((run(layer, x).float() - theirs).norm() / theirs.norm())
    assert error <= (1.5e-2 if dtype == torch.float32 else 2.5e-2), error


def test_svdquant_weights_and_activations():
    """Weights: bit for bit. Activations: 1 / smooth and 1 / scale are multiplied by here, so some values next to a midpoint round apart."""
    stored, layer = svdquant_layer()
    codes = svdquant._unpack_int4_row_major(stored["weight"]).float()
    theirs = (codes.unflatten(1, (-1, 64)) * stored["weight_scale"].float().T[..., None]).flatten(1)
    slots = layer.slots
    assert torch.equal(reference.weight(slots["codes"], slots["scales"], None, None, "int4_g64"), theirs)
    x = torch.randn(2048, 512)  # a million values
    packed, scales, _ = svdquant.quantize_svdquant_w4a4(x, torch.ones(512), torch.zeros(512, 16))
    fmt = formats.get("int4_g64")
    float_scales = formats.QTensor(x, scales.T, None, None, "int4_g64")
    ours = fmt.unpack(fmt.quantize(x, like=float_scales).codes)
    theirs = fmt.unpack(packed.view(torch.uint8))
    assert torch.equal(ours, theirs)
    multiplied = fmt.unpack(fmt.quantize(x, like=float_scales, reciprocal=True).codes)
    assert float((multiplied != theirs).float().mean()) < 1e-4


def test_svdquant_tiles():
    """The tiled order of a file is undone: comfy-kitchen's own function, and a formula written here."""
    stored, layer = svdquant_layer()
    tiled = dict(stored)
    n, k = 256, 512
    tiles = torch.empty(n // 128, k // 64, 32, 128, dtype=torch.int8)
    for t in range(n // 128):
        for q in range(32):
            for i in range(4):
                row = stored["weight"][128 * t + 4 * q + i].view(k // 64, 32)
                tiles[t, :, q, 32 * i : 32 * i + 32] = row
    tiled["weight"] = tiles
    tiled["weight_scale"] = stored["weight_scale"].view(k // 64, n // 128, 128).permute(1, 0, 2).contiguous()
    tiled["proj_up"] = stored["proj_up"].view(n // 128, 128, 32).permute(0, 2, 1).contiguous()
    assert torch.equal(svdquant._tile_packed_weight_to_row_major(tiles), stored["weight"])
    again = loaded("svdquant_w4a4", tiled)
    assert again.layout == layer.layout
    assert all(torch.equal(again.slots[slot], layer.slots[slot]) for slot in layer.slots)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("size", [64, 256])
def test_rotated_layers_run_as_in_comfy_kitchen(name, size):
    """Inputs are rotated, rounded and multiplied: ConvRot's matrix there, Sylvester's with signs here."""
    k = 512 if size == 256 else 192
    w, x, bias = random_weight(96, k), torch.randn(64, k), torch.randn(96)
    layer = FORMATS[name].quantize("x", w, torch.bfloat16)
    assert layer.layout.hadamard == size
    stored, options = FORMATS[name].store(layer)
    args = (x, stored["weight"], stored["weight_scale"], bias)
    if name == "convrot_w4a4":
        theirs = convrot_w4a4.convrot_w4a4_linear(*args, convrot_groupsize=size)
    else:
        theirs = quantization.int8_linear(*args, torch.float32, convrot=True, convrot_groupsize=size)
    ours = run(layer, x) + bias
    assert options["convrot_groupsize"] == size
    assert float((ours - theirs).norm() / theirs.norm()) < (2e-3 if name == "convrot_w4a4" else 2e-4)


def test_int8_runs_as_in_comfy_kitchen():
    w, x = random_weight(96, 512), torch.randn(64, 512)
    layer = FORMATS["int8"].quantize("x", w, torch.bfloat16)
    stored, _ = FORMATS["int8"].store(layer)
    theirs = quantization.int8_linear(x, stored["weight"], stored["weight_scale"], None, torch.float32)
    assert float((run(layer, x) - theirs).norm() / theirs.norm()) < 2e-4


@pytest.mark.parametrize("n, groups", [(128, 4), (1, 1), (130, 5), (256, 32), (96, 7)])
def test_blocked_order(n, groups):
    """Each scale is where cuBLAS documents it, padding is zero, and the way back is exact."""
    scales = torch.randint(1, 256, (n, groups), dtype=torch.uint8)
    stored = blocked(scales)
    assert stored.shape == blocked_shape(n, groups) and same(unblocked(stored, n, groups), scales)
    tiles, flat = blocked_shape(n, groups)[1] // 4, stored.flatten()
    for r in range(0, n, 7):
        for c in range(groups):
            tile = (r // 128) * tiles + c // 4
            assert flat[512 * tile + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] == scales[r, c]
    assert int((stored != 0).sum()) == n * groups


def test_layouts_are_those_that_a_loader_builds():
    """The slots of every format have the shapes and dtypes of an empty layer of the same layout."""
    for name, native in FORMATS.items():
        layer = native.quantize("x", random_weight(256, 512), torch.bfloat16)
        layout: Layout = layer.layout
        empty = layout.empty(*layer.shape, torch.bfloat16)
        found = {slot: (tuple(t.shape), t.dtype) for slot, t in layer.slots.items()}
        assert found == {slot: (tuple(t.shape), t.dtype) for slot, t in empty.items()}, name
