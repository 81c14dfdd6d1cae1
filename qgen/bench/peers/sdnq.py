"""SDNQ through its documented calls: `sdnq_post_load_quant` and `save_pretrained`. https://github.com/Disty0/sdnq

GPL-3: a rival that is run where somebody installed it. Nothing here depends on it or was learned from its source; the options are those
of its README.
"""

from pathlib import Path

from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers

__all__ = ["SDNQ"]

_OPTIONS = {
    "uint4": {"weights_dtype": "uint4"},
    "uint4-svd": {"weights_dtype": "uint4", "use_svd": True},
    "uint4-hadamard": {"weights_dtype": "uint4", "use_hadamard": True},
    "uint4-act8": {"weights_dtype": "uint4", "use_quantized_matmul": True},
    "int8": {"weights_dtype": "int8"},
    "int8-act8": {"weights_dtype": "int8", "use_quantized_matmul": True},
}


@peers.register("sdnq")
class SDNQ(Peer):
    package = "sdnq"
    licence = "GPL-3"
    configs = (
        Config("uint4", 4, 16, "uint4"),
        Config("uint4-svd", 4, 16, "uint4, use_svd, rank 32"),
        Config("uint4-hadamard", 4, 16, "uint4, use_hadamard"),
        Config("uint4-act8", 4, 8, "uint4, use_quantized_matmul"),
        Config("int8", 8, 16, "int8"),
        Config("int8-act8", 8, 8, "int8, use_quantized_matmul"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        options = {"use_quantized_matmul": False, **_OPTIONS[config]}
        if options["use_quantized_matmul"]:
            options["modules_to_not_use_matmul"] = sorted(part.vectors)
        device = str(next(part.module.parameters()).device)
        return sdnq_post_load_quant(
            part.module, modules_to_not_convert=list(part.keep), add_skip_keys=False, quantization_device=device,
            return_device=device, **options,
        )  # fmt: skip

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        module.save_pretrained(folder)
