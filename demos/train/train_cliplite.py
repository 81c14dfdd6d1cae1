"""CLIP-lite: two linear heads that bring pictures and words into one space of 256 numbers.

    python demos/train/train_cliplite.py --data build/emoji --out demos/assets/cliplite.safetensors

EfficientNet-Lite0 and MiniLM stay frozen; the heads learn by InfoNCE with several positives, since one name has up to
four pictures. 15 % of the names are never trained on; retrieval among those is printed. Two CPU minutes for the
features, fifteen seconds for the heads.
van den Oord et al., 2018, https://arxiv.org/abs/1807.03748; Khosla et al., 2020, https://arxiv.org/abs/2004.11362
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from common import PERMISSIVE, ask, load_emoji
from torch import Tensor, nn

from qgen.eval.cliplite import project_images, project_texts
from qgen.eval.efficientnet_lite0 import EfficientNetLite0
from qgen.eval.images import batches
from qgen.eval.minilm import MiniLM

HELD_OUT = 0.15
EMBEDDING = 256
BATCH = 512


@dataclass(frozen=True)
class Pairs:
    """Features (n, 1280); embeddings (n, 384) of name, of style and name, and of tags; the name's number (n,)."""

    images: Tensor
    texts: dict[str, Tensor]
    names: Tensor

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.images[rows], {kind: t[rows] for kind, t in self.texts.items()}, self.names[rows])


class Heads(nn.Module):
    """Two linear maps; dropout on the inputs, because there are four pictures per name and 1280 features."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.image, self.text = nn.Linear(images.shape[1], EMBEDDING), nn.Linear(384, EMBEDDING)
        self.mean, self.std = images.mean(0), images.std(0) + 1e-3
        self.log_scale = nn.Parameter(torch.tensor(2.7))
        self.drop_image, self.drop_text = nn.Dropout(0.3), nn.Dropout(0.1)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.tensors()
        # Features enter standardised and sentences with about unit variance per number: one learning rate suits both.
        x = self.drop_image((images - self.mean) / self.std) * self.std + self.mean
        return project_images(x, heads), project_texts(self.drop_text(texts), heads)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "image_mean": self.mean,
            "image_std": self.std,
            "image_weight": self.image.weight,
            "image_bias": self.image.bias,
            "text_weight": self.text.weight * 384**0.5,
            "text_bias": self.text.bias,
        }


def main() -> None:
    parser = ask(__doc__, None, "demos/assets/cliplite.safetensors")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--cache", type=Path, help="keep the frozen networks' features in this file")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    emoji = load_emoji(args.data, PERMISSIVE)
    names = sorted({about["name"] for about in emoji.about})
    random.Random(args.seed).shuffle(names)
    pairs = embed(emoji, {name: i for i, name in enumerate(names)}, args.cache)
    unseen = pairs.names < HELD_OUT * len(names)
    heads = train(pairs[~unseen], args.epochs)
    for what, rows in (("names never trained on", unseen), ("names trained on", ~unseen)):
        print(f"{what}: {retrieval(heads, pairs[rows])}")
    save(heads, args.out)


def embed(emoji, number: dict[str, int], cache: Path | None) -> Pairs:
    from safetensors.torch import load_file, save_file

    if cache is not None and cache.exists():
        found = load_file(str(cache))
    else:
        network, language = EfficientNetLite0(), MiniLM()
        pictures = torch.from_numpy(emoji.pictures).float() / 255
        found = {"images": torch.cat([network.features(batch) for batch in batches(pictures, 32)])}
        for kind, sentences in sentences_of(emoji.about).items():
            parts = [language.embed(sentences[i : i + 256]) for i in range(0, len(sentences), 256)]
            found[kind] = torch.cat(parts)
        if cache is not None:
            save_file(found, str(cache))
    images = found.pop("images")
    return Pairs(images, found, torch.tensor([number[about["name"]] for about in emoji.about]))


def sentences_of(about: list[dict]) -> dict[str, list[str]]:
    return {
        "name": [a["name"].lower() for a in about],
        "prompt": [f"{a['style']} {a['name']}".lower() for a in about],
        "tags": [" ".join(a["tags"][:6]) or a["name"].lower() for a in about],
    }


def train(pairs: Pairs, epochs: int) -> Heads:
    heads = Heads(pairs.images)
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=0.2)
    kinds, n = list(pairs.texts), len(pairs.images)
    steps = epochs * (n // BATCH)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        batch = pairs[torch.randperm(n)[:BATCH]]
        choice = torch.multinomial(torch.tensor([0.35, 0.35, 0.3]), len(batch.images), replacement=True)
        texts = torch.stack([batch.texts[kind] for kind in kinds])[choice, torch.arange(len(choice))]
        loss = contrast(*heads(batch.images, texts), batch.names, heads.log_scale.exp())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{steps} steps of {BATCH}, last loss {loss.item():.3f}")
    return heads.eval().requires_grad_(False)


def contrast(images: Tensor, texts: Tensor, names: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy both ways, where every pair of one name is a positive."""
    logits = scale * images @ texts.T
    same = (names[:, None] == names).float()
    same = same / same.sum(1, keepdim=True)
    return -0.5 * sum((same * side.log_softmax(1)).sum(1).mean() for side in (logits, logits.T))


def retrieval(heads: Heads, pairs: Pairs) -> str:
    """Each picture against all names of the set: how often the right one comes first or among the first five."""
    names, which = pairs.names.unique(return_inverse=True)
    first = torch.stack([(pairs.names == name).nonzero()[0, 0] for name in names])
    images, _ = heads(pairs.images, pairs.texts["name"])
    _, texts = heads(pairs.images[first], pairs.texts["name"][first])
    cosines = images @ texts.T  # (n, names)
    right = cosines.gather(1, which[:, None])
    rank = (cosines > right).sum(1)
    area = (right > cosines).sum() / (cosines.numel() - len(cosines))
    return (
        f"{len(images)} pictures, {len(names)} names, top-1 {(rank < 1).float().mean():.3f}, top-5 "
        f"{(rank < 5).float().mean():.3f} (chance {1 / len(names):.4f}), AUC {area:.3f}, "
        f"cosine of pairs {right.mean():.3f}, of all {cosines.mean():.3f}"
    )


def save(heads: Heads, path: Path) -> None:
    from safetensors.torch import save_file

    about = "heads over EfficientNet-Lite0 and all-MiniLM-L6-v2; trained on Noto, Noto v1, Fluent; see ATTRIBUTION.md"
    tensors = {name: tensor.half().contiguous() for name, tensor in heads.tensors().items()}
    save_file(tensors, str(path), metadata={"about": about})
    path.chmod(0o644)
    print(f"{sum(t.nbytes for t in tensors.values()) / 1e6:.2f} MB in {path}")


if __name__ == "__main__":
    main()
