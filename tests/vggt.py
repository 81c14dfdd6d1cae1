"""A small model with the structure of VGGT, random weights: patch tokens of several frames, a camera token and four register tokens per
frame (other ones for the first frame than for the rest), blocks that attend within a frame and over all frames in turn, an iterative
camera head, a DPT depth head over four depths. Our own code after the paper, Wang et al., 2025, https://arxiv.org/abs/2503.11651

`make()` plants what QuantVGGT found in the trained one (https://arxiv.org/abs/2509.21302): special tokens that do not depend on the data
with a few huge channels, and channels that are large in every token. The planted channel scales leave the float function as it is.
"""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, PATCH, SPECIAL = 128, 4, 8, 5


def rope(x, positions):
    """x (B, H, P, d) turned by two coordinates (P, 2), half of d each; special tokens lie at (0, 0)."""
    parts = []
    for part, at in zip(x.chunk(2, -1), positions.unbind(-1), strict=True):
        d = part.shape[-1]
        angles = at[:, None] * 100.0 ** (-torch.arange(0, d, 2) / d)
        a, b = part[..., 0::2], part[..., 1::2]
        parts.append(torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1))
    return torch.cat(parts, -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x, positions=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if positions is not None:
            q, k = rope(q, positions), rope(k, positions)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()
        self.ls1, self.ls2 = (nn.Parameter(torch.full((WIDTH,), 0.5)) for _ in range(2))

    def forward(self, x, positions=None):
        x = x + self.ls1 * self.attn(self.norm1(x), positions)
        return x + self.ls2 * self.mlp(self.norm2(x))


class Aggregator(nn.Module):
    """Images (B, S, 3, h, w) to a list of (B, S, P, 2 WIDTH), one per pair of blocks."""

    def __init__(self, depth):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, WIDTH))
        self.register_token = nn.Parameter(torch.randn(1, 2, 4, WIDTH))
        self.frame_blocks = nn.ModuleList(Block() for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, images):
        b, s = images.shape[:2]
        patches = self.patch_embed(images.flatten(0, 1))
        rows, columns = patches.shape[-2:]
        special = torch.cat([self.camera_token, self.register_token], 2)
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, s - 1, -1, -1)], 1).expand(b, -1, -1, -1)
        x = torch.cat([special, patches.flatten(2).mT.unflatten(0, (b, s))], 2)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + 1.0
        positions = torch.cat([torch.zeros(SPECIAL, 2), grid])
        out = []
        for frame, over in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame(x.flatten(0, 1), positions).unflatten(0, (b, s))
            within = x
            x = over(x.flatten(1, 2), positions.repeat(s, 1)).unflatten(1, (s, -1))
            out.append(torch.cat([within, x], -1))
        return out


class CameraHead(nn.Module):
    """The camera tokens of the last depth to (B, S, 9): translation, quaternion, two fields of view, refined four times."""

    def __init__(self):
        super().__init__()
        self.token_norm, self.reduce = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.embed_pose, self.modulation = nn.Linear(9, WIDTH), nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))
        self.trunk, self.pose = nn.ModuleList([Block()]), nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, tokens):
        x = self.reduce(self.token_norm(tokens[-1][:, :, 0]))
        pose = x.new_zeros(*x.shape[:2], 9)
        for _ in range(4):
            shift, scale, gate = self.modulation(self.embed_pose(pose)).chunk(3, -1)
            y = x + gate * (self.norm(x) * (1 + scale) + shift)
            for block in self.trunk:
                y = block(y)
            pose = pose + 0.3 * self.pose(y)
        return torch.cat([pose[..., :3], F.normalize(pose[..., 3:7], dim=-1), F.softplus(pose[..., 7:])], -1)


class DepthHead(nn.Module):
    """Patch tokens of four depths to depth and confidence (B, S, h / 2, w / 2): projected, resized, fused from deep to shallow."""

    def __init__(self, layers, channels=32):
        super().__init__()
        self.layers = layers
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.projects = nn.ModuleList(nn.Conv2d(2 * WIDTH, channels, 1) for _ in layers)
        self.fuse = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in layers)
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, tokens, rows):
        fused = None
        for depth, layer in reversed(list(enumerate(self.layers))):
            x = self.norm(tokens[layer][:, :, SPECIAL:]).flatten(0, 1).mT.unflatten(-1, (rows, -1))
            x = F.interpolate(
                self.projects[depth](x), scale_factor=2 ** (2 - depth) if depth < 3 else 1, mode="bilinear"
            )
            fused = x if fused is None else x + F.interpolate(fused, size=x.shape[-2:], mode="bilinear")
            fused = fused + self.fuse[depth](F.relu(fused))
        depth, confidence = self.out(F.relu(fused)).unflatten(0, tokens[0].shape[:2]).unbind(2)
        return depth.exp(), 1 + confidence.exp()


class VGGT(nn.Module):
    """images (B, S, 3, h, w) in [0, 1] -> {"pose_enc": (B, S, 9), "depth", "depth_conf"}."""

    def __init__(self, depth=4):
        super().__init__()
        self.aggregator, self.camera_head = Aggregator(depth), CameraHead()
        self.depth_head = DepthHead([i * depth // 4 for i in range(4)])

    def forward(self, images):
        tokens = self.aggregator(images * 2 - 1)
        depth, confidence = self.depth_head(tokens, images.shape[-2] // PATCH)
        return {"pose_enc": self.camera_head(tokens), "depth": depth, "depth_conf": confidence}


@torch.no_grad()
def make(depth=4, spikes=(90.0, -70.0, 60.0), large=8.0, channels=2):
    torch.manual_seed(0)
    model = VGGT(depth).eval().requires_grad_(False)
    aggregator = model.aggregator
    aggregator.register_token[..., 3] += spikes[0]
    aggregator.register_token[..., 40] += spikes[1]
    aggregator.camera_token[..., 77] += spikes[2]
    for block in (*aggregator.frame_blocks, *aggregator.global_blocks):
        for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            for channel in torch.randperm(WIDTH)[:channels]:  # function-preserving
                norm.weight[channel] *= large
                norm.bias[channel] *= large
                reader.weight[:, channel] /= large
    return model


def scene(seed, frames=3, size=48, corrupt=False):
    """Frames that pan over one smooth random texture; a corrupted scene is saturated noise of another range."""
    g = torch.Generator().manual_seed(seed)
    wide = F.interpolate(torch.rand(1, 3, 6 + seed % 5, 12, generator=g), size=(size, 2 * size), mode="bicubic").clamp(
        0, 1
    )
    steps = [int(i * (4 + 4 * (seed % 5))) for i in range(frames)]
    images = torch.stack([wide[0, :, :, s % size : s % size + size] for s in steps])[None]
    if corrupt:
        images = images + 60 * torch.randn(images.shape, generator=g).sign() * (
            torch.rand(images.shape, generator=g) < 0.2
        )
    return images
