"""One forward pass under hooks tells what per-model code used to: execution order, repeated blocks, shared inputs, producers, roles.

Two layers share an input when they are given the same memory, unchanged, while it is alive. A block is the entry of the outermost
`ModuleList` that a layer lives in. A layer outside every block is an embedder or a head; one that
sees a single row per sample (time embeddings, adaLN modulation) works on vectors. An input that several blocks read, the very same tensor,
is context: text for cross-attention, which does not change from step to step. Whoever reads what `torch.cat` has made, itself or after a
norm and an activation, knows the channels of its parts.
"""

__all__ = ["blocks_of", "input_of", "probe", "routed", "static_sites"]

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qgen.calibration.base import Call
from qgen.errors import NotQuantizable
from qgen.nn.experts import Experts
from qgen.nn.kinds import is_layer, kind_of, shape_of
from qgen.site import Site

# What leaves channels where they are, whatever it does to them.
_CHANNELWISE = (nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.GELU, nn.ReLU, nn.Mish, nn.Dropout, nn.Dropout2d, nn.Identity)


def probe(module: nn.Module, call: Call) -> list[Site]:
    """Sites of `module` in execution order, from one run of `call`. NotQuantizable if it runs no linear or convolution layer."""
    watch = _Watch(blocks_of(module), min((t.shape[0] for _, t in call.tensors() if t.ndim > 1), default=0))
    hooks = []
    for path, child in module.named_modules():
        if is_layer(child):
            hooks.append(child.register_forward_pre_hook(watch.entering(path), with_kwargs=True))
        if path and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            hooks.append(child.register_forward_hook(watch.leaving))
    try:
        with torch.no_grad(), _Joins(watch):
            call.run(module)
    finally:
        for hook in hooks:
            hook.remove()
    if not watch.sites:
        raise NotQuantizable(
            f"{type(module).__name__} ran no nn.Linear or convolution layer: there is nothing to quantize"
        )
    return _with_context(watch.sites)


def _with_context(sites: list[Site]) -> list[Site]:
    """Sites inside blocks whose input other blocks read too get the role "context"."""
    readers: dict[str, set[str]] = {}
    for site in sites:
        readers.setdefault(site.shares, set()).add(site.block)
    context = {shares for shares, blocks in readers.items() if len(blocks - {""}) > 1}
    return [replace(s, role="context") if s.role == "inside" and s.shares in context else s for s in sites]


def static_sites(module: nn.Module) -> list[Site]:
    """Sites in the order of definition, for data-free recipes on a module that nobody can call."""
    block = blocks_of(module)
    sites = []
    for path, layer in module.named_modules():
        if is_layer(layer):
            role = "inside" if block(path) or not block.any else "outside"
            shape = shape_of(layer)
            sites.append(Site(path, kind_of(layer), block(path), len(sites), path, shape, role=role))
    if not sites:
        raise NotQuantizable(
            f"{type(module).__name__} has no nn.Linear or convolution layer: there is nothing to quantize"
        )
    return sites


def routed(module: nn.Module, sites: list[Site], calls: Iterable[Call]) -> tuple[list[Site], dict[str, int]]:
    """Sites with every expert of every mixture that ran, in execution order, and the rows by which each expert can be fitted.

    One call reaches some of the experts. The calls that may be fitted are replayed once, and counted; without experts nothing is replayed.
    """
    stacks = {path: part for path, part in module.named_modules() if isinstance(part, Experts)}
    layers = {f"{path}.{i}": layer for path, part in stacks.items() for i, layer in enumerate(part.layers())}
    if not layers:
        return sites, {}
    counts = dict.fromkeys(layers, 0)

    def counting(path: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            counts[path] += 0 if x is None else x.shape[:-1].numel()

        return hook

    hooks = [layer.register_forward_pre_hook(counting(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            for call in calls:
                if not call.moment.held:
                    call.run(module)
    finally:
        for hook in hooks:
            hook.remove()
    return _with_experts(module, sites, layers), counts


def _with_experts(module: nn.Module, sites: list[Site], layers: dict[str, nn.Module]) -> list[Site]:
    """Where the first expert of a mixture ran, all of its experts, one after the other; each by the stacks in the order in which it ran."""
    block, known, made = blocks_of(module), {site.path: site for site in sites}, []
    owner_of = lambda path: path.rsplit(".", 2)[0] if path.count(".") > 1 else ""  # noqa: E731
    done = set()
    for site in sites:
        if site.path not in layers:
            made.append(site)
        elif (owner := owner_of(site.path)) not in done:
            done.add(owner)
            stacks = list(
                dict.fromkeys(
                    s.path.rpartition(".")[0] for s in sites if s.path in layers and owner_of(s.path) == owner
                )
            )
            count = sum(path.rpartition(".")[0] == stacks[0] for path in layers)
            for path in (f"{stack}.{i}" for i in range(count) for stack in stacks):
                unseen = Site(path, "linear", block(path), 0, path, shape_of(layers[path]))
                made.append(replace(known.get(path, unseen), role="inside"))
    return [replace(site, order=i) for i, site in enumerate(made)]


class _Watch:
    def __init__(self, blocks: Callable[[str], str], batch: int):
        self.blocks, self.batch = blocks, batch  # batch: samples in the call, 0 = unknown
        self.sites: list[Site] = []
        self.seen: set[str] = set()
        self.inputs: dict[tuple, tuple[weakref.ref, str]] = {}
        self.made: dict[tuple, tuple[weakref.ref, str]] = {}
        self.joined: dict[tuple, tuple[weakref.ref, tuple[int, tuple]]] = {}  # axis and sizes of what was concatenated

    def entering(self, path: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            if path in self.seen or x is None:
                return
            self.seen.add(path)
            kind = kind_of(layer)
            conv = kind != "linear"
            way = _geometry(layer) if conv else ()  # one image unfolds into other rows for another kernel or stride
            shares = _recall(self.inputs, x, way) or f"input{len(self.sites)}"
            self.inputs[_key(x, way)] = (weakref.ref(x), shares)
            block = self.blocks(path)
            samples = (
                self.batch or x.shape[0] if x.ndim == 2 else x.shape[0]
            )  # (M, K): tokens of all samples, or one row for each
            rows = x.shape[2:].numel() if conv else max(1, x.numel() // max(1, x.shape[-1] * samples))
            shape = shape_of(layer)
            axis, parts = _recall(self.joined, x) or (0, ())
            parts = parts if axis == (1 if conv else x.ndim - 1) and x.ndim > 1 else ()
            role = "vector" if rows == 1 and not conv else "inside" if block or not self.blocks.any else "outside"
            self.sites.append(
                Site(
                    path,
                    kind,
                    block,
                    len(self.sites),
                    shares,
                    shape,
                    rows,
                    _recall(self.made, x),
                    role,
                    parts,
                )
            )

        return hook

    def leaving(self, module: nn.Module, args: tuple, output) -> None:
        if isinstance(output, Tensor) and not _recall(self.made, output):
            self.made[_key(output)] = (weakref.ref(output), type(module).__name__)
            if isinstance(module, _CHANNELWISE) and args and (parts := _recall(self.joined, args[0])):
                self.joined[_key(output)] = (weakref.ref(output), parts)


class _Joins(TorchFunctionMode):
    """Tells a watch which tensors are concatenations, of which sizes along which axis."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(out, Tensor):
            axis, sizes = _sizes(out.ndim, *args, **(kwargs or {}))
            if len(sizes) > 1:
                self.watch.joined[_key(out)] = (weakref.ref(out), (axis, sizes))
        return out


def _sizes(ndim: int, tensors: Any, dim: int = 0, *, axis: int | None = None, out: Any = None) -> tuple[int, tuple]:
    """Of a call of `torch.cat`: the axis, from the front, and the sizes along it."""
    along = (dim if axis is None else axis) % ndim
    return along, tuple(t.shape[along] for t in tensors if t.ndim == ndim)


def _key(x: Tensor, way: tuple = ()) -> tuple:
    return x.data_ptr(), tuple(x.shape), x.stride(), 0 if x.is_inference() else x._version, way


def _geometry(conv: Any) -> tuple:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def _recall(table: dict[tuple, tuple[weakref.ref, Any]], x: Tensor, way: tuple = ()) -> Any:
    """What is stored for this memory while its tensor is alive, else ""."""
    known = table.get(_key(x, way))
    return known[1] if known is not None and known[0]() is not None else ""


def input_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that a layer was called with, by position or by whatever name; None if there is none."""
    return next((x for x in (*args[:1], *kwargs.values()) if isinstance(x, Tensor)), None)


class blocks_of:
    """path -> path of the block it lives in, "" if none. `any`: whether the module has blocks at all."""

    def __init__(self, module: nn.Module):
        self.heads: list[str] = []
        for path, child in module.named_modules():
            if (
                isinstance(child, nn.ModuleList)
                and len(child)
                and not any(path.startswith(h + ".") for h in self.heads)
            ):
                self.heads.append(path)
        self.any = bool(self.heads)

    def __call__(self, path: str) -> str:
        for head in self.heads:
            if path.startswith(head + "."):
                return head + "." + path[len(head) + 1 :].partition(".")[0]
        return ""
