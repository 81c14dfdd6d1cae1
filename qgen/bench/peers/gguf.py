"""GGUF as diffusers runs it: `GGUFLinear` layers, blocks made by gguf-py, or K-quants by ggml itself where llama-cpp-python brings it.

gguf-py has no encoder for K-quants. ggml's `ggml_quantize_chunk` has, without an importance matrix, as `llama-quantize` uses it.
https://github.com/ggml-org/llama.cpp, https://huggingface.co/docs/diffusers/quantization/gguf
"""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers
from qgen.errors import QgenError

__all__ = ["GGUF"]


@peers.register("gguf")
class GGUF(Peer):
    package = "gguf"
    configs = (
        Config("q4_0", 4, 16, "Q4_0, blocks of 32"),
        Config("q4_1", 4, 16, "Q4_1, blocks of 32 with a minimum"),
        Config("q4_k", 4, 16, "Q4_K, blocks of 32 in 256, by ggml"),
        Config("q8_0", 8, 16, "Q8_0, blocks of 32"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
        from gguf import GGMLQuantizationType

        kind, dtype = GGMLQuantizationType[config.upper()], part.dtype

        def make(layer: nn.Linear, path: str) -> nn.Module:
            new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype)
            blocks = torch.from_numpy(_blocks(layer.weight.detach().float().cpu().numpy(), kind))
            new.weight = GGUFParameter(blocks.to(layer.weight.device), quant_type=kind)
            new.bias = layer.bias
            return new

        return part.swap(make)

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        from gguf import GGMLQuantizationType, GGUFWriter

        folder.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(folder / "model.gguf", "diffusers")
        for name, tensor in module.state_dict().items():
            kind = getattr(tensor, "quant_type", None)
            if kind is None and tensor.dtype == torch.bfloat16:
                bits = tensor.cpu().contiguous().view(torch.uint8).numpy()
                writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)
            else:
                plain = tensor.detach().cpu().as_subclass(torch.Tensor).numpy()
                writer.add_tensor(name, plain, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _blocks(weight: np.ndarray, kind: Any) -> np.ndarray:
    """Blocks (N, bytes) uint8 of a float32 matrix (N, K). QgenError where nobody here can make them."""
    import gguf

    try:
        return gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        return _by_ggml(np.ascontiguousarray(weight), kind)


def _by_ggml(weight: np.ndarray, kind: Any) -> np.ndarray:
    import gguf

    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path("none")
    library = next((f for f in sorted(folder.glob("*ggml-base*")) if f.suffix in (".so", ".dylib", ".dll")), None)
    if library is None:
        raise QgenError(f"gguf-py does not encode {kind.name} and ggml is not here: pip install llama-cpp-python")
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    if columns % block:
        raise QgenError(f"{kind.name} wants rows of a multiple of {block}, found {columns}")
    out = np.empty((rows, columns // block * size), np.uint8)
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    source = weight.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    wide = [ctypes.c_int64(v) for v in (0, rows, columns)]
    written = ggml.ggml_quantize_chunk(int(kind), source, ctypes.c_void_p(out.ctypes.data), *wide, None)
    if written != out.nbytes:
        raise QgenError(f"ggml wrote {written} bytes of {kind.name}, {out.nbytes} wanted")
    return out
