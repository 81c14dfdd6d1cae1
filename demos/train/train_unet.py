r"""A Stable-Diffusion-style pipeline: a UNet with convolutions and cross-attention, and a CLIP text encoder, trained together.

    python demos/train/train_unet.py --data build/emoji --vae build/vae --out build/emoji-sd --cpu-min 120

    x_t = √ᾱ_t x + √(1 - ᾱ_t) ε,      v = √ᾱ_t ε - √(1 - ᾱ_t) x,      loss = | v(x_t, t, words) - v |²

Captions are those of train_dit.py. AdamW, cosine rate, averaged weights. Convolutions run channels-last in bfloat16, which is fastest on
a CPU; a step still costs about five of the transformer's. Saved in float16 as a `StableDiffusionPipeline`.

Rombach et al., 2022, https://arxiv.org/abs/2112.10752; Salimans & Ho, 2022, https://arxiv.org/abs/2202.00512 (v)
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from common import ask, contact_sheet, descend, load_emoji
from torch import Tensor
from train_dit import GROUPS, SHEET, STYLES, TOKENS, caption
from train_vae import encode


def main() -> None:
    parser = ask(__doc__, 120, "build/emoji-sd")
    parser.add_argument("--vae", type=Path, default=Path("build/vae"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    emoji = load_emoji(args.data, STYLES, GROUPS)
    pipe = build(emoji.about, args.vae)
    log = train(pipe, encode(pipe.vae, emoji.tensor()), emoji.about, args)
    contact_sheet([draw(pipe, list(row)) for row in SHEET], args.out / "sample.png")
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.half()
    pipe.save_pretrained(args.out)
    (args.out / "log.json").write_text(json.dumps(log))


def build(about: list[dict], vae: Path):
    """An untrained pipeline around a trained autoencoder."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tokenizer_of(about)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),  # diffusers' name for the number of heads
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=128,
        )
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        solver_order=2,
    )
    trained = AutoencoderKL.from_pretrained(vae, local_files_only=True).float().eval().requires_grad_(False)
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=trained,
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer_of(about: list[dict], size: int = 2600):
    """A CLIP tokenizer whose pairs were merged on the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([f"{a['style']} {a['name']} {' '.join(a['tags'])}".lower() for a in about], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


def train(pipe, latents: Tensor, about: list[dict], args) -> list[tuple[int, float]]:
    from diffusers import DDPMScheduler

    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    parts = (pipe.unet.train(), pipe.text_encoder.train())
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (args.batch,))
        return loss_of(pipe, noise, latents[rows], [caption(about[i]) for i in rows.tolist()])

    log = descend(optimizer, parameters, loss, args.cpu_min, args.rate, warmup=100, every=50)
    for part in parts:
        part.eval()
    return log


def loss_of(pipe, scheduler, x: Tensor, captions: list[str]) -> Tensor:
    t, noise = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),)), torch.randn_like(x)
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        states = pipe.text_encoder(tokens.input_ids).last_hidden_state
        v = pipe.unet(noisy, t, encoder_hidden_states=states).sample
    return (v.float() - scheduler.get_velocity(x, noise, t)).square().mean()


def draw(pipe, prompts: list[str]) -> list[np.ndarray]:
    pictures = pipe(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return list((pictures * 255).round().astype(np.uint8))


if __name__ == "__main__":
    main()
