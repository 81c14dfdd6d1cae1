"""Every kind of format runs as the weight of a linear layer: through the reference, and through what the dispatcher picks on a CPU."""

import pytest
import torch

from qgen import formats
from qgen.kernels import reference, registry
from qgen.kernels.registry import Ask
from qgen.kernels.slots import SLOTS, Slots
from tests.formats.kinds import NAMES

N, M = 24, 5


def layer(name):
    """Weight (N, K) in the format, rows x (M, K), and the slots of the layer."""
    fmt = formats.get(name)
    k = fmt.unit * -(-256 // fmt.unit)
    weight, x = torch.randn(N, k), torch.randn(M, k)
    q = fmt.quantize(weight.abs() if name.startswith(("log", "uint4p")) else weight)
    tensors = {slot: t for slot in SLOTS if (t := getattr(q, slot, None)) is not None}
    return q, x, tensors


@pytest.mark.parametrize("name", NAMES)
def test_reference_multiplies_with_the_values(name):
    q, x, tensors = layer(name)
    bias, down, up = torch.randn(N), torch.randn(4, x.shape[1]), torch.randn(N, 4)
    y = reference.linear(x, Slots.of(tensors | {"bias": bias, "down": down, "up": up}, name, "", N))
    want = x.double() @ q.dequantize().double().T + x.double() @ down.double().T @ up.double().T + bias
    assert (y - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_of_choice_agrees_with_the_reference(name):
    """bfloat16 is where native kernels for 4-bit tables come in: what they take for a table times a step must be one."""
    _, x, tensors = layer(name)
    x = x.bfloat16()
    ask = Ask("linear", "cpu", name, "", torch.bfloat16, N, x.shape[1])
    kernel = registry.choose(ask)
    packed = kernel.pack(tensors, ask)
    y = kernel.run(x, Slots.of({slot: t.contiguous() for slot, t in packed.items()}, name, "", N)).float()
    want = reference.linear(x.float(), Slots.of(tensors, name, "", N))
    assert (y - want).norm() <= 4e-3 * want.norm(), kernel.name


@pytest.mark.parametrize(
    "name", [n for n in NAMES if not n.startswith(("log", "vq", "lut", "power", "binary", "ternary", "planes"))]
)
def test_activations_are_quantized_per_token(name):
    """Rows of x through the format, multiplied by reciprocals, as `fake` says. Learned formats are for weights."""
    fmt = formats.get(name)
    _, x, tensors = layer("int8_row")
    x = x.abs() if name.startswith("uint4p") else torch.nn.functional.silu(x) if name.startswith("ufp4") else x
    y = reference.linear(x, Slots.of(tensors, "int8_row", name, N))
    w = reference.weight(tensors["codes"], tensors["scales"], None, None, "int8_row")
    assert torch.equal(y, fmt.fake(x, reciprocal=True) @ w.T)
    assert (fmt.fake(x, reciprocal=True) - x).norm() < (0.3 if fmt.bits > 2 else 1) * x.norm()


@pytest.mark.parametrize("name", NAMES)
def test_rows_cut_out_of_a_weight_stand_alone(name):
    q, _, _ = layer(name)
    rows = slice(8, 16)
    assert torch.equal(q.rows(rows).dequantize(), q.dequantize()[rows])
