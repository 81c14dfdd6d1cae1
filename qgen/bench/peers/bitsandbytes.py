"""bitsandbytes: NF4 and FP4 weights in blocks of 64, LLM.int8. https://github.com/bitsandbytes-foundation/bitsandbytes"""

from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers

__all__ = ["BitsAndBytes"]


@peers.register("bitsandbytes")
class BitsAndBytes(Peer):
    package = "bitsandbytes"
    configs = (
        Config("nf4", 4, 16, "NF4, blocks of 64"),
        Config("nf4-double", 4, 16, "NF4, scales quantized too"),
        Config("fp4", 4, 16, "FP4, blocks of 64"),
        Config("int8", 8, 16, "LLM.int8; 8-bit inputs on a GPU only"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        import bitsandbytes as bnb

        dtype = part.dtype

        def make(layer: nn.Linear, path: str) -> nn.Module:
            size = (layer.in_features, layer.out_features, layer.bias is not None)
            if config == "int8":
                new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            else:
                double = config.endswith("double")
                new = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type=config[:3], compress_statistics=double)
            new.load_state_dict(layer.state_dict())
            return new.to(layer.weight.device)  # moving is what quantizes

        return part.swap(make)
