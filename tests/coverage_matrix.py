"""The matrix of model families: `python -m tests.coverage_matrix [--shard i/n] [--only NAME ...] [--markdown PATH] [denoisers|language]`.

Every denoiser class of the installed diffusers, and architectures of transformers, each as a tiny model with random weights: quantized,
run, saved, loaded, compared (`tests/coverage/check.py` says how). Exit status 1 if fewer than 95 % of a group pass.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PASS = 0.95
INTRO = """# Which models qgen quantizes

Each class below was made tiny with random weights, quantized without data (`{recipe}`), run, saved, loaded and compared on a CPU, with
{versions}: `python -m tests.coverage_matrix --markdown demos/coverage.md`.

* layers: linear layers and convolutions that one run calls (grouped convolutions and other paddings than zeros left out); packed: those
  that the recipe packs, the others are embedders, heads, or narrower than 32.
* 4-bit share: of all weights, embeddings and norms included, the part that lies in 4-bit layers. Tiny models have large embedders,
  which make it smaller. Experts that a model keeps stacked in one parameter are packed one by one, and counted one by one among the packed.
* dB: signal over error of the model's whole output, 4-bit weights alone (w4a16) and with 4-bit activations (w4a4). Random weights say
  nothing about pictures; these numbers show that a structure works.
* save and load: every tensor equal bit for bit, the output to the last bits of its sums. Every packed model also agrees to 50 dB or better
  with its twin of ordinary layers that hold the packed values.
"""


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.coverage_matrix", description=__doc__.split("\n\n")[1])
    parser.add_argument("groups", nargs="*", default=[], metavar="GROUP", help="denoisers, language (default: both)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th class, from the I-th")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these classes alone")
    parser.add_argument("--recipe", default="rtn-w4a16", help="the recipe of the saved model")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table here")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)

    import torch

    from tests.coverage import check, denoisers, language

    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    index, count = map(int, given.shard.split("/"))
    groups = {"denoisers": denoisers, "language": language}
    tables, failed = [], False
    for group in given.groups or groups:
        names = [n for n in groups[group].classes() if not given.only or n in given.only]
        rows = []
        for name in names[index - 1 :: count]:
            start = time.time()
            try:
                make, call = groups[group].model_and_call(name)
                row = check.check(name, make, call, given.recipe)
            except Exception as error:
                row = check.Row(name, reason=f"no tiny model: {type(error).__name__}: {str(error)[:160]}")
            rows.append(row)
            print(
                f"{row.name:45} {row.layers:4} layers {row.packed:4} packed {row.share:5.0%} w4a16 {row.w4a16:6.1f} w4a4 {row.w4a4:6.1f} "
                f"{time.time() - start:5.1f}s {row.reason or 'pass'}",
                flush=True,
            )
        if rows:
            good = sum(not row.reason for row in rows)
            print(f"{group}: {good} of {len(rows)} pass")
            failed |= good < PASS * len(rows)
            tables.append(check.markdown(groups[group].TITLE, rows))
    if given.markdown:
        import diffusers
        import transformers

        versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        given.markdown.write_text(
            "\n".join([INTRO.format(versions=versions, recipe=given.recipe), *tables]), encoding="utf-8"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
