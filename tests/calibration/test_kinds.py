"""What calibration can be made of: prompts from lists, files and functions; images, videos and latents; nothing but noise."""

import pytest
import torch

import qgen
from qgen import Recipe, Spec
from qgen.calibration.prompts import PROMPTS, as_prompts
from qgen.calibration.recorder import Recorder, as_calls
from qgen.calibration.synthetic import Synthetic
from qgen.methods.gptq import GPTQ
from tests import tiny


def test_prompts_from_text_a_list_a_file_and_a_function(tmp_path):
    (tmp_path / "p.txt").write_text("a red fox\n\n  two owls \r\nein Bär\n", encoding="utf-8")
    assert as_prompts("a red fox") == ["a red fox"] and as_prompts(("a", "b")) == ["a", "b"]
    assert as_prompts(tmp_path / "p.txt") == ["a red fox", "two owls", "ein Bär"]
    assert as_prompts(lambda count: PROMPTS[:count], 3) == list(PROMPTS[:3])


@pytest.mark.parametrize("given", [[], (), lambda count: []], ids=["list", "tuple", "function"])
def test_no_prompts(given):
    with pytest.raises(ValueError, match="calibration needs at least one prompt, found none"):
        as_prompts(given)


def test_files_without_prompts_and_things_that_are_none(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="at least one prompt"):
        as_prompts(tmp_path / "p.txt")
    with pytest.raises(ValueError, match=r"no file of prompts .*missing\.txt"):
        as_prompts(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="a prompt is text, found int"):
        as_prompts(["a", 3])


def test_quantize_takes_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    pipe, twin = tiny.Pipe(1), tiny.Pipe(1)
    options = {"recipe": Recipe(Spec("int4_g64", None, (GPTQ(),))), "progress": False}
    qgen.quantize(pipe, prompts=tmp_path / "p.txt", **options)
    qgen.quantize(twin, prompts=["a", "b", "c"], **options)
    assert tiny.same(pipe.transformer, tiny.snapshot(twin.transformer)) and pipe.seen == [["a"], ["b"], ["c"]]


class Conditioned(tiny.Pipe):
    """Draws from an image, and from text if it is there."""

    def __call__(self, prompt=None, image=None, latents=None, generator=None):
        self.seen.append((prompt, image))
        x = torch.randn(1, 16, 32, generator=generator) if latents is None else latents
        return self.transformer(x + image[0].mean())


class NoText(Conditioned):
    def __call__(self, image, generator=None):
        return super().__call__(None, image, None, generator)


def recorded(pipe, **options):
    prompts = options.pop("prompts", None)
    return Recorder(steps=1, **options).calls(pipe, pipe.components, prompts)["transformer"]


def test_an_image_for_each_prompt():
    pipe, images = Conditioned(1), [torch.full((3, 4, 4), float(i)) for i in range(3)]
    calls = recorded(pipe, prompts=["a", "b", "c"], inputs={"image": images}, batch=1)
    assert [p for p, _ in pipe.seen] == [["a"], ["b"], ["c"]] and [i for _, i in pipe.seen] == images
    assert [c.moment.sample for c in calls.calls] == [0, 1, 2]
    pipe = Conditioned(1)
    recorded(pipe, prompts=["a", "b", "c"], inputs={"image": images}, batch=2)
    assert pipe.seen[0] == (["a", "b"], images[:2]) and pipe.seen[1] == (["c"], images[2])


def test_a_pipeline_without_text_is_driven_by_its_images():
    pipe, videos = NoText(1), [torch.full((2, 3, 4, 4), float(i)) for i in range(4)]
    assert len(recorded(pipe, inputs={"image": videos}, batch=1).calls) == 4
    assert [i for _, i in pipe.seen] == videos


def test_latents_come_in_slices():
    latents = torch.randn(4, 16, 32)
    options = {"inputs": {"latents": latents, "image": [torch.zeros(1, 1)] * 4}, "batch": 2}
    calls = recorded(Conditioned(1), prompts=list("abcd"), **options)
    assert torch.equal(calls.calls[1].args[0], latents[2:])


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"image": [torch.zeros(1)]}, "one value for each prompt, found 2 prompt, 1 image"),
        ({"depth": [1, 2]}, "Conditioned takes no 'depth'; its arguments are prompt, image, latents, generator"),
    ],
)
def test_inputs_that_do_not_fit(inputs, words):
    with pytest.raises(ValueError, match=words):
        recorded(Conditioned(1), prompts=["a", "b"], inputs=inputs)


# -- nothing but noise ---------------------------------------------------------------------------------------------------
def test_synthetic_calls_look_like_the_one_that_was_seen():
    seen = tiny.pixart_call(3)
    made = Synthetic(samples=4, steps=5, example=seen).calls(None, {"": tiny.pixart()})[""]
    assert len(made.calls) == 20 and sum(c.moment.held for c in made.calls) == 5
    for call in made.calls:
        names = [(n, t.shape, t.dtype) for n, t in call.tensors()]
        assert names == [(n, t.shape, t.dtype) for n, t in seen.tensors()]
    first = [dict(c.tensors()) for c in made.calls]
    latents, text = next(iter(first[0])), "kwargs.encoder_hidden_states"
    assert not torch.equal(first[0][latents], first[1][latents])
    assert abs(float(torch.stack([f[latents] for f in first]).std()) - 1) < 0.1
    assert not torch.equal(first[0][text], dict(seen.tensors())[text])


def test_synthetic_calls_of_a_pipeline_cover_all_timesteps_and_quantize():
    pipe = tiny.Pipe(2)
    calls = Synthetic(samples=10, steps=4).calls(pipe, pipe.components)["transformer"]
    ts = sorted(c.moment.t for c in calls.calls)
    assert ts[0] < 0.15 and ts[-1] > 0.85 and all(torch.all(c.kwargs["timestep"] == c.moment.t) for c in calls.calls)
    qgen.quantize(pipe, Recipe(Spec("int4_g64", None, (GPTQ(),))), calibration=Synthetic(10, 4), progress=False)
    plain = tiny.Pipe(2)
    qgen.quantize(plain, Recipe(Spec("int4_g64")), progress=False)
    source = tiny.Pipe(2)
    unseen = Recorder(steps=3, batch=1).calls(source, source.components, list("hgfedcba"))["transformer"].calls
    want = source.transformer

    def lost(model):
        return sum(float((c.run(model) - c.run(want)).square().sum()) for c in unseen)

    assert lost(pipe.transformer) < lost(plain.transformer)


def test_a_bare_module_shows_a_call():
    with pytest.raises(ValueError, match="Net is no pipeline: show one of its calls"):
        Synthetic().calls(tiny.net(), {"": tiny.net()})
    call = {"sample": torch.randn(2, 24, 32), "timestep": torch.tensor([0.5, 0.5])}
    calls = Synthetic(samples=2, steps=2, example=call).calls(tiny.net(), {"": tiny.net()})[""]
    assert as_calls(calls) is calls and calls.origin.startswith("synthetic")
