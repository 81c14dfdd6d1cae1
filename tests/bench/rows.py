"""Rows made by hand."""

import torch

from qgen.bench.job import Row
from qgen.bench.peer import Config
from qgen.eval.collect import collect
from qgen.eval.metrics import Measured


def scores(psnr):
    return collect({"psnr": Measured("PSNR", "dB", "higher", per_prompt=torch.tensor(psnr))}, len(psnr))


def row(peer, config, nbytes, psnr, weight=4, act=4, seconds=1.0, peak=2**20, ratio=1.5, **more):
    latency = {"first": 1.0, "second": ratio, "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "pairs": 3}
    measured = {
        "bits": 8 * nbytes / 1e6, "nbytes": nbytes, "layer_bytes": nbytes, "weights": 10**6, "file": nbytes + 8, "asked": 2, "layers": 2,
        "left": [], "more": [], "seconds": seconds, "peak": peak, "latency": latency, "versions": {peer: "1.0"}, "threads": 1, **more,
    }  # fmt: skip
    return Row(peer, Config(config, weight, act, "by hand"), "", measured, scores(psnr))
