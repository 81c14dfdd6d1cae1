"""Modules that hold packed parameters. They know formats and kernels, and no method."""

from qgen.nn.build import keep_hooks, packed_layer
from qgen.nn.conv import QuantConv2d
from qgen.nn.linear import QuantLinear

__all__ = ["QuantConv2d", "QuantLinear", "keep_hooks", "packed_layer"]
