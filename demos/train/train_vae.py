r"""The autoencoder: 64 x 64 x 3 pictures to 16 x 16 x 4 latents of zero mean and unit variance, and back.

    python demos/train/train_vae.py --data build/emoji --out build/vae --cpu-min 30

    loss = |r - x| + |r - x|² + ½ |∇r - ∇x| + 10⁻⁴ KL( q(z | x) || N(0, 1) )

The gradient term keeps outlines sharp. At the end each latent channel is shifted and scaled to unit variance *inside*
the two 1 x 1 convolutions around the latent, so that the pipeline's scaling factor is 1. Trained on Noto, Noto v1 and
Fluent pictures alone.

Kingma & Welling, 2013, https://arxiv.org/abs/1312.6114; Rombach et al., 2022, https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import json

import torch
from common import PERMISSIVE, Average, ask, budget, contact_sheet, cosine, load_emoji
from torch import Tensor, nn

BATCH = 32
RATE = 2.5e-3
HELD_OUT = 96


def main() -> None:
    args = ask(__doc__, 30, "build/vae").parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    x = load_emoji(args.data, PERMISSIVE).tensor()
    x = x[torch.randperm(len(x))]
    held_out, x = x[:HELD_OUT], x[HELD_OUT:]

    vae = build()
    log = train(vae, x, held_out, args.cpu_min)
    whiten(vae, x)
    print(f"{psnr(vae, held_out):.2f} dB on {len(held_out)} held-out pictures")
    rows = [held_out[:12], reconstruct(vae, held_out[:12])]
    contact_sheet([list(to_bytes(row)) for row in rows], args.out / "pairs.png")
    vae.save_pretrained(args.out)
    (args.out / "log.json").write_text(json.dumps(log))


def build() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def train(vae: nn.Module, x: Tensor, held_out: Tensor, cpu_minutes: float) -> list[tuple[int, float, float]]:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average, log = Average(vae.parameters(), 0.995), []
    for step, spent in enumerate(budget(cpu_minutes)):
        optimizer.param_groups[0]["lr"] = RATE * cosine(spent, step, warmup=50)
        batch = x[torch.randint(len(x), (BATCH,))]
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        loss = loss_of(vae, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        if step % 100 == 99:
            average.swap()
            log.append((step + 1, loss.item(), psnr(vae, held_out)))
            average.swap()
            print(f"step {log[-1][0]}, {100 * spent:.0f} %, loss {log[-1][1]:.4f}, {log[-1][2]:.2f} dB", flush=True)
    print(f"{average.steps} steps of {BATCH}")
    average.swap()
    return log


def loss_of(vae: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(x).latent_dist
        r = vae.decode(latent.sample()).sample
    error = r.float() - x
    slopes = (error.diff(dim=-1), error.diff(dim=-2))
    divergence = 0.5 * (latent.mean.float() ** 2 + latent.var.float() - 1 - latent.logvar.float()).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * sum(s.abs().mean() for s in slopes) + 1e-4 * divergence


@torch.no_grad()
def whiten(vae: nn.Module, x: Tensor) -> None:
    """Folds (z - mean) / std per channel into quant_conv, its inverse into post_quant_conv: pictures stay the same."""
    z = encode(vae, x)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    channels = len(mean)
    weight[:channels] /= std.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()  # the second half are log variances
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in x.split(64)])


@torch.no_grad()
def reconstruct(vae: nn.Module, x: Tensor) -> Tensor:
    return vae.decode(encode(vae, x)).sample.clamp(-1, 1)


def psnr(vae: nn.Module, x: Tensor) -> float:
    return float(10 * torch.log10(4 / (reconstruct(vae, x) - x).square().mean()))


def to_bytes(x: Tensor):
    return ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


if __name__ == "__main__":
    main()
