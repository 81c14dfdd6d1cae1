"""The LPIPS formula by hand, and against the original network with random weights."""

import numpy as np
import pytest
import torch
from torch import nn

from qgen.eval.extractors import MissingWeights, find_extractor
from qgen.eval.lpips import lpips, perceptual_distance


class TinyBackbone:
    """Two random convolutions; what LPIPS asks of a backbone and nothing else."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(s, generator=generator) for s in ((4, 3, 3, 3), (6, 4, 3, 3))]

    def maps(self, pictures):
        x, found = pictures.movedim(-1, 1), []
        for weight in self.weights:
            x = torch.relu(nn.functional.conv2d(x, weight, stride=2))
            found.append(x)
        return found

    def distance(self, x, y):
        return perceptual_distance(self.maps(x), self.maps(y))


def test_formula_by_hand(photos, noisy):
    network = TinyBackbone()
    found = lpips(noisy(0.1), photos, network, batch_size=3)
    expected = []
    for x, y in zip(noisy(0.1), photos, strict=True):
        total = 0.0
        for a, b in zip(network.maps(x[None]), network.maps(y[None]), strict=True):
            a, b = a[0].numpy().astype(np.float64), b[0].numpy().astype(np.float64)
            squares = []
            for i in range(a.shape[1]):
                for j in range(a.shape[2]):
                    u, v = a[:, i, j], b[:, i, j]
                    u, v = u / max(np.linalg.norm(u), 1e-5), v / max(np.linalg.norm(v), 1e-5)
                    squares.append(((u - v) ** 2).sum())
            total += np.mean(squares)
        expected.append(total)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


def test_equal_pictures_are_zero_and_order_does_not_matter(photos, noisy):
    network = TinyBackbone()
    assert torch.equal(lpips(photos, photos, network), torch.zeros(8))
    there, back = lpips(photos, noisy(0.2), network), lpips(noisy(0.2), photos, network)
    assert torch.allclose(there, back)


def test_brightness_of_features_does_not_count():
    maps = [torch.rand(2, 5, 4, 4)]
    assert perceptual_distance(maps, [3 * maps[0]]).max() < 1e-6


@pytest.fixture
def torch_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


@pytest.mark.parametrize("net", ["squeeze", "alex"])
def test_the_original_is_used_where_its_weights_lie(photos, noisy, torch_home, net):
    """A backbone of the right shape with random weights, against torchmetrics' own metric on the same file."""
    models = pytest.importorskip("torchvision.models")
    image = pytest.importorskip("torchmetrics.functional.image")
    torch.manual_seed(0)
    kind, file = {
        "squeeze": (models.squeezenet1_1, "squeezenet1_1-b8a52dc0.pth"),
        "alex": (models.alexnet, "alexnet-owt-7be5be79.pth"),
    }[net]
    torch.save(kind().state_dict(), torch_home / file)
    network = find_extractor("lpips", f"lpips_{net}").load()
    assert network.labels["lpips"] == {"squeeze": "LPIPS-Squeeze", "alex": "LPIPS"}[net]
    found = lpips(noisy(0.2), photos, network, batch_size=3)
    x, y = (t.movedim(-1, 1) for t in (noisy(0.2), photos))
    expected = image.learned_perceptual_image_patch_similarity(x, y, net_type=net, normalize=True)
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-3)
    assert bool((lpips(photos, photos, network).abs() < 1e-6).all())


BACKBONES = {  # file of torchvision's weights; numbers of the layers after whose ReLU the original looks, by its own table
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", (1, 4, 7, 9, 10, 11, 12)),
}


@pytest.fixture(params=BACKBONES)
def shared(request, torch_home):
    """(name, torchvision's network with random weights, our extractor on the same weights)."""
    models = pytest.importorskip("torchvision.models")
    name, file, _ = BACKBONES[request.param]
    torch.manual_seed(1)
    network = getattr(models, name)(weights=None).eval()
    torch.save(network.state_dict(), torch_home / file)
    return request.param, network, find_extractor("lpips", f"lpips_{request.param}").load()


def test_the_formula_written_out_anew_on_a_shared_backbone(photos, noisy, shared):
    """Zhang et al., equation 1, position by position in float64, with the fitted weights from torchmetrics' file."""
    import importlib.resources

    net, network, ours = shared
    package = importlib.resources.files("torchmetrics.functional.image.lpips_models")
    fitted = torch.load(str(package / f"{net}.pth"), map_location="cpu", weights_only=True)
    ends = BACKBONES[net][2]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def maps(pictures):
        x, found = ((2 * pictures - 1 - shift) / scale).permute(0, 3, 1, 2), []
        for place, layer in enumerate(network.features[: ends[-1] + 1]):
            x = layer(x)
            if place in ends:
                found.append(x.detach().clone().double().numpy())
        return found

    total = np.zeros(3)
    for depth, (a, b) in enumerate(zip(maps(noisy(0.2)[:3]), maps(photos[:3]), strict=True)):
        weight = fitted[f"lin{depth}.model.1.weight"].double().numpy().reshape(-1)
        u, v = (x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-10) for x in (a, b))
        total += np.einsum("bchw,c->bhw", (u - v) ** 2, weight).mean((1, 2))
    np.testing.assert_allclose(lpips(noisy(0.2)[:3], photos[:3], ours).numpy(), total, rtol=1e-4)


def test_the_authors_package_on_a_shared_backbone(photos, noisy, shared):
    """The package `lpips` with our random backbone in the place of its own."""
    package = pytest.importorskip("lpips", reason="the authors' own code: pip install lpips")
    net, network, ours = shared
    theirs = package.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False).eval()
    layers = dict(enumerate(network.features))
    copied = 0
    for part in (child for name, child in theirs.net.named_children() if name.startswith("slice")):
        for place, layer in part.named_children():
            if any(True for _ in layer.parameters()):
                layer.load_state_dict(layers[int(place)].state_dict())
                copied += 1
    assert copied >= 5
    x, y = (2 * t.movedim(-1, 1) - 1 for t in (noisy(0.2), photos))
    with torch.no_grad():
        expected = theirs(x, y).flatten()
    np.testing.assert_allclose(lpips(noisy(0.2), photos, ours).numpy(), expected.numpy(), rtol=1e-4)


def test_missing_weights_say_where_they_belong(torch_home):
    with pytest.raises(MissingWeights, match=r"alexnet-owt-7be5be79\.pth.*efficientnet_lite0"):
        find_extractor("lpips", "real")
