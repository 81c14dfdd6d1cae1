"""Scores of a language model: what 4 bits cost in perplexity and agreement, and what they save in time and bytes.

    evaluate_text(model, tokenizer, texts, reference=model16)

Rows: perplexity, greedy agreement with the reference, tokens per second, bytes of the key/value cache. Each is a file of its own;
works with any transformers causal language model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgen.eval.agreement import greedy, match
from qgen.eval.collect import collect
from qgen.eval.kv_bytes import kv_bytes
from qgen.eval.metrics import Measured
from qgen.eval.perplexity import nll_per_token
from qgen.eval.scores import Scores
from qgen.eval.tokens_per_second import tokens_per_second

__all__ = ["encode", "evaluate_text"]

log = logging.getLogger("qgen")


def evaluate_text(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    reference: Any = None,
    *,
    length: int = 256,
    new_tokens: int = 32,
    prompt_tokens: int = 32,
    timed: bool = True,
    seed: int = 0,
) -> Scores:
    """Scores a causal language model on texts.

    Arguments:
        texts: documents; each is cut into windows of `length` tokens, each window scored from its own start.
        reference: the 16-bit model; agreement needs it, and perplexity shows its value and the paired difference per window.
        prompt_tokens, new_tokens: greedy continuations start from the first `prompt_tokens` of each window.
        timed: False leaves tokens per second out, which no two runs repeat exactly.

    Raises ValueError if no text has two tokens.
    """
    windows = encode(tokenizer, texts, length)
    mine = [nll_per_token(model, ids) for ids in windows]
    theirs = None if reference is None else [nll_per_token(reference, ids) for ids in windows]
    found = {"perplexity": _perplexity(mine, theirs, seed)}
    prompts = [ids[:, :prompt_tokens] for ids in windows if ids.shape[1] >= min(2, prompt_tokens)]
    if reference is not None:
        pairs = [(greedy(model, ids, new_tokens), greedy(reference, ids, new_tokens)) for ids in prompts]
        shares = torch.tensor([100 * match(a, b) for a, b in pairs])
        note = f"{new_tokens} greedy tokens after {prompt_tokens}; tokens equal up to the first that differs"
        found["agreement"] = Measured("greedy agreement", "%", "higher", per_prompt=shares, note=note)
    if timed:
        speed = tokens_per_second(model, prompts[0], new_tokens)
        note = f"median of {speed.n} runs, batch 1, {new_tokens} new tokens, prompt included"
        found["tokens_per_second"] = Measured(
            "speed", "tokens/s", "higher", speed.mean, speed.low, speed.high, note=note
        )
    found["kv_bytes"] = Measured(
        "KV cache", "bytes/token", "lower", kv_bytes(model, prompts[0]) / prompts[0].shape[1],
        reference_value=None if reference is None else kv_bytes(reference, prompts[0]) / prompts[0].shape[1],
    )  # fmt: skip
    settings = {"length": length, "new_tokens": new_tokens, "prompt_tokens": prompt_tokens, "seed": seed}
    return collect(found, len(windows), settings=settings, seed=seed)


def encode(tokenizer: Any, texts: Sequence[str], length: int) -> list[Tensor]:
    """Windows (1, up to length) of token ids; those of a single token are dropped. ValueError if none is left."""
    windows: list[Tensor] = []
    for text in texts:
        ids = torch.as_tensor(tokenizer(text, add_special_tokens=True)["input_ids"], dtype=torch.long).reshape(1, -1)
        windows += [part for part in ids.split(length, dim=1) if part.shape[1] >= 2]
    if not windows:
        raise ValueError(f"at least one text of two tokens wanted, found {len(texts)} texts without")
    return windows


def _perplexity(mine: list[Tensor], theirs: list[Tensor] | None, seed: int) -> Measured:
    """The perplexity over all tokens, with the bootstrap interval over windows."""
    value, low, high = _interval(mine, seed)
    reference = None if theirs is None else _interval(theirs, seed)[0]
    tokens = sum(map(len, mine))
    note = f"{tokens} predicted tokens in {len(mine)} windows"
    return Measured("perplexity", "", "lower", value, low, high, reference_value=reference, note=note)


def _interval(parts: list[Tensor], seed: int, draws: int = 2000) -> tuple[float, float, float]:
    sums = torch.stack([part.double().sum() for part in parts])
    counts = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    picks = torch.randint(len(parts), (draws, len(parts)), generator=torch.Generator().manual_seed(seed))
    drawn = (sums[picks].sum(1) / counts[picks].sum(1)).exp().sort().values
    return (
        float((sums.sum() / counts.sum()).exp()),
        float(drawn[round(0.025 * (draws - 1))]),
        float(drawn[round(0.975 * (draws - 1))]),
    )
