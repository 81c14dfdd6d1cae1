"""Names of tensors: from original and ComfyUI single files to diffusers' and back, one tensor at a time."""

from qgen.io.keys.families import Plan, conversions, plan
from qgen.io.keys.outward import original, outward

__all__ = ["Plan", "conversions", "original", "outward", "plan"]
