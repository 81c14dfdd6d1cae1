r"""CLIP-IQA: does the picture look more like "Good photo." or like "Bad photo." to CLIP? No reference is needed.

    quality = softmax( 100 · cos(image, good), 100 · cos(image, bad) )_good        in [0, 1]

The method's authors take CLIP's ResNet-50 without position embeddings; over the vision transformers read here
positions stay, so values are comparable only over one network. The small CLIP-lite knows emoji and not photographs, and
does not serve this metric: without CLIP's weights it is missing, and says so.

Wang, Chan & Loy, 2022, https://arxiv.org/abs/2207.12396
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["ANCHORS", "clip_iqa"]

ANCHORS = ("Good photo.", "Bad photo.")


def clip_iqa(pictures: Tensor, extractor, batch_size: int = 16) -> Tensor:
    """Returns (n,) qualities in [0, 1] of pictures (n, H, W, 3); `extractor` has embed_images and embed_texts."""
    anchors = torch.nn.functional.normalize(extractor.embed_texts(list(ANCHORS)).float(), dim=-1)  # (2, K)
    found = []
    for batch in batches(pictures, batch_size):
        image = torch.nn.functional.normalize(extractor.embed_images(batch).float(), dim=-1)
        found.append((100 * image @ anchors.T).softmax(-1)[:, 0].cpu())
    return torch.cat(found)


@metrics.register("clip_iqa")
@needs("network")
def score_clip_iqa(shots: Shots) -> Measured:
    extractor = shots.extractor_for("clip_iqa")
    mine, theirs = shots.on_both(lambda pictures: clip_iqa(pictures, extractor, shots.batch_size))
    label = extractor.labels["clip_iqa"]
    return Measured(label, "", "higher", per_prompt=mine, reference_per_prompt=theirs, extractor=extractor)
