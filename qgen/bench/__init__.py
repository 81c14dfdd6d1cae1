"""One pipeline through many quantizers, each in a process of its own, under the same prompts, noise and layers.

`qgen bench peers` is the command. A peer is one file in `qgen/bench/peers`; what it is told and what it answers is in
`qgen.bench.peer`, how it is measured in `qgen.bench.worker`, how rows become a table in `qgen.bench.table`.
"""
