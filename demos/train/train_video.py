r"""The video demo: a small Wan transformer trained by rectified flow on films of moving shapes.

    python demos/train/train_video.py --out demos/video --cpu-min 16

    x_s = (1 - s) x + s ε,      loss = | v(x_s, s, words) - (ε - x) |²,      s = sigmoid(n), n ~ N(0, 1)

One prompt in ten is empty, which guidance needs. AdamW, cosine rate, averaged weights. Films are made as they are needed, so there is
no data set. Saved in float16 as a `WanTransformer3DModel`, with its training log and a picture of a few films.

Wan team, 2025, https://arxiv.org/abs/2503.20314; Liu et al., 2022, https://arxiv.org/abs/2209.03003 (rectified flow)
"""

from __future__ import annotations

import json

import numpy as np
import torch
from common import ask, contact_sheet, descend
from moving_shapes import ShapesPipeline, film, prompts, tokens
from torch import Tensor, nn

SHEET = ("red circle right", "green square down", "blue triangle left", "yellow circle up")


def main() -> None:
    parser = ask(__doc__, 16, "demos/video")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pipe = ShapesPipeline(build())
    log = train(pipe.transformer, args)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe.transformer.half().save_pretrained(args.out)
    pipe.transformer.float()
    films = pipe(SHEET, torch.Generator().manual_seed(0))
    contact_sheet(
        [[(255 * frame).round().byte().numpy().astype(np.uint8) for frame in one] for one in films],
        args.out / "sample.png",
    )
    (args.out / "log.json").write_text(json.dumps(log))


def build() -> nn.Module:
    """Untrained: 256 tokens a film, 4 layers of 128."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(2, 4, 4), num_attention_heads=4, attention_head_dim=32, in_channels=3, out_channels=3, text_dim=32, freq_dim=64,
        ffn_dim=512, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def train(model: nn.Module, args) -> list[tuple[int, float]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    known, random = prompts(), torch.Generator().manual_seed(args.seed)
    model.train()

    def loss() -> Tensor:
        asked = [known[i] for i in torch.randint(len(known), (args.batch,), generator=random).tolist()]
        x = torch.stack([film(prompt, random) for prompt in asked])
        told = [
            prompt if drop > 0.1 else "" for prompt, drop in zip(asked, torch.rand(args.batch).tolist(), strict=True)
        ]
        s, noise = torch.randn(args.batch).sigmoid(), torch.randn_like(x)
        at = s.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            text = torch.stack([tokens(prompt) for prompt in told])
            v = model((1 - at) * x + at * noise, timestep=1000 * s, encoder_hidden_states=text).sample
        return (v.float() - (noise - x)).square().mean()

    log = descend(optimizer, model.parameters(), loss, args.cpu_min, args.rate, warmup=50, every=50)
    model.eval().requires_grad_(False)
    return [(step, round(mean, 4)) for step, mean in log]


if __name__ == "__main__":
    main()
