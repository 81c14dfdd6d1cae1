"""The formats among which a layer may choose: the recipe's own, wider ones, 16 bits, and narrower ones where the budget asks for them.

Wider steps are those that kernels run fast: 8-bit rows of the same kind of numbers. Narrower ones save bytes alone.
"""

__all__ = ["bits_of", "label", "ladder"]

from dataclasses import replace

from qgen import formats
from qgen.methods.smooth import Smooth
from qgen.recipe import Spec
from qgen.site import Site

_SMALLEST = 2.0  # bits: nothing below is offered


def ladder(spec: Spec, narrow: bool = False) -> tuple[Spec | None, ...]:
    """Candidates of a layer whose recipe says `spec`, the own one first; None = stays at 16 bits.

    narrow: offer 3 and 2 bits too, and 4 to layers that the recipe gives 8, as convolutions.
    """
    floats = isinstance(formats.get(spec.weight).element, type(formats.get("nvfp4").element))
    wide = "fp8_e4m3_row" if floats else "int8_row"
    methods = (Smooth(),) if spec.methods and spec.act else ()
    found: list[Spec | None] = [spec]
    if formats.get(spec.weight).bits < 8:
        found.append(Spec(wide, spec.act and wide, methods, share=spec.share))
    found.append(None)
    if narrow:
        if formats.get(spec.weight).bits == 8:
            found.append(replace(spec, weight="int4_s8_g64" if spec.act == "int8_row" else "uint4_g64"))
        for bits in (3, 2):
            if bits < formats.get(spec.weight).bits:
                found.append(replace(spec, weight=f"uint{bits}_g64"))
    return tuple(dict.fromkeys(found))


def bits_of(spec: Spec | None, site: Site) -> float:
    """Stored bits per weight of a layer, scales and padding counted, the low-rank branch not; 16 for None."""
    if spec is None:
        return 16.0
    k = formats.padded(site.shape[1], spec.weight, spec.act)
    return formats.get(spec.weight).bits_per_value(k) * k / site.shape[1]


def label(spec: Spec | None) -> str:
    """A candidate's name in reports: weight and activation format."""
    return "16 bits" if spec is None else str(spec)
