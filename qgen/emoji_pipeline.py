"""The demo's pipeline class: PixArt-Σ with the settings a 64-pixel model needs.

`PixArtSigmaPipeline` assumes a 256- to 2048-pixel model: it rounds sizes to that model's aspect-ratio bins and pads
the prompt to 300 tokens. The demo model draws 64 x 64 pictures from at most 16 tokens, so those defaults are replaced
here and a plain call works:

    picture = demo_pipeline()("noto owl").images[0]

Importing this module imports diffusers; `qgen.demo` does so on first use. Model family: Chen et al., 2024,
PixArt-Σ, https://arxiv.org/abs/2403.04692; base class from https://github.com/huggingface/diffusers.
"""

from __future__ import annotations

import functools
import inspect

from diffusers import PixArtSigmaPipeline

from qgen.assets import demo_prompts

__all__ = ["DEFAULTS", "EmojiPixArtPipeline"]

DEFAULTS = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "height": 64,
    "width": 64,
    "clean_caption": False,
    "use_resolution_binning": False,
    "max_sequence_length": 16,
}


class EmojiPixArtPipeline(PixArtSigmaPipeline):
    """A `PixArtSigmaPipeline` whose defaults fit the demo model; whatever the caller passes wins.

    Once `qgen.demo.register` has run, `DiffusionPipeline.from_pretrained` finds this class by its name, so a saved
    pipeline keeps its defaults.
    """

    @property
    def calibration_prompts(self) -> list[str]:
        """What `qgen.quantize` draws while calibrating, unless told otherwise: the model knows no other words."""
        return demo_prompts("calibration")

    @functools.wraps(PixArtSigmaPipeline.__call__)
    def __call__(self, *args, **options):
        asked = inspect.signature(super().__call__).bind_partial(*args, **options)
        extra = asked.arguments.pop("kwargs", {})
        return super().__call__(**(DEFAULTS | asked.arguments | extra))
