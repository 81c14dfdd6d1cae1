"""The start token apart: MixDQ's acceptance test, what is found and what is not, and that the rest of qgen lives with known rows."""

import copy
import json
import struct
from dataclasses import replace

import pytest
import torch
from torch import nn

import qgen
from qgen import Recipe, Rule, Spec, recipes
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.calibration.leading import Leading, some
from qgen.engine import prepare
from qgen.errors import BadCheckpoint
from qgen.io.header import _sum
from qgen.io.into import load_peer
from qgen.kernels import registry
from qgen.methods.gptq import GPTQ
from qgen.methods.smooth import Smooth
from qgen.methods.start_token import StartToken
from qgen.methods.temporal import Center, Static, TemporalBias
from qgen.nn.known import among, same
from qgen.nn.lora import append_rank, cut_rank
from qgen.nn.packed import Packed
from qgen.probe import probe
from qgen.team import Team
from qgen.waves import measure, plan

K, TOKENS = 64, 77


def recipe(*methods, weight="int8_row", act="int8_row", **options):
    return Recipe(None, (Rule("*", Spec(weight, act, methods, **options), role="context"),))


APART, NAIVE = recipe(StartToken(), Static()), recipe(Static())


def start():
    """The start token: two channels of ±30, as in the card."""
    row = torch.randn(K, generator=torch.Generator().manual_seed(77))
    row[5], row[40] = 30.0, -30.0
    return row


def text(seed, batch=1, known=True):
    x = torch.randn(batch, TOKENS, K, generator=torch.Generator().manual_seed(seed))
    if known:
        x[:, 0] = start()
    return x


class Reader(nn.Module):
    """Two blocks that read one text, so that it is context; what they make of it is the output."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_k": nn.Linear(K, 48), "to_v": nn.Linear(K, 48, bias=False)}) for _ in range(2)
        )
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 8

    def forward(self, text, timestep=None):
        return torch.stack([layer(text) for block in self.blocks for layer in block.values()])


def calls(made=text, samples=6, steps=2):
    """Calls of several prompts at several steps."""
    at = lambda s, t: Call((made(s),), {"timestep": torch.tensor([900.0 - 400 * t])}, Moment(s, t, 900.0 - 400 * t))  # noqa: E731
    return CalibrationSet(tuple(at(s, t) for s in range(samples) for t in range(steps)))


def quantized(how, made=text):
    return qgen.quantize(Reader().eval().requires_grad_(False), how, calibration=calls(made), progress=False)


def run(module, x):
    with torch.no_grad():
        return module(x)


@pytest.fixture(scope="module")
def apart():
    return quantized(APART)


def layers(module):
    return [layer for layer in module.modules() if isinstance(layer, Packed)]


# -- the card's acceptance test, line 1 --------------------------------------------------------------------------------
def test_other_tokens_lose_a_tenth_of_what_they_lose_under_one_scale_for_all(apart):
    naive, unseen = quantized(NAIVE), text(1000, 4)
    want = run(Reader(), unseen)[:, :, 1:]
    errors = [float((run(m, unseen)[:, :, 1:] - want).square().sum()) for m in (apart, naive)]
    assert errors[0] <= 0.1 * errors[1], errors[0] / errors[1]


def test_the_start_token_has_the_float_layers_output_bit_for_bit_in_every_prompt(apart):
    one, four = run(apart, text(1001)), run(apart, text(1002, 4))
    assert torch.equal(one[:, :, :1], run(Reader(), text(1001)[:, :1]))
    assert torch.equal(four[:, :, 0], one[:, :, 0].expand(-1, 4, -1))
    assert not torch.equal(one[:, 0, 1], four[:, 0, 1])


# -- what is found -----------------------------------------------------------------------------------------------------
def test_an_encoder_without_a_constant_row_gets_the_very_same_layers():
    """T5 and MiniLM look both ways: their first token depends on the prompt."""
    made = lambda seed: text(seed, known=False)  # noqa: E731
    with_it, without = quantized(APART, made).state_dict(), quantized(NAIVE, made).state_dict()
    assert list(with_it) == list(without) and all(torch.equal(t, without[name]) for name, t in with_it.items())


def test_negative_prompts_of_zeros_have_no_say():
    """SDXL puts zeros for an empty negative prompt."""
    made = lambda seed: torch.cat([torch.zeros(1, TOKENS, K), text(seed)])  # noqa: E731
    assert all(layer.layout.known == 1 for layer in layers(quantized(APART, made)))


def test_text_that_moves_with_the_timestep_is_not_constant():
    given = [replace(c, args=(c.args[0] + 1e-3 * c.moment.t,)) for c in calls().calls]
    module = qgen.quantize(Reader().eval(), APART, calibration=CalibrationSet(tuple(given)), progress=False)
    assert all(layer.known_x is None for layer in layers(module))


def test_a_held_out_prompt_without_the_row_refutes_it():
    given = [replace(c, moment=replace(c.moment, held=c.moment.sample == 5)) for c in calls().calls]
    given = [replace(c, args=(text(c.moment.sample, known=False),)) if c.moment.held else c for c in given]
    module = qgen.quantize(Reader().eval(), APART, calibration=CalibrationSet(tuple(given)), progress=False)
    assert all(layer.known_x is None for layer in layers(module))


@pytest.mark.parametrize(
    "given, rows",
    [
        ([text(0), text(1, 2)], 1),
        ([text(0)], 0),
        ([text(0)[0], text(1)[0]], 0),
        ([text(0)] * 3, 4),
        ([text(0)[:, :5]] * 3, 2),
        ([text(0)[:, :1]] * 3, 0),
        ([text(0), text(1) + 0.3], 0),
        ([text(0).bfloat16(), (text(1) * 1.01).bfloat16()], 1),
        ([text(0) * torch.nan, text(1)], 0),
        ([torch.zeros(1, 8, K)] * 2, 0),
    ],
    ids=["prompts", "one call", "no samples", "all alike", "short", "one token", "another", "noise", "nan", "zeros"],
)
def test_leading(given, rows):
    leading = Leading()
    for x in given:
        leading.update(x)
    assert (0 if leading.rows is None else len(leading.rows)) == rows


def test_some_calls_are_of_many_samples_and_steps_with_held_out_ones():
    many = calls(samples=40, steps=4).hold_out().calls
    chosen = some(many)
    moments = [call.moment for call in chosen]
    assert len({m.sample for m in moments}) == len(moments) <= 8 and len({m.step for m in moments}) == 4
    assert sum(m.held for m in moments) == 2


def test_statistics_are_those_of_the_other_rows():
    module, given = Reader().eval(), calls().hold_out()
    how = recipe(StartToken(), Center(), Smooth(), GPTQ(), Static(), TemporalBias(), bins=2)
    sites = probe(module, given.calls[0])
    (wave,) = plan([(site, how.spec_for(site)) for site in sites], 1 << 30)
    stats = next(iter(measure(module, wave, given, 0, lambda items: items).values()))
    x = torch.cat([call.args[0][0, 1:] for call in given.calls if not call.moment.held])
    assert torch.equal(stats.known, start()[None])
    assert torch.equal(stats.absmax, x.abs().amax(0)) and torch.equal(stats.moments.peak.amax(0), stats.absmax)
    torch.testing.assert_close(stats.gram, x.T @ x / len(x))
    assert not bool(among(stats.fit, stats.known).any()) and not bool(among(stats.held, stats.known).any())
    module = quantized(how)
    scales = [layer.act_scale if layer.t_scale is None else layer.t_scale for layer in layers(module)]
    assert all(float(scale.max()) < 6 / 127 for scale in scales)
    assert torch.equal(run(module, text(50))[:, :, :1], run(Reader(), text(50)[:, :1]))


def test_every_process_of_a_team_leaves_the_same_rows_out():
    """Each replays a share of the calls, the first one of which may have been another's."""

    class Silent(Team):
        def all(self, value):
            return [value]

        def collect(self, value, to):
            return iter(())

    module, given = Reader().eval(), calls(samples=7).hold_out()
    (wave,) = plan([(site, APART.spec_for(site)) for site in probe(module, given.calls[0])], 1 << 30)
    found = [measure(module, wave, given, 0, iter, Silent(rank, 2))._known for rank in range(2)]
    assert all(torch.equal(rows, start()[None]) for known in found for rows in known.values()) and found[0] and found[1]


def test_layers_that_share_an_input_must_all_ask():
    """Otherwise the rows stay in what the others are fitted to, and those who asked quantize them as ever."""
    mixed = Recipe(None, (*APART.rules, replace(NAIVE.rules[0], pattern="*to_v")))
    assert all(layer.known_x is None for layer in layers(quantized(mixed)))


# -- at run time -------------------------------------------------------------------------------------------------------
def test_rows_are_known_by_what_they_hold_wherever_they_stand(apart):
    x = text(2000, 3)
    x[1] = text(2001, known=False)[0]
    x[2, 40] = start()
    x[2, 50] = start() * 1.2
    x[2, 51] = torch.nan
    layer = layers(apart)[0]
    plain = copy.deepcopy(layer)
    plain.known_x = plain.known_y = None
    got, as_ever = run(layer, x), run(plain, x)
    hits = torch.zeros(3, TOKENS, dtype=torch.bool)
    hits[0, 0] = hits[2, 0] = hits[2, 40] = True
    assert torch.equal(among(x, layer.known_x), hits)
    assert torch.equal(got[hits], layer.known_y.expand(3, -1))
    torch.testing.assert_close(got[~hits], as_ever[~hits], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(run(layer, x[0]), got[0])  # tokens without an axis of samples


def test_one_compiled_graph_serves_known_and_unknown_rows(apart):
    module = copy.deepcopy(apart)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for x in (text(3000, 2), text(3001, 2, known=False)):
        assert torch.equal(run(compiled, x), run(apart, x))
    torch._dynamo.reset()


def test_layers_that_share_an_input_still_quantize_it_once(monkeypatch):
    module, made, kernel = quantized(recipe(StartToken())), [], registry.find("linear", "reference")
    prepare(module, "reference")
    count = lambda x, slots: made.append(x) or kernel.quantize(x, slots)  # noqa: E731
    monkeypatch.setitem(registry.kernels._items, "linear/reference", replace(kernel, quantize=count))
    got = run(module, text(4000))
    assert len(made) == 1 and len(got) == 4
    assert torch.equal(got[:, :, :1], run(Reader(), text(4000)[:, :1]))


def test_one_scale_measured_over_the_whole_input_does_not_see_known_rows():
    module = quantized(recipe(StartToken(), act="nvfp4"))
    x, quiet = text(5000), text(5000)
    quiet[:, 0] = 0
    assert layers(module)[0].layout.known == 1
    assert torch.equal(run(module, x)[:, :, 1:], run(module, quiet)[:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_casts_both_and_still_finds_the_row(apart, dtype):
    module, x = copy.deepcopy(apart).to(dtype), text(6000).to(dtype)
    for layer in layers(module):
        assert layer.known_x.dtype == layer.known_y.dtype == dtype
        assert torch.equal(run(layer, x)[0, 0], layer.known_y[0])


def test_lora_reaches_known_rows_and_leaves_them_bit_for_bit(apart, tmp_path):
    module = copy.deepcopy(apart)
    x, before = text(7000), run(apart, text(7000))
    pairs = [(torch.randn(4, K) / 8, torch.randn(48, 4) / 8) for _ in range(4)]
    for layer, pair in zip(layers(module), pairs, strict=True):
        append_rank(layer, [pair])
    want = torch.stack([x @ a.T @ b.T for a, b in pairs])
    torch.testing.assert_close(run(module, x) - before, want, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager"), x), run(module, x))
    torch._dynamo.reset()
    qgen.export(module, "qgen", tmp_path / "own")
    assert torch.equal(run(load_peer(next((tmp_path / "own").glob("*.safetensors")), Reader()), x), run(module, x))
    for layer in layers(module):
        cut_rank(layer)
    assert torch.equal(run(module, x), before)


def test_offloaded_layers_bring_their_known_rows(apart):
    accelerate = pytest.importorskip("accelerate")
    module = copy.deepcopy(apart)
    accelerate.cpu_offload(module, torch.device("cpu"))
    assert all(layer.known_y.device.type == "meta" for layer in layers(module))
    assert torch.equal(run(module, text(8000)), run(apart, text(8000)))


def test_training_sees_known_rows_as_the_layer_has_them(apart):
    from qgen.train.twin import Twin

    layer, x = copy.deepcopy(layers(apart)[0]), text(9000)
    twin = Twin("layer", layer)
    assert twin.open_slot("bias", 1e-3)
    y = twin(x)
    torch.testing.assert_close(y.detach(), run(layers(apart)[0], x), atol=1e-4, rtol=1e-4)
    assert torch.equal(y[0, 0], layer.known_y[0])
    y.sum().backward()
    assert torch.allclose(twin.leaves["bias"].grad, torch.full((48,), TOKENS - 1.0))


# -- files -------------------------------------------------------------------------------------------------------------
def test_save_and_load_keep_every_bit(apart, tmp_path):
    qgen.save(apart, tmp_path / "m")
    back = qgen.load(tmp_path / "m", into=Reader())
    assert torch.equal(run(back, text(10_000)), run(apart, text(10_000)))
    for a, b in zip(layers(back), layers(apart), strict=True):
        assert a.layout == b.layout and all(torch.equal(a.canonical()[k], t) for k, t in b.canonical().items())
    qgen.save(back, tmp_path / "again")
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("m", "again"))
    assert first == second


def test_formats_that_cannot_hold_known_rows_are_refused(apart, tmp_path):
    for to in ("comfy", "float"):
        with pytest.raises(ValueError, match="keeps outputs of known rows"):
            qgen.export(apart, to, tmp_path / "x.safetensors")


def edited(path, change, shapes=()):
    """Changes the description of the first layer in a file, and shapes of tensors, and makes the header's sum right again."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["qgen"])
    change(ours["layers"][0])
    ours.pop("sha256")
    ours["sha256"] = _sum(ours)
    header["__metadata__"]["qgen"] = json.dumps(ours)
    for name, shape in shapes:
        header[name]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


FIRST = "blocks.0.to_k"
LIES = {
    "more rows": (lambda layer: layer.update(known=3), ()),
    "too many": (lambda layer: layer.update(known=1 << 40), ()),
    "none": (lambda layer: layer.pop("known"), ()),
    "negative": (lambda layer: layer.update(known=-1), ()),
    "true": (lambda layer: layer.update(known=True), ()),
    "text": (lambda layer: layer.update(known="1"), ()),
    "one slot": (lambda layer: layer.update(slots=[s for s in layer["slots"] if s != "known_y"]), ()),
    "a convolution": (lambda layer: layer.update(kind="conv2d"), ()),
    "a turned row": (lambda layer: None, [(f"{FIRST}.known_x", [K, 1])]),
    "narrower outputs": (lambda layer: None, [(f"{FIRST}.known_y", [2, 24])]),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_of_strangers_are_refused(apart, tmp_path, lie):
    qgen.save(apart, tmp_path / "m")
    edited(tmp_path / "m" / "model.safetensors", *LIES[lie])
    module = Reader()
    with pytest.raises(BadCheckpoint) as caught:
        qgen.load(tmp_path / "m", into=module)
    assert FIRST in str(caught.value) and "\n" not in str(caught.value)
    assert not layers(module)


# -- whole models ------------------------------------------------------------------------------------------------------
def encoder(hidden=32, layers=2):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 16, bos_token_id=0, eos_token_id=98, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return CLIPTextModel(config).eval().requires_grad_(False)


def tokens(seed, batch=1):
    ids = torch.randint(1, 98, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 0, 98
    return ids


def unet_calls(clip, samples=6):
    """Guided calls: an empty negative prompt and a prompt through CLIP, in one batch."""
    found = []
    for seed in range(samples):
        ids = tokens(seed, 2)
        ids[0, 1:] = 98
        with torch.no_grad():
            given = clip(ids)[0]
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        t = 100.0 * (1 + seed)
        found.append(Call((latents, torch.tensor(t)), {"encoder_hidden_states": given}, Moment(seed, seed, t)))
    return CalibrationSet(tuple(found))


def test_the_recipe_on_a_unet_that_reads_clip(tmp_path):
    from tests import tiny

    given = unet_calls(encoder())
    how = recipes.get("mixdq")
    assert Recipe.from_json(how.to_json()) == how
    model = qgen.quantize(tiny.unet(), how, calibration=given, progress=False)
    text_layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, Packed) and layer.layout.known}
    assert len(text_layers) == 2 * 4 and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in text_layers)
    seen = {}
    for name, layer in text_layers.items():
        layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
    call = given.calls[-1]
    with torch.no_grad():
        got = call.run(model)[0]
        for name, y in seen.items():
            plain = tiny.unet().get_submodule(name)(call.kwargs["encoder_hidden_states"])
            torch.testing.assert_close(y[:, 0], plain[:, 0], rtol=1e-6, atol=1e-6)
    qgen.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(call.run(qgen.load(tmp_path / "m"))[0], got)


@pytest.mark.slow
def test_the_tolerance_covers_an_encoder_in_another_batch_and_dtype():
    """Where the numbers of `qgen.nn.known.tolerance` come from: CLIP's size, random weights."""
    clip, ids = encoder(768, 12), tokens(0, 8)
    apart = lambda a, b: float((a.float() - b.float()).norm() / b.float().norm())  # noqa: E731
    with torch.no_grad():
        exact = clip(ids)[0]
        for dtype in (torch.bfloat16, torch.float16):
            clip = clip.to(dtype)
            many, one = clip(ids)[0], clip(ids[:1])[0]
            clip = clip.float()
            print(dtype, apart(many[0, 0], one[0, 0]), apart(one[0, 0], exact[0, 0]), apart(exact[3, 1], exact[0, 1]))
            assert bool(same(many[:, 0], one[0, 0]).all()) and bool(same(one[:, 0], exact[0, 0]).all())
            assert not bool(among(many[:, 1:], one[0, :1]).any())
