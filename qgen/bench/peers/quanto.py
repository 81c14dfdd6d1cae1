"""optimum-quanto: `quantize`, `Calibration` where inputs are quantized, `freeze`. https://github.com/huggingface/optimum-quanto"""

from torch import nn

from qgen.bench.peer import Config, Part, Peer, peers

__all__ = ["Quanto"]


@peers.register("quanto")
class Quanto(Peer):
    package = "optimum-quanto"
    configs = (
        Config("int4", 4, 16, "qint4 weights, groups of 128"),
        Config("int4-act8", 4, 8, "qint4 weights, qint8 inputs with one scale a layer"),
        Config("int8", 8, 16, "qint8 weights"),
        Config("int8-act8", 8, 8, "qint8 weights, qint8 inputs with one scale a layer"),
        Config("float8", 8, 16, "qfloat8 weights"),
    )

    def quantize(self, config: str, part: Part) -> nn.Module:
        import optimum.quanto as quanto

        weights, _, act = config.partition("-")
        kinds = {"int4": quanto.qint4, "int8": quanto.qint8, "float8": quanto.qfloat8}
        others = [path for path, _ in part.module.named_modules() if path not in part.layers]
        vectors = sorted(part.vectors) if act else []
        options = {"weights": kinds[weights]}
        if act:
            quanto.quantize(part.module, exclude=[*others, *vectors], activations=quanto.qint8, **options)
            quanto.quantize(part.module, include=vectors, **options)
            part.calls()  # recorded before the mode that watches every tensor is on
            with quanto.Calibration():
                part.replay()
        else:
            quanto.quantize(part.module, exclude=others, **options)
        quanto.freeze(part.module)
        return part.module
