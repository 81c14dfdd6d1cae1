"""What became of every layer, as clean rows and totals: what `qgen.summary` prints and `qgen.report` draws.

    bits per weight = 8 · bytes / weights      over quantized layers, with their scales, low-rank parts and biases
    ratio           = 16-bit bytes / bytes     over the whole denoiser, parts that stay float included

Rows come from `module.qgen_report`, which also travels in checkpoints: files of strangers are untrusted, so every field is checked and
control characters never reach a terminal. Sizes and kernels are those of the layers as they are now.
"""

__all__ = ["Summary", "build", "gather", "printable", "share_of_16_bits", "totals"]

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from qgen.errors import NotQuantizable
from qgen.models import adapter_for
from qgen.nn.packed import Packed
from qgen.recipe import Recipe

_TEXTS = ("kind", "block", "role", "spec", "kernel", "why")
_NUMBERS = ("sqnr_db", "sqnr_fit_db", "weight_sqnr_db")
OUTPUT = "(output)"


class Summary(list):
    """A list of rows (dicts), one per layer, with `totals` (a dict) beside.

    Row: denoiser, path, kind, block, role, shape [N, K], spec, kernel, why, sqnr_db (held-out calls), sqnr_fit_db (fitted calls),
    weight_sqnr_db (recipes without calibration), nbytes (of which lowrank_bytes are the 16-bit branch), bytes16, log. Numbers that
    nobody measured are None.
    Totals: layers, quantized, nbytes, bytes16, ratio, bits_per_weight (of which lowrank_bits are the branch's), output_sqnr_db
    {denoiser: dB of the whole denoiser's output}. attention: rows of `show.attention`, where attention was quantized.
    """

    totals: dict[str, Any]

    def __init__(self, rows: Iterable[dict], totals: dict[str, Any], attention: Iterable[dict] = ()):
        super().__init__(rows)
        self.totals, self.attention = totals, list(attention)


def gather(x: Any) -> Summary:
    """The rows of `summary` without printing them; NotQuantizable if nothing in x is quantized."""
    from qgen.show.attention import attention_rows

    denoisers = {name: module for name, module in adapter_for(x).denoisers(x).items() if _packed(module)}
    if not denoisers:
        raise NotQuantizable(
            f"{type(x).__name__} has no quantized layer: call qgen.quantize first, or qgen.load a quantized checkpoint"
        )
    rows, outputs, rest = [], {}, 0
    for name, module in denoisers.items():
        layers = _packed(module)
        report = getattr(module, "qgen_report", None)
        mine, output = build(
            name, report, {path: _facts(layer) for path, layer in layers.items()}, getattr(module, "qgen_recipe", None)
        )
        rows += mine
        if output is not None:
            outputs[name or type(module).__name__] = output
        listed = tuple(row["path"] + "." for row in mine)
        rest += sum(2 * p.numel() for path, p in module.named_parameters() if not path.startswith(listed))
    return Summary(rows, totals(rows, rest, outputs), attention_rows(denoisers))


def build(
    denoiser: str, report: Any, layers: dict[str, dict], recipe: Recipe | None = None
) -> tuple[list[dict], float | None]:
    """Clean rows of one denoiser, and the SQNR of its whole output in dB if it was measured.

    Arguments:
        report: `module.qgen_report`, from a file or from memory; anything in it that is no row is left out.
        layers: facts about packed layers by path, as `_facts` gives them; they win over what the report says. Layers that the report
            does not know get rows too; rows that claim to be packed and are not among `layers` are left out.
        recipe: gives each row's log the order in which methods ran; files do not keep it.
    """
    rows, output, seen = [], None, set()
    specs = [recipe.default, *(rule.spec for rule in recipe.rules)] if isinstance(recipe, Recipe) else []
    order = list(dict.fromkeys(method.name for spec in specs if spec for method in spec.methods))
    for row in report if isinstance(report, (list, tuple)) else ():
        if not isinstance(row, dict) or not isinstance(row.get("path"), str) or row.get("kind") == "attention":
            continue
        path = row["path"]
        if path == OUTPUT:
            output = number(row.get("sqnr_db"))
            continue
        if path in seen or (path not in layers and row.get("spec") != "float"):
            continue
        seen.add(path)
        rows.append(_clean(denoiser, {**row, **layers.get(path, {})}, order))
    rows += [
        _clean(denoiser, {"path": path, "why": "", **facts}, order)
        for path, facts in layers.items()
        if path not in seen
    ]
    return rows, output


def totals(rows: list[dict], rest16: int, outputs: dict[str, float]) -> dict[str, Any]:
    """Sums over rows. rest16: 16-bit bytes of parameters in no row (norms, tables), which stay as they are."""
    packed = [row for row in rows if row["spec"] != "float"]
    weights = sum(row["bytes16"] for row in packed) // 2
    nbytes = sum(row["nbytes"] for row in rows) + rest16
    bytes16 = sum(row["bytes16"] for row in rows) + rest16
    return {
        "layers": len(rows),
        "quantized": len(packed),
        "nbytes": nbytes,
        "bytes16": bytes16,
        "ratio": bytes16 / nbytes if nbytes else 1.0,
        "bits_per_weight": 8 * sum(row["nbytes"] for row in packed) / weights if weights else 0.0,
        "lowrank_bits": 8 * sum(row["lowrank_bytes"] for row in packed) / weights if weights else 0.0,
        "output_sqnr_db": outputs,
    }


def printable(text: Any, longest: int = 400) -> str:
    """Text without control characters, cut where it is longer than any honest name."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:longest])


def _packed(module: nn.Module) -> dict[str, Packed]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Packed)}


def _facts(layer: Packed) -> dict:
    """What the layer itself says, whatever the report remembers."""
    numel = layer.n * layer.k + (0 if layer.bias is None else layer.n)
    return {
        "kind": layer.described()["kind"],
        "shape": [layer.n, layer.k],
        "spec": f"{layer.weight_format} x {layer.act_format or 'float'}",
        "kernel": layer.kernel or "",
        "nbytes": layer.nbytes,
        "lowrank_bytes": sum(t.nbytes for t in (layer.down, layer.up) if t is not None),
        "bytes16": 2 * numel,
    }


def _clean(denoiser: str, row: dict, order: list[str]) -> dict:
    """A row with every field of the documented type."""
    shape, log = row.get("shape"), row.get("log")
    whole = isinstance(shape, (list, tuple)) and all(type(i) is int for i in shape)
    made: dict[str, Any] = {"denoiser": printable(denoiser), "path": printable(row["path"])}
    made |= {key: printable(row.get(key) or "") for key in _TEXTS}
    made |= {"shape": list(shape) if whole else []}
    made |= {key: number(row.get(key)) for key in _NUMBERS}
    made |= {key: int(max(0, number(row.get(key)) or 0)) for key in ("nbytes", "lowrank_bytes", "bytes16")}
    texts = {printable(k): printable(v) for k, v in log.items()} if isinstance(log, dict) else {}
    made["log"] = {
        name: texts[name] for name in sorted(texts, key=lambda n: order.index(n) if n in order else len(order))
    }
    return made


def number(value: Any) -> float | None:
    """A finite number, or None."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if right else None


def share_of_16_bits(report: list[dict]) -> float:
    """Bytes of the layers that a model's report lists, those kept float included, over what they take in 16 bits."""
    nbytes, bytes16 = (sum(row.get(key, 0) for row in report) for key in ("nbytes", "bytes16"))
    return nbytes / bytes16
