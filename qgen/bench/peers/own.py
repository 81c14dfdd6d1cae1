"""qgen's own recipes. Keys and values of text keep 8-bit inputs in its W4A4 recipes, but for the two that write Nunchaku's files."""

from pathlib import Path

from torch import nn

from qgen import recipes
from qgen.bench.peer import Config, Part, Peer, peers

__all__ = ["QGen"]


@peers.register("qgen")
class QGen(Peer):
    package = "qgen-diffusion"
    configs = (
        Config("rtn-int4", 4, 4, "rounded to nearest; text 8-bit inputs"),
        Config("rtn-nvfp4", 4, 4, "rounded to nearest; text 8-bit inputs"),
        Config("svdquant-int4", 4, 4, "calibrated, rank 32; text 8-bit inputs"),
        Config("svdquant-nvfp4", 4, 4, "calibrated, rank 32; text 8-bit inputs"),
        Config("nunchaku-int4", 4, 4, "calibrated, rank 32; text 4-bit inputs too"),
        Config("nunchaku-nvfp4", 4, 4, "calibrated, rank 32; text 4-bit inputs too"),
        Config("w4a8", 4, 8, "calibrated, rank 32"),
        Config("rtn-w4a16", 4, 16, "rounded to nearest"),
        Config("w4a16", 4, 16, "calibrated, rank 32"),
        Config("w8a8", 8, 8, "int8, smoothed"),
        Config("fp8", 8, 8, "e4m3, not calibrated"),
    )

    def version(self) -> str:
        from qgen.show.report import version

        return version()

    def quantize(self, config: str, part: Part) -> nn.Module:
        from qgen.engine import quantize

        recipe = recipes.get(config)
        specs = [recipe.default, *(rule.spec for rule in recipe.rules)]
        calibrates = any(spec.methods for spec in specs if spec)
        given = part.calls() if calibrates else part.call
        recipe = recipe.skip(*part.keep, why="left alone by all peers")
        return quantize(part.module, recipe, calibration=given, seed=part.seed, progress=False)

    def save(self, config: str, module: nn.Module, folder: Path) -> None:
        from qgen.io.checkpoint import save

        save(module, folder)
