"""Budgets and qualities in words: `"4.5 bits"`, `"6 GiB"`, `"12 ms"`, `"psnr>=30"`.

bits      average stored bits per weight of the layers that the recipe quantizes, scales counted, the 16-bit low-rank branch not
bytes     of the denoisers as they are stored: packed layers with branches and biases, all else at 16 bits
seconds   the sum of the layers' own times in one denoiser call on this device, measured
"""

__all__ = ["METRICS", "Budget", "Quality", "asked"]

import re
from dataclasses import dataclass

from qgen.checks import parse_bytes
from qgen.errors import unknown

METRICS = ("layer", "output", "latent", "structure", "content", "decoupled")
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Budget:
    """At most `amount` of `unit` ("bits", "bytes" or "seconds").

    metric: the damage that is kept smallest; see `qgen.allocate.sensitivity`. "output", the error of the denoiser's output, needs calls
    alone; "latent", "structure", "content" and "decoupled" draw with the pipeline once per layer and candidate.
    prompts: how many are drawn for that, or for a quality. exceptions: share of the activations that may stay at 16 bits where the recipe
    rounds them, e.g. 0.01; None = as many as the rest of the budget bears, by layers that stay at 16 bits as a whole.
    """

    amount: float
    unit: str
    metric: str = "output"
    prompts: int = 8
    exceptions: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(unknown("metric of a budget", self.metric, METRICS))
        if not self.amount > 0 or self.unit not in ("bits", "bytes", "seconds"):
            raise ValueError(
                f"a budget is a positive number of bits, bytes or seconds, found {self.amount} {self.unit}"
            )
        if self.prompts < 1:
            raise ValueError(f"a budget's damage is measured with at least one prompt, found prompts={self.prompts}")
        if self.exceptions is not None and not 0 < self.exceptions <= 1:
            raise ValueError(f"exceptions are a share of the activations, above 0 and up to 1, found {self.exceptions}")

    @classmethod
    def parse(cls, given: "str | Budget", **options: object) -> "Budget":
        """From text. ValueError for anything but a number and a unit: a bare number could mean bits or bytes."""
        if isinstance(given, Budget):
            return given
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(given), re.IGNORECASE)
        word = match[2].lower() if match else ""
        if word in ("bit", "bits"):
            return cls(float(match[1]), "bits", **options)
        if word in _TIMES:
            return cls(float(match[1]) * _TIMES[word], "seconds", **options)
        if word.endswith("b"):
            try:
                return cls(float(parse_bytes(str(given))), "bytes", **options)
            except ValueError:
                pass
        raise ValueError(f"a budget is text such as '4.5 bits', '6 GiB' or '12 ms', found {given!r}")

    def text(self, amount: float | None = None) -> str:
        """The budget, or another amount of its unit, in words."""
        value = self.amount if amount is None else amount
        if self.unit == "bits":
            return f"{value:.4g} bits"
        if self.unit == "seconds":
            return f"{1e3 * value:.4g} ms"
        for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
            if value >= 1 << power:
                return f"{value / (1 << power):.4g} {name}"
        return f"{value:.0f} B"

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Quality:
    """At least `least` of a metric against the 16-bit model: "psnr" (dB) or "ssim" of pictures, "sqnr" (dB) of the denoiser's output."""

    metric: str
    least: float

    @classmethod
    def parse(cls, given: "str | Quality") -> "Quality":
        """From text such as "psnr>=30"; ValueError for other metrics, with the nearest, and other forms."""
        if isinstance(given, Quality):
            return given
        match = re.fullmatch(r"\s*([a-z]\w*)\s*(?:>=|≥)\s*(-?\d+(?:\.\d+)?)\s*(?:db)?\s*", str(given), re.IGNORECASE)
        if not match:
            raise ValueError(f"a quality is text such as 'psnr>=30' or 'ssim>=0.9', found {given!r}")
        if match[1].lower() not in ("psnr", "ssim", "sqnr"):
            raise ValueError(unknown("metric of a quality", match[1], ("psnr", "ssim", "sqnr")))
        if match[1].lower() == "ssim" and float(match[2]) > 1:
            raise ValueError(f"ssim is at most 1, found {given!r}")
        return cls(match[1].lower(), float(match[2]))

    def __str__(self) -> str:
        return f"{self.metric}>={self.least:g}"


def asked(budget: "str | Budget | None", quality: "str | Quality | None") -> tuple[Budget | None, Quality | None]:
    """Both as they were meant; None for what was not given. ValueError as the two `parse`."""
    return None if budget is None else Budget.parse(budget), None if quality is None else Quality.parse(quality)
