"""What this machine would run: for each pair of number formats the kernel that would be chosen, and why not a better
one.

`report()` is the text of `qgen doctor`; `findings()` the same as data. Nothing is compiled and nothing is launched:
the answer comes from `Needs`, as it does when a model is prepared.
"""

__all__ = ["PAIRS", "Finding", "capability", "findings", "report"]

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qgen.errors import NoKernel
from qgen.kernels import attention_ops, registry
from qgen.kernels.registry import Ask

# What is asked about if the caller names nothing: (weight, activations), "" = activations stay float.
PAIRS: dict[str, tuple[str, str]] = {
    "4-bit floats (NVFP4)": ("nvfp4", "nvfp4_dynamic"),
    "4-bit floats (MXFP4)": ("mxfp4", "mxfp4"),
    "4-bit weights, 8-bit activations": ("int4_s8_g64", "int8_row"),
    "4-bit integers": ("int4_g64", "int4_g64"),
    "4-bit integers with zero points": ("int4_g64", "uint4_g64"),
    "4-bit weights, 16-bit activations": ("int4_g64", ""),
    "8-bit integers": ("int8_row", "int8_row"),
    "8-bit floats": ("fp8_e4m3_row", "fp8_e4m3_row"),
}
SHAPE = (12288, 3072)  # N, K of a typical layer
TRAITS = frozenset({"smooth", "lowrank", "bias"})
# Ops that do more than a layer, and what they save; see `qgen.kernels.fusion`.
FUSED = {
    "fused_linear": "norms, activations, q/k norm and rotation inside its two launches",
    "mlp": "MLPs in three",
}
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One request and its answer. kernel: its name, or "" if none serves. better: kernels of higher priority with
    reasons. fused: the ops of `FUSED` that a kernel proper, and not the reference, would serve for these formats."""

    what: str
    ask: Ask
    kernel: str
    better: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()


def capability(device: torch.device) -> tuple[str, tuple[int, int] | str | None]:
    """("cuda", (8, 9)), ("hip", "gfx942") or ("cpu", None): device and capability as `Ask` states them."""
    if device.type != "cuda":
        return device.type, None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "hip", properties.gcnArchName.partition(":")[0]
    return "cuda", (properties.major, properties.minor)


def findings(
    pairs: Mapping[str, tuple[str, str]] | None = None,
    device: str = "cpu",
    capability: tuple[int, int] | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Finding]:
    """Answers for linear layers in `pairs` (default `PAIRS`) and for attention, on a device that need not be here."""
    n, k = SHAPE
    found = []
    for what, (weight, act) in (PAIRS if pairs is None else pairs).items():
        found.append(_answer(what, Ask("linear", device, weight, act or "", dtype, n, k, 32, capability, TRAITS)))
    spec = attention_ops.default_spec(capability) if device == "cuda" else None
    if spec:
        qk, pv = attention_ops.SPECS[spec]
        ask = Ask("attention", device, qk, pv, dtype, k=128, capability=capability)
        found.append(_answer(f"attention ({spec}, heads of 128)", ask))
    return found


def _answer(what: str, ask: Ask) -> Finding:
    try:
        chosen = registry.choose(ask)
    except NoKernel:
        return Finding(what, ask, "")
    better = []
    for _, kernel in registry.kernels.items():
        if kernel.op == ask.op and kernel.priority > chosen.priority and _meant_for(kernel, ask):
            better.append(f"{kernel.name} {'; '.join(kernel.needs.refusals(ask))}")
    return Finding(what, ask, chosen.name, tuple(better), _fused(ask) if ask.op == "linear" and ask.act else ())


def _fused(ask: Ask) -> tuple[str, ...]:
    chosen = {op: registry.choose(replace(ask, op=op)).name for op in FUSED}  # the reference serves everything
    return tuple(op for op, name in chosen.items() if name != "reference")


def _meant_for(kernel: registry.Kernel, ask: Ask) -> bool:
    """Whether a kernel serves the kind of device and the formats at all: others need no mention."""
    needs = kernel.needs
    if needs.devices and ask.device not in needs.devices:
        return False
    return ask.weight in (needs.weights or (ask.weight,)) and (needs.acts is None or ask.act in needs.acts)


def report(pairs: Mapping[str, tuple[str, str]] | None = None, device: str | torch.device | None = None) -> str:
    """A page of text about this machine.

    Arguments:
        pairs: label to (weight, activations), e.g. one per recipe; default `PAIRS`.
        device: default the first GPU that torch sees, else the CPU.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, version = capability(where)
    rows = [_machine(where, kind, version), f"packages  {_packages()}", ""]
    answers = findings(pairs, kind, version)
    width = max(len(f.what) for f in answers)
    for f in answers:
        slow = "  (plain torch, slow: for correctness)" if f.kernel == "reference" else ""
        rows.append(f"{f.what:<{width}}  {f.kernel or 'nothing serves it'}{slow}")
        rows += [f"{'':<{width}}    {reason}" for reason in f.better]
        if f.fused:
            rows.append(f"{'':<{width}}    fused: {', '.join(FUSED[op] for op in f.fused)}")
    if kind == "cuda" and answers[-1].ask.op != "attention":
        rows.append(f"{'attention':<{width}}  stays in 16 bits: torch's own")
    rows += [f"not imported: {module} ({why})" for module, why in sorted(registry.kernels.missing.items())]
    return "\n".join(rows)


def _machine(device: torch.device, kind: str, version: tuple[int, int] | str | None) -> str:
    if kind == "cpu":
        return f"device    cpu, {platform.machine()}, {torch.get_num_threads()} threads; torch sees no GPU"
    properties = torch.cuda.get_device_properties(device)
    arch = version if isinstance(version, str) else f"sm_{version[0]}{version[1]}"
    gib = properties.total_memory / 2**30
    return f"device    {properties.name}, {arch}, {gib:.1f} GiB, {properties.multi_processor_count} multiprocessors"


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
