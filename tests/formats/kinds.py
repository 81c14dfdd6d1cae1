"""Which of the hundreds of registered formats stand for the others in tests of what holds for all of them."""

import re

from qgen import formats

SKIPPED = re.compile(  # widths and blocks of families that others here stand for
    r"(planes[23567]|power[368]|apot[35]|log2_[358]|logsqrt2_[58]|vq[134]|vq2_d4|lut[23]|mx\w+_(rceil|even)|mxint8_best|u?int[2567]_g)"
    r"|u?int\d[zo]?_\w+_f(16|32)|u?int[235678][zo]_|bnb_fp4_.*_f32|nf4_.*_f32"
)


def representatives():
    """One name per kind of scaling and element, per-row forms apart: properties do not depend on the size of the block."""
    seen = {}
    for name, fmt in formats.formats.items():
        kind = (
            type(fmt),
            fmt.element,
            fmt.scale_dtype,
            fmt.global_scale,
            fmt.block is None,
            vars(fmt).get("dims"),
            vars(fmt).get("mode"),
        )
        if not SKIPPED.match(name):
            seen.setdefault(kind, name)
    return tuple(seen.values())


NAMES = representatives()
PLAIN = [n for n in NAMES if formats.get(n).plain]
UNSIGNED = ("uint4p", "log2", "logsqrt2")  # formats for values that are never negative
SHARED = [  # what one row gives depends on the others
    n
    for n in NAMES
    if formats.get(n).global_scale == "tensor"
    or getattr(formats.get(n), "per_tensor", False)
    or "_tensor" in n
    or n.endswith("_dq")
]
IDEMPOTENT = [n for n in PLAIN if not formats.get(n).zero_point and not re.match(r"uint4p|int4_s8|nvfp4_46|.*_dq", n)]
