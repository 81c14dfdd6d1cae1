"""TopKLD's card: the chain rule, its limits, invariances, a toy head, a tiny language model."""

import copy
import json
import struct

import pytest
import torch
from torch import nn

import qgen
from qgen.bench.bits import count
from qgen.calibration.base import CalibrationSet
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Spec
from qgen.train.topkld import TopKLD, topk_kl
from tests.tiny import FAMILIES, first

V = 64


def logits(seed, rows=10):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, V, generator=g, dtype=torch.float64)


def kl(p, q):
    p, q = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("k", [1, 16, V // 2, V - 1, V])
def test_with_equal_weights_it_is_plain_kl(k):
    p, a, b = logits(0), logits(1).requires_grad_(), logits(1).requires_grad_()
    one, two = topk_kl(p, a, k), kl(p, b)
    one.sum().backward()
    two.sum().backward()
    assert torch.allclose(one, two, atol=0, rtol=1e-6)
    assert torch.allclose(a.grad, b.grad, atol=1e-6) and bool(torch.isfinite(a.grad).all())


def test_without_the_rest_its_inner_order_is_free_but_its_mass_is_not():
    p, q = logits(0), logits(1).requires_grad_()
    topk_kl(p, q, 8, b=0.0).sum().backward()
    top = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(8, -1).indices, True)
    share = torch.softmax(q.detach().masked_fill(top, -torch.inf), -1)
    pull = q.grad.masked_fill(top, 0)
    mass = pull.sum(-1, keepdim=True)
    assert float((pull - mass * share).abs().max()) < 1e-6, "every token of the rest moves alike"
    rest = [torch.softmax(t.detach(), -1).masked_fill(top, 0).sum(-1, keepdim=True) for t in (q, p)]
    assert torch.allclose(mass, rest[0] - rest[1], atol=1e-6), "and their mass to the teacher's"
    assert float(mass.abs().max()) > 1e-3


def test_constants_and_names_of_tokens_do_not_matter():
    p, q = logits(0), logits(1).requires_grad_()
    a = topk_kl(p, q, 8, 1.0, 0.1)
    assert torch.allclose(a, topk_kl(p, q + 5.0, 8, 1.0, 0.1), atol=1e-5)
    (grad,) = torch.autograd.grad(a.sum(), q)
    order = torch.randperm(V)
    moved = q.detach()[:, order].requires_grad_()
    (other,) = torch.autograd.grad(topk_kl(p[:, order], moved, 8, 1.0, 0.1).sum(), moved)
    assert torch.allclose(other, grad[:, order], atol=1e-6)


def test_reverse_and_a_certain_teacher_are_finite():
    sure = torch.zeros(2, V)
    sure[:, 3] = 200.0
    q = torch.randn(2, V, requires_grad=True)
    for reverse in (False, True):
        loss = topk_kl(sure, q, 4, reverse=reverse).sum()
        (grad,) = torch.autograd.grad(loss, q)
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("b", [pytest.param(1.0, marks=pytest.mark.slow, id="kl"), pytest.param(0.1, id="top-k")])
def test_a_head_of_three_bits_comes_close_to_its_teacher(b):
    """256 classes, inputs of rank 12 and a little noise: held-out KL at most 0.65 of rounding to nearest, and 5 points more agreement."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 64, generator=g)
    rows = lambda n: (torch.randn(n, 12, generator=g) @ mix + 0.1 * torch.randn(n, 64, generator=g)) / 3  # noqa: E731
    teacher = nn.Sequential(nn.Linear(64, 256, bias=False)).eval().requires_grad_(False)
    teacher[0].weight.copy_(torch.randn(256, 64, generator=g) * 0.25)
    student = qgen.quantize(copy.deepcopy(teacher), Recipe(Spec("int3_row")), progress=False)
    calls, test = [rows(32)[None] for _ in range(60)], rows(2000)[None]

    def score():
        p, q = teacher(test), student(test)
        return float(kl(p, q).mean()), float((p.argmax(-1) == q.argmax(-1)).float().mean())

    before = score()
    qgen.finetune(student, teacher, TopKLD(k=16, b=b, rate=0.05), steps=500, calibration=calls, progress=False)
    after = score()
    assert after[0] <= 0.65 * before[0] and after[1] >= before[1] + 0.05, (before, after)


def test_a_tiny_language_model():
    make, call = FAMILIES["llama"]
    teacher = make()
    student = qgen.quantize(
        make(), Recipe(Spec("int3_g32", "int8_row")), calibration=[call(s) for s in range(12)], progress=False
    )
    unseen = CalibrationSet(tuple(call(100 + s) for s in range(8)))

    def score():
        with torch.no_grad():
            return sum(float(kl(first(c.run(teacher)), first(c.run(student))).mean()) for c in unseen.calls)

    before = score()
    calls = CalibrationSet(tuple(call(s) for s in range(32)))
    qgen.finetune(student, teacher, TopKLD(k=16), steps=60, calibration=calls, progress=False)
    assert score() < 0.8 * before, (score(), before)
    assert student.qgen_tuning["method"] == "topkld"


def payload(folder):
    """{name: bytes} of the tensors in a folder's files, from their headers, and the bytes of the files without headers."""
    found, whole = {}, 0
    for path in folder.rglob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        found |= {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__"}
        whole += len(raw) - 8 - length
    return found, whole


@pytest.mark.parametrize("family", ["pixart", "llama"])
def test_counted_bits_are_the_payload_of_the_file(family, tmp_path):
    """The card's line: scales, embeddings and layers that stay float included, within alignment padding."""
    make, call = FAMILIES[family]
    student = qgen.quantize(make(), Recipe(Spec("int3_g32", "int8_row")), calibration=[call(0)], progress=False)
    qgen.save(student, tmp_path / "made")
    layers = {path: layer for path, layer in student.named_modules() if isinstance(layer, Packed)}
    size = count(tmp_path / "made", {path: (layer.n, layer.k) for path, layer in layers.items()})
    tensors, whole = payload(tmp_path / "made")
    assert 0 <= 8 * whole - 8 * (size.nbytes + size.other) <= 8 * 64 * len(tensors)
    packed = sum(t.nbytes for layer in layers.values() for t in layer.canonical().values())
    assert size.nbytes == packed, "codes, scales and biases of the model itself"
    rest = {p.data_ptr(): p.nbytes for n, p in student.named_parameters() if n.rpartition(".")[0] not in layers}
    buffers = sum(tensors[n] for n, _ in student.named_buffers() if n in tensors)
    assert size.other == sum(rest.values()) + buffers


@pytest.mark.slow
def test_the_scaling_table(tmp_path):
    """One small model: fewer bits at fewer bits a weight, and teaching brings a coarse one closer to the process."""
    pytest.importorskip("matplotlib", reason="draws the table")
    from demos.scaling import measure, plot, table

    rows = measure([32], [2, 8], 300, 60, 16)
    found = {(r.weight, r.method): r for r in rows}
    rounded = found["int2_g32", "rounded"]
    assert rounded.bits < found["int8_row", "rounded"].bits < found["bf16", ""].bits
    assert found["bf16", ""].kl < rounded.kl
    for method in ("KL", "TopKLD"):
        row = found["int2_g32", method]
        assert row.bits == rounded.bits and row.kl < rounded.kl, rows
    assert found["int8_row", "rounded"].kl == pytest.approx(found["bf16", ""].kl, rel=0.05)
    assert table(rows).count(" * |") >= 2
    plot(rows, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
