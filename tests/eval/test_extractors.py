"""Networks are found by name, say which they are, and never stand in for one another silently."""

import pytest
import torch

from qgen.errors import BadCheckpoint
from qgen.eval.extractors import (
    MissingWeights,
    digest_of,
    extractors,
    find_extractor,
    load_features,
    save_features,
)


def test_every_network_is_complete():
    assert set(extractors) >= {"inception", "clip", "lpips_alex", "efficientnet_lite0", "cliplite"}
    for _, kind in extractors.items():
        methods = {"fid": "features", "kid": "features", "lpips": "distance", "clip": "embed_texts", "is": "logits"}
        methods |= {"dists": "maps", "clip_iqa": "embed_images", "image_reward": "judge", "hpsv2": "judge"}
        assert set(kind.labels) <= set(methods)
        assert all(callable(getattr(kind, methods[metric])) for metric in kind.labels)


def test_only_the_usual_networks_carry_the_usual_names():
    usual = {"FID", "KID", "IS", "LPIPS", "CLIPScore", "CLIP-IQA", "ImageReward", "HPSv2.1"}
    for name, kind in extractors.items():
        found = set(kind.labels.values()) & usual
        assert not found or kind.usual, name


class Here:
    """A network whose weights are present, or not."""

    labels = {"fid": "FID"}  # noqa: RUF012
    usual = True
    reason = None

    @classmethod
    def missing(cls, path=None):
        return cls.reason


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setitem(extractors._items, "inception", Here)
    monkeypatch.setattr(Here, "reason", None)
    return Here


@pytest.mark.parametrize("metric", ["fid"])
def test_auto_prefers_the_usual_network_and_falls_to_the_small_one(inception, monkeypatch, metric):
    pytest.importorskip("efficientnet_lite_pytorch")
    assert find_extractor(metric, "auto").kind is inception
    assert find_extractor(metric, "real").kind is inception
    assert find_extractor(metric, "small").kind is extractors["efficientnet_lite0"]
    monkeypatch.setattr(Here, "reason", "not here")
    assert find_extractor(metric, "auto").kind is extractors["efficientnet_lite0"]
    with pytest.raises(MissingWeights, match=r'^inception: not here; or use extractor=\{"fid": "efficientnet_lite0"\}'):
        find_extractor(metric, "real")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("inceptoin", "did you mean 'inception'"), ("clip", "extractor for 'fid' 'clip'.*mapping"), (3, "found 3")],
    ids=["misspelt", "of-another-metric", "a-number"],
)
def test_wrong_names_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        find_extractor("fid", wanted)


def test_a_loaded_network_passes_through():
    network = Here()
    assert find_extractor("fid", network) is network


def test_features_files_remember_their_network(tmp_path):
    network, path = Here(), tmp_path / "f.safetensors"
    network.name, network.digest = "A", "aaaa"
    features = torch.randn(5, 4).half().float()
    save_features(path, features, network, "test")
    assert torch.equal(load_features(path, network), features)
    network.digest = "bbbb"
    with pytest.raises(ValueError, match=r"features of A \(aaaa\), asked for A \(bbbb\)"):
        load_features(path, network)


def test_other_files_are_no_features(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no features file"):
        load_features(tmp_path / "a.safetensors", Here())


def test_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_of(tmp_path / "a") == "ba7816bf8f01"  # FIPS 180-2, example B.1


@pytest.fixture(scope="module")
def effnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    return find_extractor("fid", "efficientnet_lite0").load()


def test_efficientnet_reads_the_published_weights(effnet):
    """The file's own SHA-256 starts with the eight digits in its name, and the network knows a cat when it sees one."""
    data, transform = pytest.importorskip("skimage.data"), pytest.importorskip("skimage.transform")
    assert effnet.digest.startswith("57934424")
    cat = torch.from_numpy(transform.resize(data.chelsea()[:, 76:376], (224, 224), anti_aliasing=True)).float()
    with torch.inference_mode():
        classes = effnet.network((cat.movedim(-1, 0)[None] - 0.498) / 0.502)[0].topk(5).indices.tolist()
    assert set(classes) & {281, 282, 283, 284, 285}  # ImageNet's five domestic cats


def test_efficientnet_features_do_not_depend_on_the_batch(effnet, photos):
    together = effnet.features(photos)
    assert together.shape == (8, 1280)
    assert torch.allclose(together[3:4], effnet.features(photos[3:4]), atol=1e-4)


def test_efficientnet_last_map_leads_to_its_features(effnet):
    """At 224 pixels the walk over blocks in `maps` is the network's own."""
    x = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = effnet.maps(x)
        head = effnet.network._swish(effnet.network._bn1(effnet.network._conv_head(maps[-1])))
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    assert torch.allclose(head.mean((2, 3)), effnet.features(x), atol=1e-5)


def test_inception_is_torch_fidelitys(tmp_path, photos):
    """A network of the right shape with random weights, against torch-fidelity's own forward pass on the same file."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = fidelity.FeatureExtractorInceptionV3

    class Blank(kind):
        def load_state_dict(self, *args, **options):
            """Stays at its random weights: the constructor insists on reading a file."""

    path = tmp_path / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Blank("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    network = find_extractor("fid", f"inception:{path}").load()
    expected = kind("inception-v3-compat", ["2048"], str(path)).eval()(
        (photos[:2] * 255).round().to(torch.uint8).movedim(-1, 1)
    )[0]
    found = network.features(photos[:2])
    assert found.shape == (2, 2048)
    # torchmetrics resizes 64 to 299 pixels with another filter than torch-fidelity does.
    assert torch.cosine_similarity(found, expected).min() > 0.999


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a weights file has run')",)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "inception", "lpips_squeeze"])
def test_a_weights_file_cannot_run_code(tmp_path, name):
    package = {"efficientnet_lite0": "efficientnet_lite_pytorch", "inception": "torch_fidelity"}
    pytest.importorskip(package.get(name, "torchvision"))
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    metric = "lpips" if name.startswith("lpips") else "fid"
    with pytest.raises(BadCheckpoint, match=r"evil\.pth is no plain file of tensors"):
        find_extractor(metric, f"{name}:{tmp_path / 'evil.pth'}").load()
