"""Mixed precision: which layer gets which format, from what each costs and what it damages.

    sensitivity   layers × candidate formats → damage, measured one layer at a time
    milp          damage + costs + limit → the best choice, exactly
    budget        "4.5 bits", "6 GiB", "12 ms", "psnr>=30" → limits
    decouple      layers that hurt structure and layers that hurt content, each with a metric and a share of the budget of its own

`qgen.quantize(pipe, budget="4.5 bits")` calls `allocate`; what it returns are ordinary recipes.
"""

from qgen.allocate.budget import Budget, Quality, asked
from qgen.allocate.plan import Plan, allocate

__all__ = ["Budget", "Plan", "Quality", "allocate", "asked"]
