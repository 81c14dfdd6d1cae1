"""What peers are told, and those that run wherever the tests do."""

import copy

import pytest
import torch
from torch import nn

from qgen.bench.bits import count
from qgen.bench.job import Job
from qgen.bench.peer import peers, select
from qgen.bench.worker import parts_of


@pytest.fixture(scope="module")
def demo(make_demo_pipe):
    """(pipe in bfloat16, its Part)."""
    pipe = make_demo_pipe().to(torch.bfloat16)
    originals, parts = parts_of(pipe, Job("", "", "demo", ("noto owl",), steps=1, samples=2, keep=1))
    assert originals["transformer"] is pipe.transformer
    return pipe, parts["transformer"]


@pytest.fixture
def part(demo):
    return copy.copy(demo[1]), demo[0].transformer


def fresh(part):
    part.module = copy.deepcopy(part.module)
    return part


def sqnr(module, original, part):
    with torch.no_grad():
        want, got = (part.call.calls[0].run(m)[0].float() for m in (original, module))
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def test_all_are_given_the_layers_that_the_probe_finds(part):
    part, module = part
    assert len(part.layers) == 53 and len(part.vectors) == 3 and part.vectors <= set(part.layers)
    assert {"proj_out", "pos_embed.proj", "caption_projection.linear_1"} <= set(part.keep)
    assert not set(part.keep) & set(part.layers)
    assert part.module is not module and part.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "peer, config, bits, least",
    [
        ("unquantized", "original", (16, 16.1), 200),
        ("unquantized", "float32", (32, 32.2), 30),
        ("qgen", "rtn-int4", (4.25, 4.4), 8),
        ("bitsandbytes", "nf4", (4.5, 4.7), 12),
        ("gguf", "q8_0", (8.5, 8.6), 25),
        ("comfy-kitchen", "int8", (8, 8.2), 20),
    ],
)
def test_a_peer_quantizes_what_it_was_asked_to(part, tmp_path, peer, config, bits, least):
    part, module = fresh(part[0]), part[1]
    one = peers[peer]()
    try:
        one.version()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    made = one.quantize(config, part)
    assert min(sqnr(made, module, part), 999) > least
    one.save(config, made, tmp_path / "saved")
    size = count(tmp_path / "saved", part.layers, part.keep)
    assert bits[0] <= size.bits <= bits[1]
    assert len(size.left) == (53 if peer == "unquantized" else 0) and not size.more


def test_names_select_peers_and_configs():
    every = select()
    assert [p for p, _ in every][:2] == ["unquantized", "unquantized"] and every[2][0] == "qgen"
    assert {p for p, _ in every} == set(peers)
    assert [c.name for _, c in select(["qgen:svd*", "qgen:svdquant-int4"])] == ["svdquant-int4", "svdquant-nvfp4"]
    with pytest.raises(ValueError, match="torchao"):
        select(["torcha"])
    with pytest.raises(ValueError, match="nf4"):
        select(["bitsandbytes:nf5"])


def test_config_names_are_unique_and_fit_a_folder():
    for name, kind in peers.items():
        configs = [c.name for c in kind.configs]
        assert len(set(configs)) == len(configs), name
        assert all(c.replace("-", "").replace("_", "").isalnum() for c in [*configs, name])


def test_modules_of_a_peer_are_swapped_in_place(part):
    part = fresh(part[0])
    made = part.swap(lambda layer, path: nn.Identity())
    assert all(isinstance(made.get_submodule(path), nn.Identity) for path in part.layers)
    assert isinstance(made.proj_out, nn.Linear)
