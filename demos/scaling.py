"""Quality against total bits for a family of small token generators: rounding, distillation by plain KL, and by TopKLD.

    python demos/scaling.py [--widths 32 48 64] [--bits 2 3 4 8] [--steps 300] [--out scaling.md] [--plot scaling.png]

Llama-like models of two layers are trained here, in bf16 rounding, on a process of tokens whose probabilities are known: each token depends
on the two before it. Each is quantized at each number of bits, weights alone, and taught by its own 16-bit original on sequences that the
original draws (no data). Quality is the KL divergence, in nats per token, of the model's probabilities from the process's own on sequences
nobody was fitted to; bits are 8 times all bytes of tensors in the saved file: codes, scales, embeddings and norms. Rows on the front, that
no other row of at most as many bits is as good as, are marked *.
"""

import argparse
import copy
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import qgen
from qgen.bench.bits import count
from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Rule, Spec
from qgen.train.topkld import TopKLD

V, LENGTH = 64, 32
HEAD = Rule("lm_head", None, why="tied to the embedding")
METHODS = {"rounded": None, "KL": TopKLD(k=V), "TopKLD": TopKLD(k=8, b=0.1)}


@dataclass(frozen=True)
class Row:
    """bits: total of the file. kl: nats per token from the process."""

    width: int
    weight: str
    method: str
    bits: int
    kl: float


class Process:
    """p(next | a, b) = softmax((F[a] + G[b]) U), of rank 16 and fixed by its seed."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.first, self.second = (torch.randn(V, 16, generator=g) for _ in range(2))
        self.out = torch.randn(16, V, generator=g) * 0.5

    def log_p(self, ids: Tensor) -> Tensor:
        """(B, T - 2, V): log probabilities of the token after each pair."""
        return torch.log_softmax((self.first[ids[:, :-2]] + self.second[ids[:, 1:-1]]) @ self.out, -1)

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Sequences (n, LENGTH)."""
        ids = torch.randint(0, V, (n, 2), generator=g)
        while ids.shape[1] < LENGTH:
            p = torch.softmax((self.first[ids[:, -2]] + self.second[ids[:, -1]]) @ self.out, -1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=g)], 1)
        return ids


def trained(width: int, process: Process, steps: int) -> nn.Module:
    """A model of the family, its weights rounded to bf16 and computed in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(width)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=2, vocab_size=V,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model, g = LlamaForCausalLM(config), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        ids = process.draw(64, g)
        loss = nn.functional.cross_entropy(model(ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.to(torch.bfloat16).float().eval().requires_grad_(False)


@torch.no_grad()
def told(model: nn.Module, count_: int, g: torch.Generator) -> CalibrationSet:
    """Sequences that a model draws by itself, 16 to a call."""
    calls = []
    for sample in range(count_):
        ids = torch.randint(0, V, (16, 2), generator=g)
        while ids.shape[1] < LENGTH:
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1, generator=g)], 1)
        calls.append(Call((ids,), {}, Moment(sample)))
    return CalibrationSet(tuple(calls))


@torch.no_grad()
def divergence(model: nn.Module, process: Process, ids: Tensor) -> float:
    """KL(process ‖ model) in nats per token."""
    p, q = process.log_p(ids), torch.log_softmax(model(ids).logits[:, 1:-1].float(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def bits_of(model: nn.Module) -> int:
    """Bits of all tensors of the model's file, floats at 16 bits."""
    layers = {path: (m.n, m.k) for path, m in model.named_modules() if isinstance(m, Packed)}
    if not layers:
        return 16 * sum(p.numel() for p in model.parameters())  # tied ones are there once
    with tempfile.TemporaryDirectory() as folder:
        qgen.save(copy.deepcopy(model).to(torch.bfloat16), folder)
        size = count(Path(folder), layers)
    return 8 * (size.nbytes + size.other)


def measure(widths: list[int], bits: list[int], train_steps: int, steps: int, lessons: int = 64) -> list[Row]:
    """All rows, each printed as it comes."""
    process, rows = Process(), []
    test = process.draw(256, torch.Generator().manual_seed(2))

    def add(*facts) -> None:
        rows.append(Row(*facts))
        print(line(rows[-1]), flush=True)

    for width in widths:
        teacher = trained(width, process, train_steps)
        add(width, "bf16", "", bits_of(teacher), divergence(teacher, process, test))
        calls = told(teacher, lessons, torch.Generator().manual_seed(3))
        for b in bits:
            weight = "int8_row" if b == 8 else f"int{b}_g32"
            for name, method in METHODS.items():
                student = qgen.quantize(copy.deepcopy(teacher), Recipe(Spec(weight), (HEAD,)), progress=False)
                if method is not None:
                    qgen.finetune(student, teacher, method, steps=steps, calibration=calls, progress=False)
                add(width, weight, name, bits_of(student), divergence(student, process, test))
    return rows


def line(row: Row, mark: str = "") -> str:
    return f"| {row.width} | {row.weight} | {row.method} | {row.bits / 1000:.0f} | {row.kl:.4f}{mark} |"


def on_front(row: Row, rows: list[Row]) -> bool:
    return not any(r.bits <= row.bits and r.kl <= row.kl and (r.bits, r.kl) != (row.bits, row.kl) for r in rows)


def table(rows: list[Row]) -> str:
    """Markdown, by total bits."""
    head = "| width | weights | method | kbit | KL to the process |\n|---|---|---|---|---|"
    ordered = sorted(rows, key=lambda r: (r.bits, r.kl))
    return "\n".join([head, *(line(r, " *" if on_front(r, rows) else "") for r in ordered)])


def plot(rows: list[Row], path: Path) -> None:
    """KL over total bits, both logarithmic; one line for each method and number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), dpi=110)
    styles = {"": "-", "rounded": ":", "KL": "--", "TopKLD": "-"}
    colours = dict(
        zip(sorted({r.weight for r in rows}), plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False)
    )
    for weight, method in sorted({(r.weight, r.method) for r in rows}):
        points = sorted((r.bits / 1000, r.kl) for r in rows if (r.weight, r.method) == (weight, method))
        label = f"{weight} {method}".strip()
        axes.plot(*zip(*points, strict=True), styles[method], color=colours[weight], marker="o", ms=4, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="bits of the file, thousands", ylabel="KL to the process, nats per token"
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--train-steps", type=int, default=600, help="of training the originals")
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="the table in Markdown")
    parser.add_argument("--plot", type=Path, help="a PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.widths, options.bits, options.train_steps, options.steps)
    if options.out:
        options.out.write_text(table(rows) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
