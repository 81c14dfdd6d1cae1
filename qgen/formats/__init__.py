"""Number formats: what the codes and scales of a low-bit tensor mean. One family per file; `qgen.formats.get(name)` finds one."""

from qgen.formats.base import Element, NumberFormat, QTensor, formats, get, padded

__all__ = ["Element", "NumberFormat", "QTensor", "formats", "get", "padded"]
