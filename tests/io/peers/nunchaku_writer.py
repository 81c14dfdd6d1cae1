"""Nunchaku's byte order written a second time, from the description of its tiles: where in the file each single number goes.

Nothing here is shared with the library. `file_of` makes a checkpoint out of natural tensors; `Formula` is the meaning of one layer.
"""

import numpy as np
import torch
from torch import nn

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def codes_to_file(codes):
    """Nibbles (N, K), 0 to 15, to (N, K / 2) int8."""
    rows, cols = codes.shape
    nibbles = np.zeros(rows * cols, np.uint8)
    nibbles[_code_places(rows, cols)] = codes.numpy().astype(np.uint8)
    return torch.from_numpy((nibbles[::2] | nibbles[1::2] << 4).reshape(rows, cols // 2).view(np.int8))


def codes_from_file(stored):
    """(N, K / 2) int8 to nibbles (N, K) uint8."""
    raw = stored.contiguous().numpy().view(np.uint8).ravel()
    nibbles = np.stack([raw & 15, raw >> 4], 1).ravel()
    return torch.from_numpy(nibbles[_code_places(stored.shape[0], stored.shape[1] * 2)])


def scales_to_file(scales):
    """(N, G) 16-bit to (G, N)."""
    return _put(scales, _scale_places(*scales.shape))


def scales_from_file(stored):
    """(G, N) to (N, G)."""
    return _get(stored, _scale_places(*stored.shape[::-1]))


def micro_to_file(scales):
    """(N, K / 16) e4m3 to (K / 16, N)."""
    return _put(scales.view(torch.uint8), _micro_places(*scales.shape)).view(torch.float8_e4m3fn)


def micro_from_file(stored):
    """(K / 16, N) e4m3 to (N, K / 16)."""
    return _get(stored.view(torch.uint8), _micro_places(*stored.shape[::-1])).view(torch.float8_e4m3fn)


def vector_to_file(vector):
    """(N,) to (N,)."""
    return scales_to_file(vector[:, None])[0]


def vector_from_file(stored):
    """(N,) to (N,)."""
    return scales_from_file(stored[None])[:, 0]


def up_to_file(up):
    """(N, R) to (N, R)."""
    return _put(up, _up_places(*up.shape)).reshape(up.shape)


def up_from_file(stored):
    """(N, R) to (N, R)."""
    return _get(stored, _up_places(*stored.shape))


def down_to_file(down):
    """(R, K) to (K, R)."""
    return _put(down, _down_places(*down.shape))


def down_from_file(stored):
    """(K, R) to (R, K)."""
    return _get(stored, _down_places(*stored.shape[::-1]))


def awq_to_file(codes):
    """Nibbles (N, K) to (N / 4, K / 2) int32."""
    rows, cols = codes.shape
    place, shift = _awq_places(rows, cols)
    words = np.zeros(rows * cols // 4, np.int64)
    np.add.at(words, place.ravel(), (codes.numpy().astype(np.int64) << shift).ravel())
    return torch.from_numpy(words.astype(np.uint16).view(np.int32).reshape(rows // 4, cols // 2))


def awq_from_file(stored):
    """(N / 4, K / 2) int32 to nibbles (N, K) uint8."""
    place, shift = _awq_places(stored.shape[0] * 4, stored.shape[1] * 2)
    words = stored.contiguous().numpy().view(np.uint16).ravel().astype(np.int64)
    return torch.from_numpy((words[place] >> shift & 15).astype(np.uint8))


def _code_places(rows, cols):
    n, k = np.indices((rows, cols))
    row, col = n % 128, k % 64
    lane = ((row // 16) * 8 + row % 8) * 4 + col // 8 % 4
    word = (((n // 128) * (cols // 64) + k // 64) * 256 + lane) * 4 + (row // 8 % 2) * 2 + col // 32
    return word * 8 + col % 8


def _scale_places(rows, groups):
    n, g = np.indices((rows, groups))
    row = n % 128
    return ((((n // 128) * groups + g) * 8 + row // 16) * 4 + row // 2 % 4) * 4 + row // 8 % 2 * 2 + row % 2


def _micro_places(rows, groups):
    n, g = np.indices((rows, groups))
    row = n % 128
    tile = (n // 128) * (groups // 4) + g // 4
    return (((tile * 8 + row % 8) * 4 + row // 8 % 4) * 4 + row // 32) * 4 + g % 4


def _up_places(rows, rank):
    n, r = np.indices((rows, rank))
    return _fragment(n // 16 * (rank // 16) + r // 16, n % 16, r % 16)


def _down_places(rank, cols):
    r, k = np.indices((rank, cols))
    return _fragment(k // 16 * (rank // 16) + r // 16, r % 16, k % 16)


def _awq_places(rows, cols):
    n, k = np.indices((rows, cols))
    word = k // 32 * 8 + k % 8
    return ((n // 4 * (cols // 64) + word // 16) * 4 + n % 4) * 16 + word % 16, 4 * (k % 32 // 8)


def _fragment(tile, row, col):
    return (((tile * 8 + row % 8) * 4 + col // 2 % 4) * 2 + row // 8) * 4 + col // 8 * 2 + col % 2


def _put(t, place):
    out = torch.zeros(t.numel(), dtype=t.dtype)
    out[torch.from_numpy(place.ravel())] = t.reshape(-1)
    return out.reshape(t.shape[::-1])


def _get(t, place):
    return t.reshape(-1)[torch.from_numpy(place)]


# -- layers in natural order -----------------------------------------------------------------------------------------------------------


def random_svdq(n, k, kind="int4", rank=16, gelu=False, dtype=torch.bfloat16, per_row=None, wtscale=None):
    """A random W4A4 layer. kind: "int4" or "nvfp4"; per_row: (N,) channel scales; gelu: its input is shifted, if INT4."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    block = 64 if kind == "int4" else 16
    scales = torch.rand(n, k // block) + 0.5
    unsigned = gelu and kind == "int4"
    layer = {
        "kind": kind,
        "codes": codes,
        "scales": (scales / (7 * k**0.5)).to(dtype) if kind == "int4" else (scales * 200).to(torch.float8_e4m3fn),
        "smooth": (torch.rand(k) + 0.5).to(dtype),
        "down": (torch.randn(rank, k) / k**0.5).to(dtype),
        "up": (torch.randn(n, rank) / rank**0.5 / 4).to(dtype),
        "bias": (torch.randn(n) / 8).to(dtype),
        "unsigned": unsigned,
    }
    if kind == "nvfp4":
        layer["wtscale"] = torch.tensor([1 / (1200 * k**0.5)] if wtscale is None else [wtscale]).to(dtype)
        layer["wcscales"] = (torch.ones(n) if per_row is None else per_row).to(dtype)
    if unsigned:  # as the file has it: the bias takes away what the shift adds
        undo = 0.171875 * (weight_of(layer) / layer["smooth"].float()).sum(1)
        layer["bias"] = (layer["bias"].float() - undo).to(dtype)
    return layer


def random_awq(n, k, dtype=torch.bfloat16):
    return {
        "kind": "awq",
        "codes": torch.randint(0, 16, (n, k), dtype=torch.uint8),
        "scales": ((torch.rand(n, k // 64) + 0.5) / (7 * k**0.5)).to(dtype),
        "zeros": (-(torch.rand(n, k // 64) + 0.5) / k**0.5).to(dtype),
        "bias": (torch.randn(n) / 8).to(dtype),
    }


def weight_of(layer):
    """The rounded weight (N, K) float32, in the basis of the smoothed input."""
    codes, scales = layer["codes"].long(), layer["scales"].float()
    if layer["kind"] == "awq":
        return codes * scales.repeat_interleave(64, 1) + layer["zeros"].float().repeat_interleave(64, 1)
    if layer["kind"] == "int4":
        return torch.where(codes > 7, codes - 16, codes) * scales.repeat_interleave(64, 1)
    return E2M1[codes] * scales.repeat_interleave(16, 1) * layer["wcscales"].float()[:, None] * layer["wtscale"].float()


def padded(layer, n, k):
    """The layer as the kernels pad it, to (N, K)."""

    def grow(t, rows, cols=None):
        cols = cols or t.shape[1]
        raw = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
        return nn.functional.pad(raw, (0, cols - t.shape[1], 0, rows - t.shape[0])).view(t.dtype)

    block = 16 if layer["kind"] == "nvfp4" else 64
    out = dict(layer)
    out["codes"], out["scales"] = grow(layer["codes"], n, k), grow(layer["scales"], n, k // block)
    out["down"], out["up"] = grow(layer["down"], layer["down"].shape[0], k), grow(layer["up"], n)
    out["bias"] = nn.functional.pad(layer["bias"], (0, n - len(layer["bias"])))
    out["smooth"] = nn.functional.pad(layer["smooth"], (0, k - len(layer["smooth"])), value=1.0)
    if layer["kind"] == "nvfp4":
        out["wcscales"] = nn.functional.pad(layer["wcscales"], (0, n - layer["wcscales"].shape[0]), value=1.0)
    return out


def to_file(layer, stem, old=True):
    """The tensors of one layer in a file. old: with the older tails."""
    if layer["kind"] == "awq":
        tensors = {
            "qweight": awq_to_file(layer["codes"]),
            "wscales": layer["scales"].T,
            "wzeros": layer["zeros"].T,
            "bias": layer["bias"],
        }
        return {f"{stem}.{tail}": t.contiguous() for tail, t in tensors.items()}
    down, up, smooth = ("lora_down", "lora_up", "smooth") if old else ("proj_down", "proj_up", "smooth_factor")
    tensors = {
        "qweight": codes_to_file(layer["codes"]),
        "wscales": (scales_to_file if layer["kind"] == "int4" else micro_to_file)(layer["scales"]),
        "bias": vector_to_file(layer["bias"]),
        smooth: vector_to_file(layer["smooth"]),
        f"{smooth}_orig": vector_to_file(layer["smooth"]),
        down: down_to_file(layer["down"]),
        up: up_to_file(layer["up"]),
    }
    if layer["kind"] == "nvfp4":
        tensors |= {"wtscale": layer["wtscale"], "wcscales": vector_to_file(layer["wcscales"])}
    return {f"{stem}.{tail}": t for tail, t in tensors.items()}


def from_file(tensors):
    """A layer in natural order from its tensors by tail, in today's spelling; without the shift, which no file tells."""
    if "wzeros" in tensors:
        out = {
            "kind": "awq",
            "codes": awq_from_file(tensors["qweight"]),
            "scales": tensors["wscales"].T,
            "zeros": tensors["wzeros"].T,
        }
        return out | {"bias": tensors["bias"]}
    kind = "nvfp4" if tensors["wscales"].dtype == torch.float8_e4m3fn else "int4"
    layer = {
        "kind": kind,
        "unsigned": False,
        "codes": codes_from_file(tensors["qweight"]),
        "scales": (scales_from_file if kind == "int4" else micro_from_file)(tensors["wscales"]),
        "bias": vector_from_file(tensors["bias"]),
        "smooth": vector_from_file(tensors["smooth_factor"]),
        "down": down_from_file(tensors["proj_down"]),
        "up": up_from_file(tensors["proj_up"]),
    }
    if kind == "nvfp4":
        layer |= {"wtscale": tensors["wtscale"], "wcscales": vector_from_file(tensors["wcscales"])}
    return layer


class Formula(nn.Module):
    """What a layer computes, in float32: y = Q(x / smooth) Wᵀ + (x downᵀ) upᵀ + bias. rounds: whether activations are rounded."""

    def __init__(self, layer, rounds=True):
        super().__init__()
        self.layer, self.rounds = layer, rounds
        self.weight = nn.Parameter(weight_of(layer), requires_grad=False)

    def forward(self, x):
        layer = self.layer
        if layer["kind"] == "awq":
            return x @ self.weight.T + layer["bias"].float()
        shift = 0.171875 if layer["unsigned"] else 0.0
        xs = (x + shift) * (1 / layer["smooth"].float())
        if self.rounds:
            xs = self._rounded(xs)
        low = (x @ layer["down"].float().T) @ layer["up"].float().T
        return xs @ self.weight.T + low + layer["bias"].float()

    def _rounded(self, x):
        if self.layer["kind"] == "nvfp4":
            blocks = nn.functional.pad(x, (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
            scale = (blocks.abs().amax(-1, keepdim=True) / 6).clamp(max=448).to(torch.float8_e4m3fn).float()
            v = torch.where(scale > 0, blocks * (1 / scale), 0.0)
            grid = E2M1[:8]
            mids = (grid[1:] + grid[:-1]) / 2
            low = torch.bucketize(v.abs(), mids)  # a tie stays low …
            tie = (low < 7) & (v.abs() == mids[low.clamp(max=6)]) & (low % 2 == 1)  # … unless the upper code is even
            return (grid[low + tie.long()] * v.sign() * scale).flatten(-2)[..., : x.shape[-1]]
        blocks = nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
        low, high = (0, 15) if self.layer["unsigned"] else (-7, 7)
        scale = (blocks.abs().amax(-1, keepdim=True) / high).bfloat16().float()
        v = torch.where(scale > 0, blocks * (1 / scale), 0.0).round().clamp(low, high)
        return (v * scale).flatten(-2)[..., : x.shape[-1]]
