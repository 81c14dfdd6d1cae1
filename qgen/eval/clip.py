r"""Does the picture show what the prompt says? 100 times the cosine between the two embeddings.

    score = 100 · (image · text) / (|image| |text|)

With OpenAI's CLIP this is the CLIPScore of papers (there the mean is cut at zero; here a negative one stays visible).
With another pair of towers it carries their name. Only its *change* from the 16-bit pipeline says something about
quantization.

Radford et al., 2021, https://arxiv.org/abs/2103.00020; Hessel et al., 2021, https://arxiv.org/abs/2104.08718
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["clip_score"]


def clip_score(pictures: Tensor, prompts: Sequence[str], extractor, batch_size: int = 16) -> Tensor:
    """Returns (n,) scores of pictures (n, H, W, 3) against their prompts.

    `extractor` has `embed_images((B, H, W, 3))` and `embed_texts(list)`, both (B, K). Raises ValueError if the counts
    differ.
    """
    if len(pictures) != len(prompts) or not len(prompts):
        raise ValueError(f"one prompt per picture wanted, found {len(prompts)} prompts and {len(pictures)} pictures")
    scores, start = [], 0
    for batch in batches(pictures, batch_size):
        words = list(prompts[start : start + len(batch)])
        start += len(batch)
        image, text = extractor.embed_images(batch).float(), extractor.embed_texts(words).float()
        scores.append(100 * torch.cosine_similarity(image, text, dim=-1).cpu())
    return torch.cat(scores)


@metrics.register("clip")
@needs("prompts", "network")
def score_clip(shots: Shots) -> Measured:
    prompts, extractor = shots.need_prompts("clip"), shots.extractor_for("clip")
    mine, theirs = shots.on_both(lambda pictures: clip_score(pictures, prompts, extractor, shots.batch_size))
    label = extractor.labels["clip"]
    return Measured(label, "", "higher", per_prompt=mine, reference_per_prompt=theirs, extractor=extractor)
