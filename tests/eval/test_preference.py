"""ImageReward and HPSv2 with packages of the same interface that the tests write: what they are asked, and what is said when files lack."""

import sys
import types

import pytest
import torch

from qgen.errors import BadCheckpoint
from qgen.eval.evaluate import evaluate
from qgen.eval.extractors import MissingWeights, extractors, find_extractor

NAMES = ("image_reward", "hpsv2")
PACKAGES = {"image_reward": "image-reward", "hpsv2": "hpsv2"}


def module(monkeypatch, name, **content):
    """A module of this name that can be found and imported."""
    made = types.ModuleType(name)
    made.__spec__ = types.SimpleNamespace(name=name)
    made.__path__ = []
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class Reward:
    """Of `ImageReward.load`: score(prompt, PIL picture)."""

    def score(self, prompt, image):
        assert image.size == (64, 64) and image.mode == "RGB"
        return len(prompt) / 10


@pytest.fixture
def image_reward(monkeypatch, tmp_path):
    """Path of the weights, and the calls of `load`."""
    calls = []

    def load(path, device, med_config):
        return calls.append((path, device, med_config)) or Reward()

    module(monkeypatch, "ImageReward", load=load)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    return tmp_path / ".cache" / "ImageReward" / "ImageReward.pt", calls


class Towers(torch.nn.Module):
    """Of `hpsv2.src.open_clip`: pictures and tokens to unit vectors, in a dictionary."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(3, 3, bias=False)

    def forward(self, image, text):
        features = torch.nn.functional.normalize(self.mix(image.mean((2, 3))), dim=-1)
        return {"image_features": features, "text_features": text.float() / text.float().norm(dim=-1, keepdim=True)}


@pytest.fixture
def hpsv2(monkeypatch, tmp_path):
    """The hub's cache, empty, and the calls of `create_model_and_transforms`."""
    import numpy as np

    calls = []

    def create_model_and_transforms(name, pretrained, **options):
        calls.append((name, pretrained, options))

        def prepare(image):
            return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255

        return Towers(), None, prepare

    def tokens(texts):
        return torch.tensor([[len(text), 1, 0] for text in texts])

    for name in ("hpsv2", "hpsv2.src"):
        module(monkeypatch, name)
    content = {"create_model_and_transforms": create_model_and_transforms, "get_tokenizer": lambda name: tokens}
    module(monkeypatch, "hpsv2.src.open_clip", **content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path, calls


@pytest.mark.parametrize("name", NAMES)
def test_absent_packages_are_named(name, monkeypatch, photos):
    find = sys.modules["importlib.util"].find_spec
    absent = {"ImageReward", "hpsv2"}
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n in absent else find(n, *a))
    with pytest.raises(MissingWeights, match=f"install the package {PACKAGES[name]}; no other network"):
        evaluate(photos, prompts=["x"] * len(photos), metrics=(name,))


@pytest.mark.parametrize("name", NAMES)
def test_packages_that_do_not_import_are_named(name, monkeypatch):
    kind = extractors[name]  # the registry imports files when it is first asked
    broken = {"image_reward": "ImageReward", "hpsv2": "hpsv2.src.open_clip"}[name]
    for part in ("hpsv2", "hpsv2.src") if name == "hpsv2" else ():
        module(monkeypatch, part)
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: types.SimpleNamespace(name=n))

    def load(wanted):
        assert wanted == broken
        raise AttributeError("module transformers has no attribute apply_chunking")

    monkeypatch.setattr("importlib.import_module", load)
    said = kind.missing()
    assert "installed but does not import: AttributeError" in said and "apply_chunking" in said


def test_absent_files_of_image_reward_say_where_they_belong(image_reward, photos):
    weights, calls = image_reward
    for lacks in (weights, weights.with_name("med_config.json")):
        with pytest.raises(MissingWeights) as caught:
            evaluate(photos[:1], prompts=["x"], metrics=("image_reward",))
        said = str(caught.value)
        assert f"no {lacks}" in said and "hf download THUDM/ImageReward ImageReward.pt med_config.json" in said
        assert f"--local-dir {weights.parent} puts it there" in said and "no other network serves image_reward" in said
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.ones(2)}, weights)
    assert calls == []


def test_absent_files_of_hpsv2_say_where_they_belong(hpsv2, photos):
    where, calls = hpsv2
    with pytest.raises(MissingWeights) as caught:
        evaluate(photos[:1], prompts=["x"], metrics=("hpsv2",))
    said = str(caught.value)
    assert "HPS_v2.1_compressed.pt is not in Hugging Face's cache" in said and "hpsv2:/path" in said
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in said
    with pytest.raises(MissingWeights, match=f"no {where}/here.pt"):
        find_extractor("hpsv2", f"hpsv2:{where}/here.pt")
    assert calls == []


def test_image_reward_reads_its_files_and_asks_the_package(image_reward, photos):
    weights, calls = image_reward
    weights.parent.mkdir(parents=True)
    torch.save({"weight": torch.ones(2)}, weights)
    weights.with_name("med_config.json").write_text("{}")
    for wanted in ("auto", f"image_reward:{weights}"):
        options = {"metrics": ("image_reward",), "extractor": {"image_reward": wanted}}
        found = evaluate(photos[:2], photos[2:4], ["a", "bbb"], **options)["image_reward"]
        assert (found.value, found.reference, found.n) == (pytest.approx(0.2), pytest.approx(0.2), 2)
        assert found.label == "ImageReward" and len(found.digest) == 12
    assert calls == [(str(weights), "cpu", str(weights.with_name("med_config.json")))] * 2


def test_hpsv2_reads_its_weights_and_returns_the_cosine(hpsv2, photos):
    where, calls = hpsv2
    torch.manual_seed(3)
    towers = Towers()
    weights = where / "weights.pt"
    torch.save({"state_dict": towers.state_dict(), "epoch": 3}, weights)
    found = evaluate(photos[:2], prompts=["a", "bbb"], metrics=("hpsv2",), extractor=f"hpsv2:{weights}")
    rounded = (photos[:2] * 255).round() / 255
    want = []
    for picture, count in zip(rounded, (1, 3), strict=True):
        a = towers.mix.weight.detach() @ picture.mean((0, 1))
        b = torch.tensor([float(count), 1, 0])
        want.append(float(a @ b / a.norm() / b.norm()))
    assert found.per_prompt["hpsv2"] == pytest.approx(want, rel=1e-5)
    name, pretrained, options = calls[0]
    assert (name, pretrained, options["device"], options["output_dict"]) == ("ViT-H-14", "", "cpu", True)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_hold_more_than_tensors_are_refused(name, image_reward, hpsv2):
    """Unpickling such a file could run code: the package never gets to see it."""
    where = hpsv2[0] / "evil.pt"
    torch.save({"state_dict": types.SimpleNamespace(a=1)}, where)
    where.with_name("med_config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="plain"):
        find_extractor(name, f"{name}:{where}").load()
    assert image_reward[1] == []
