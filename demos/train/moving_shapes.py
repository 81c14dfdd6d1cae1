"""Films of moving shapes, the words that name them, and the smallest pipeline that draws such films with a Wan transformer.

A prompt is "colour shape direction", such as "red circle left". There is no autoencoder and no text encoder: the transformer works on
pixels, and the prompt is three one-hot rows. That leaves what video quantization is about: tokens of several frames in one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["COLOURS", "DIRECTIONS", "FRAMES", "SHAPES", "SIDE", "ShapesPipeline", "film", "prompts", "tokens"]

FRAMES, SIDE, TEXT = 8, 32, 32
COLOURS = {
    "red": (0.9, 0.15, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1), "white": (0.95, 0.95, 0.95),
    "pink": (0.95, 0.4, 0.7),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "away": (0.7, -0.7), "near": (-0.7, 0.7)}
_WORDS = [*COLOURS, *SHAPES, *DIRECTIONS]


def prompts() -> list[str]:
    """All of them, in an order that mixes colours, shapes and directions."""
    made = [f"{c} {s} {d}" for c in COLOURS for s in SHAPES for d in DIRECTIONS]
    return [made[i * 37 % len(made)] for i in range(len(made))]  # 37 and their number have no common factor


def tokens(prompt: str) -> Tensor:
    """(3, TEXT) one-hot rows, all zero for the empty prompt. ValueError for another number of words, or unknown ones."""
    rows = torch.zeros(3, TEXT)
    words = prompt.split()
    if not words:
        return rows
    if len(words) != 3 or any(word not in _WORDS for word in words):
        raise ValueError(f"a prompt is a colour, a shape and a direction out of {', '.join(_WORDS)}, found {prompt!r}")
    for row, word in zip(rows, words, strict=True):
        row[_WORDS.index(word)] = 1
    return rows


def film(prompt: str, generator: torch.Generator) -> Tensor:
    """(3, FRAMES, SIDE, SIDE) in [-1, 1]: the shape moves steadily over a dark ground; place, size and speed are drawn."""
    colour, shape, direction = prompt.split()
    draw = torch.rand(4, generator=generator)
    radius, speed = 4 + 2 * draw[0], 1.2 + 1.0 * draw[1]
    way = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    middle = SIDE / 2 + (draw[2:] - 0.5) * SIDE / 3  # where it is halfway through
    time = torch.arange(FRAMES) - (FRAMES - 1) / 2
    at = middle + time[:, None] * speed * way  # (FRAMES, 2), x before y
    grid = torch.arange(SIDE) + 0.5
    dx, dy = grid[None, None] - at[:, 0, None, None], grid[None, :, None] - at[:, 1, None, None]
    far = {
        "circle": lambda: (dx.square() + dy.square()).sqrt(),
        "square": lambda: torch.maximum(dx.abs(), dy.abs()) * 1.1,
        "triangle": lambda: torch.maximum(dx.abs() * math.cos(math.pi / 6) - dy / 2, dy) * 1.6,
    }[shape]()
    inside = (radius - far + 0.5).clamp(0, 1)[None]  # one pixel of slope
    ground, front = torch.full((3, 1, 1, 1), 0.12), torch.tensor(COLOURS[colour]).reshape(3, 1, 1, 1)
    return 2 * (ground * (1 - inside) + front * inside) - 1


class ShapesPipeline:
    """A `WanTransformer3DModel` and the Euler steps of rectified flow; what qgen asks of a pipeline and no more."""

    def __init__(self, transformer: Any):
        self.transformer = transformer

    @classmethod
    def from_folder(cls, folder: Path) -> ShapesPipeline:
        """The trained one, float32."""
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        return cls(model.eval().requires_grad_(False))

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    @property
    def calibration_prompts(self) -> list[str]:
        return prompts()[::2]

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str], generator: Any = None, num_inference_steps: int = 20, guidance: float = 2.0
    ) -> Tensor:
        """Films (n, FRAMES, SIDE, SIDE, 3) in [0, 1]. generator: one for all, or one for each prompt."""
        asked = [prompt] if isinstance(prompt, str) else list(prompt)
        each = generator if isinstance(generator, list) else [generator] * len(asked)
        x = torch.stack([torch.randn(3, FRAMES, SIDE, SIDE, generator=g) for g in each])
        text = torch.stack([tokens(p) for p in ("",) * len(asked) + tuple(asked)])
        steps = torch.linspace(1, 0, num_inference_steps + 1).tolist()
        for now, then in pairwise(steps):
            time = torch.full((2 * len(x),), 1000 * now)
            v = self.transformer(torch.cat([x, x]), timestep=time, encoder_hidden_states=text).sample
            empty, told = v.chunk(2)
            x = x + (then - now) * (empty + guidance * (told - empty))
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
