"""Yardsticks that draw: what a choice of formats does to the final latents and to the pictures of a few prompts.

Each prompt starts from the noise that `generate` gives it, so that what differs is the model. `qgen.allocate` finds them by name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from qgen.allocate.yardsticks import first_tensor, yardsticks
from qgen.eval.generate import generate, seed_of
from qgen.eval.metrics import Shots
from qgen.eval.psnr import psnr
from qgen.eval.ssim import ssim
from qgen.methods.base import sqnr_db
from qgen.progress import quiet

__all__ = ["Latents", "Pictures"]


@yardsticks.register("latent")
class Latents:
    """Squared error of the final latents of whole drawings, relative to their energy.

    pipe: a pipeline that takes prompt, generator and output_type="latent". options: further arguments of its call.
    """

    names = ("latent",)

    def __init__(
        self, pipe: Any, denoisers: Collection[str], prompts: Sequence[str], options: dict | None = None, seed: int = 0
    ):
        self.pipe, self.denoisers, self.prompts = pipe, tuple(denoisers), list(prompts)
        self.options, self.seed = dict(options or {}), seed
        self.wanted = self._draw()

    def _draw(self) -> Tensor:
        noise = [torch.Generator("cpu").manual_seed(seed_of(prompt, self.seed)) for prompt in self.prompts]
        with torch.no_grad(), quiet(self.pipe):
            result = self.pipe(
                prompt=self.prompts, generator=noise, output_type="latent", return_dict=False, **self.options
            )
        return first_tensor(result).float().cpu()

    def __call__(self) -> dict[str, float]:
        return {"latent": float((self._draw() - self.wanted).square().sum() / self.wanted.square().sum())}

    def scores(self) -> dict[str, float]:
        return {"sqnr": sqnr_db(self()["latent"])}


@yardsticks.register("pictures")
class Pictures:
    """Damage to pictures: "structure" (mean square difference, PSNR's), "ssim" (1 − SSIM), "content" (1 − cos of CLIP's embeddings).

    clip: whether content is measured, with the network that `qgen.evaluate` takes for its CLIP score.
    """

    def __init__(
        self, pipe: Any, denoisers: Collection[str], prompts: Sequence[str], options: dict | None = None, seed: int = 0,
        clip: bool = False,
    ):  # fmt: skip
        self.pipe, self.denoisers, self.prompts = pipe, tuple(denoisers), list(prompts)
        self.options, self.seed = dict(options or {}), seed
        self.names = ("structure", "ssim", *(("content",) if clip else ()))
        self.network = Shots(torch.zeros(0)).extractor_for("clip") if clip else None
        self.wanted = self._draw()
        self.meant = self._embed(self.wanted)

    def _draw(self) -> Tensor:
        return generate(self.pipe, self.prompts, seed=self.seed, progress=False, **self.options)

    def _embed(self, pictures: Tensor) -> Tensor | None:
        return None if self.network is None else self.network.embed_images(pictures).float()

    def __call__(self) -> dict[str, float]:
        got = self._draw()
        alike = float(ssim(got, self.wanted).mean())
        found = {"structure": float((got - self.wanted).square().mean()), "ssim": 1 - alike}
        if self.network is not None:
            found["content"] = 1 - float(torch.cosine_similarity(self._embed(got), self.meant, dim=-1).mean())
        return found

    def scores(self) -> dict[str, float]:
        """Means over pictures, as `qgen.evaluate` gives them: {"psnr": dB, "ssim": …}."""
        got = self._draw()
        return {"psnr": float(psnr(got, self.wanted).mean()), "ssim": float(ssim(got, self.wanted).mean())}
