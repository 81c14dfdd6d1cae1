"""What every quantized layer shares: packed parameters, the choice of a kernel, canonical bytes in `state_dict`.

Parameters are `nn.Parameter(requires_grad=False)`, so that offloading hooks move them. `state_dict` always holds the canonical layout;
in memory they may be packed for the chosen kernel. All slots but the bias keep their dtype through `.to(dtype)`: a cast would change
numbers. The layer looks like `nn.Linear` / `nn.Conv2d` to LoRA loaders: `weight` is a placeholder of the right shape that takes no memory.
"""

__all__ = ["COUNTS", "Layout", "Packed", "Placeholder", "counts_of", "held_as"]

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from qgen import formats
from qgen.kernels import registry
from qgen.kernels.ops import SLOTS, Slots
from qgen.nn import clock, known, offload
from qgen.nn.clock import TIMED
from qgen.nn.kept import keeps, kept, key_of
from qgen.nn.known import KNOWN

FLOAT_SLOTS = (
    "smooth",
    "down",
    "up",
    "bias",
    "shift",
    "t_shift",
    "t_bias",
    *KNOWN,
)  # stored in any float dtype of 16 or 32 bits; the rest have one dtype each
CAST_SLOTS = ("bias", "t_bias", *KNOWN)  # these follow `.to(dtype)`
BESIDE = (*TIMED, *KNOWN)  # the op knows nothing of these
STORED = (*SLOTS, *BESIDE)  # what files hold


# Computing with a weight's zeros would give wrong numbers without a word.
_READS = {
    *(
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "embedding",
        "add",
        "sub",
        "mul",
        "div",
    ),
    *("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "block_diag", "kron", "norm", "linalg_norm"),
    *("bilinear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"),
    *("__matmul__", "__rmatmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
}
_VIEWS = {  # these, and copies, stay placeholders
    *("__get__", "__getitem__", "t", "transpose", "permute", "reshape", "view", "flatten", "contiguous"),
    *("clone", "detach", "to", "type", "float", "half", "bfloat16", "double", "cpu", "cuda"),
}


class Placeholder(Tensor):
    """A weight that is not there: shape, dtype and device of the float weight, zeros in no memory. Writing to it raises a RuntimeError.

    Without this a LoRA merged "safely" into the placeholder would be lost without a word.
    """

    _is_hf_initialized = True  # transformers' initializers pass over it

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if writes or name in ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"):
            raise RuntimeError(
                "the weight of a quantized layer is a placeholder that cannot be written or copied from: call qgen.fuse_lora(pipe) to "
                "merge a LoRA, qgen.unfuse_lora(pipe) to take it out, layer.dequantize() for values"
            )
        if name in _READS:
            given = [t for x in (*args, *(kwargs or {}).values()) for t in (x if isinstance(x, (list, tuple)) else [x])]
            path = next((str(getattr(t, "path", "")) for t in given if isinstance(t, cls)), "")
            raise RuntimeError(
                f"the weight of the quantized layer {path or '(unnamed)'!r} is read by {name}() and not through the layer, which has no "
                f'float values: keep it float with recipe.skip("{path or "…"}"), or use layer.dequantize()'
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if name not in _VIEWS or not isinstance(result, Tensor):
            return result
        result = result.as_subclass(cls)
        result.path = getattr(args[0], "path", "")
        return result


class Packed(nn.Module):
    """Mixin before `nn.Linear` or `nn.Conv2d`. Subclasses call `_setup` and read the slots as attributes."""

    weight_format: str
    act_format: str
    hadamard: int
    kernel: str | None
    _key: bytes | None  # of what is done to the input, see `kept`

    def _setup(
        self, n: int, k: int, weight_format: str, act_format: str, hadamard: int, compute_dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.n, self.k = n, k
        self.weight_format, self.act_format, self.hadamard = weight_format, act_format, hadamard
        self.compute_dtype = compute_dtype
        self.kernel, self._ask = None, None
        self.fused_from: int | None = (
            None  # rank before a LoRA was fused into the low-rank branch; None = nothing fused
        )
        self.unfused: dict[str, Tensor] = {}  # slots that a fused LoRA changed, as they were, on the CPU
        self.clock: clock.Clock | None = None  # set by `clock.wind` where the layer has timestep bins
        self.path = ""  # in the model, for messages
        self.lent = False  # whether accelerate offloads it, see `offload`
        self.defers = False  # whether its output may be a promise to the next layer, see `mlp`
        self.shows_weight = True  # whether `state_dict` lists the placeholder
        for slot in (
            "bias",
            *STORED,
        ):  # the bias first: models read the dtype of a part off its first parameter (Wan's time embedder)
            self.register_parameter(slot, None)

    # -- what LoRA loaders and schedulers of memory look at ------------------------------------------------------------
    @property
    def weight(self) -> Tensor:
        """Placeholder of the float weight: its shape, dtype and device, no memory, all zeros. Use `dequantize()` for values."""
        zero = torch.zeros((), dtype=self.compute_dtype, device=self.codes.device)
        made = zero.expand(self._weight_shape()).as_subclass(Placeholder)
        made.path = self.path
        return made

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.n, self.k)

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed parameters."""
        return sum(p.nbytes for p in self.slots().values())

    def slots(self) -> dict[str, Tensor]:
        """The tensors that are present, by slot, in the layout in memory."""
        return {slot: getattr(self, slot) for slot in STORED if getattr(self, slot) is not None}

    def canonical(self) -> dict[str, Tensor]:
        """The tensors that are present, by slot, in canonical layout: the bytes that files hold."""
        slots = {name: p.detach() for name, p in self.slots().items()}
        return slots if self.kernel is None else self._around(self.found(self.kernel).unpack, slots)

    def _around(self, way, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a kernel's `pack` or `unpack` makes of the slots that it knows, and those beside as they are."""
        own = {name: t for name, t in slots.items() if name not in BESIDE}
        return {**way(own, self._ask), **{name: t for name, t in slots.items() if name in BESIDE}}

    def fill(self, slots: dict[str, Tensor]) -> None:
        """Sets the packed parameters from canonical tensors."""
        for slot in STORED:
            value = slots.get(slot)
            setattr(self, slot, None if value is None else nn.Parameter(value, requires_grad=False))
        self.kernel, self._ask, self._key = None, None, None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, K) that the layer stands for: residual · Hᵀ / smooth + up · down, in `dtype` (default: compute dtype)."""
        from qgen.kernels import reference

        w = reference.float_weight(self.canonical(), self.weight_format, self.hadamard, self.k)
        return w.to(dtype or self.compute_dtype).reshape(self._weight_shape())

    # -- kernels -------------------------------------------------------------------------------------------------------
    def ask(self) -> registry.Ask:
        """This layer's request to the kernel registry, for the device where its codes are."""
        device = self.codes.device
        capability = None
        kind = device.type
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(device)
            if torch.version.hip:
                kind, capability = "hip", properties.gcnArchName.partition(":")[0]
            else:
                capability = (properties.major, properties.minor)
        traits = {
            "lowrank": self.down is not None,
            "hadamard": bool(self.hadamard),
            "static_act": self.act_scale is not None,
        }
        traits |= {name: getattr(self, name) is not None for name in ("smooth", "shift", "bias")}
        on = frozenset(name for name, present in traits.items() if present)
        static = "" if self.act_scale is None else "tensor" if self.act_scale.numel() == 1 else "block"
        return registry.Ask(
            "linear", kind, self.weight_format, self.act_format, self.compute_dtype, self.n, self.k, self.rank, capability,
            on, self.hadamard, static,
        )  # fmt: skip

    def found(self, kernel: str) -> registry.Kernel:
        """The kernel of this name, of the op that the layer runs."""
        return registry.find("linear", kernel)

    def serves(self, kernel: str) -> str | None:
        """`kernel` if it can serve this layer as it is now, else None: `prepare(layer.serves(old))` keeps a kernel where it can."""
        return None if self.found(kernel).needs.refusals(self.ask()) else kernel

    def prepare(self, kernel: str | None = None) -> str:
        """Chooses a kernel for this device (or takes `kernel`), packs for it, returns its name. NoKernel with reasons if none serves."""
        ask = self.ask()
        chosen = registry.choose(ask, kernel)
        slots = self.canonical()
        self._ask = ask
        self.fill({name: t.contiguous() for name, t in self._around(chosen.pack, slots).items()})
        self.kernel, self._ask = chosen.name, ask
        return chosen.name

    def _run(self, x: Tensor) -> Tensor:
        kernel = self.kernel
        if kernel is None and self.lent:
            with offload.borrowed(self):
                return self._run(x)
        if kernel is None:
            raise RuntimeError(f"{type(self).__name__} has no kernel yet: call qgen.prepare(model) or layer.prepare()")
        if self.known_x is not None:
            return known.apply(self, x, lambda x: self._at_its_time(x, kernel))
        return self._at_its_time(x, kernel)

    def _at_its_time(self, x: Tensor, kernel: str) -> Tensor:
        if self.timed:
            return clock.apply(self, x, lambda x: self._product(x, kernel))
        return self._product(x, kernel)

    def _product(self, x: Tensor, kernel: str) -> Tensor:
        """The op, or its halves where the first one's result may serve the next layer that reads x."""
        if not self.act_format or not keeps(x):
            return torch.ops.qgen.linear(x, *self.record(), kernel)
        halves = self.found(kernel)
        if halves.quantize is None or halves.multiply is None:
            return torch.ops.qgen.linear(x, *self.record(), kernel)
        quantize, multiply, slots = halves.quantize, halves.multiply, self.record()
        with torch.autocast(x.device.type, enabled=False):  # a kernel chooses its own precision
            made = kept(x, self._quantizes_as(halves.reads), lambda: quantize(x, slots))
            return multiply(x, made, slots)

    def _quantizes_as(self, reads: tuple[str, ...]) -> bytes:
        """Equal for layers that make the same codes of an input. Computed once for each filling."""
        if self._key is None:
            kp = formats.padded(self.k, self.weight_format, self.act_format, multiple=self.hadamard or 1)
            tensors = {name: getattr(self, name) for name in reads}
            self._key = key_of(
                tensors, self.kernel, self.act_format, self.hadamard, self.k, kp, str(self.compute_dtype)
            )
        return self._key

    @property
    def timed(self) -> bool:
        """Whether the layer has tables over timesteps."""
        return self.t_bias is not None or self.t_scale is not None or self.t_shift is not None

    def record(self) -> Slots:
        """The layer as kernels see it, in the layout of its kernel: what `qgen.kernels.fused_ops` takes of each layer."""
        tensors = [getattr(self, slot) for slot in SLOTS]
        return Slots(*tensors, self.weight_format, self.act_format, self.n, self.hadamard)

    # -- copies --------------------------------------------------------------------------------------------------------
    def __deepcopy__(self, memo: dict) -> "Packed":
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> "Packed":
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "quantized layers are not pickled: the bytes in memory are one kernel's, and pickles run code; use qgen.save(model, folder)"
        )

    # -- nn.Module -----------------------------------------------------------------------------------------------------
    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "_hf_hook":
            offload.hooked(self, value)

    def _apply(self, fn, recurse=True):
        """Moves everything, casts the bias, and never to 8 bits. A change of device type or compute dtype repacks for it."""
        targets = {name: self._target(name, p, fn) for name, p in self.slots().items()}
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device)).dtype
        dtype = dtype if _castable(dtype) else self.compute_dtype
        if dtype == self.compute_dtype and all(
            (p.device, p.dtype) == targets[name] for name, p in self.slots().items()
        ):
            return self
        prepared = self.kernel
        self.fill({name: _moved(t, *targets[name]) for name, t in self.canonical().items()})
        self.compute_dtype = dtype
        if prepared and self.codes.device.type != "meta":
            self.prepare(self.serves(prepared))
        return self

    def _target(self, name: str, p: Tensor, fn) -> tuple[torch.device, torch.dtype]:
        """Where `fn` would put a parameter: its device always, its dtype only for slots that may be cast, to 16 or 32 bits."""
        probe = fn(torch.empty(0, dtype=p.dtype if name in CAST_SLOTS else torch.uint8, device=p.device))
        return probe.device, probe.dtype if name in CAST_SLOTS and _castable(probe.dtype) else p.dtype

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor
        if self.shows_weight:
            destination[prefix + "weight"] = self.weight  # LoRA loaders look for the key; files leave it out
        if hasattr(destination, "_metadata"):  # so that whoever saves a state dict knows what its tensors mean
            destination._metadata[prefix[:-1]]["qgen"] = self.described()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        state_dict.pop(prefix + "weight", None)
        mine = {slot: state_dict[prefix + slot] for slot in STORED if prefix + slot in state_dict}
        present = self.slots()
        missing_keys.extend(prefix + slot for slot in present if slot not in mine)
        unexpected_keys.extend(prefix + slot for slot in mine if slot not in present)
        if set(mine) != set(present):
            return
        said = local_metadata.get("qgen", {})
        for key, here in (("weight", self.weight_format), ("act", self.act_format), ("hadamard", self.hadamard)):
            if said.get(key, here) != here:
                error_msgs.append(
                    f"{prefix}codes: this layer's {key} is {here or 'float'}, the state dict's {said[key] or 'float'}"
                )
                return
        canonical = self.canonical()
        for slot, tensor in mine.items():
            if tensor.shape != canonical[slot].shape:
                error_msgs.append(
                    f"{prefix}{slot}: expected {tuple(canonical[slot].shape)}, found {tuple(tensor.shape)}"
                )
                return
        prepared, device = self.kernel, self.codes.device
        assign = local_metadata.get("assign_to_params_buffers", False) or device.type == "meta"
        self.fill({slot: t if assign else t.to(device).clone() for slot, t in mine.items()})
        if prepared:
            self.prepare(prepared)

    @property
    def layout(self) -> "Layout":
        """What it takes to build an empty layer like this one."""
        present = tuple(slot for slot in self.slots() if slot not in ("codes", "scales"))
        return Layout(self.weight_format, self.act_format, self.rank, self.hadamard, present, **counts_of(self.slots()))

    def described(self) -> dict:
        """Kind, layout and compute dtype as plain data: what a file says about this layer."""
        kind = next((f"conv{d}d" for d in (1, 2, 3) if isinstance(self, getattr(nn, f"Conv{d}d"))), "linear")
        return {"kind": kind, **self.layout.to_dict(), "dtype": str(self.compute_dtype)[6:]}

    def extra_repr(self) -> str:
        rank = f", rank={self.rank}" if self.rank else ""
        return (
            f"N={self.n}, K={self.k}, {self.weight_format} x {self.act_format or 'float'}{rank}, kernel={self.kernel}"
        )


def held_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the float slots in a model of this dtype: float32 where it is float64, which neither files nor kernels have."""
    return torch.float32 if dtype == torch.float64 else dtype


def _castable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize in (2, 4)


def _moved(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if t.device.type == "meta" and device.type != "meta":
        return torch.empty_like(t, device=device, dtype=dtype)
    return t.to(device=device, dtype=dtype)


COUNTS = ("bins", "known", "mix", "moved")  # of a layout, 0 where they are not told


def counts_of(slots: dict[str, Tensor]) -> dict[str, int]:
    """`COUNTS` of a layer with these canonical slots."""
    timed = any(name in slots for name in TIMED)
    mix = slots["t_mix"].shape[1] if "t_mix" in slots else 0
    return {
        "bins": len(slots["t_edges"]) + 2 if "t_edges" in slots else int(timed),
        "known": len(slots["known_x"]) if "known_x" in slots else 0,
        "mix": mix,
        "moved": len(slots["t_shift"]) if mix and "t_shift" in slots else 0,
    }


@dataclass(frozen=True)
class Layout:
    """What a loader must know to build an empty layer: formats, rank, which optional slots exist, bins of timed tables and one more
    (0 = none), known rows (0 = none), curves that the tables follow (0 = they have a row per bin), and how many of these move the input."""

    weight: str
    act: str = ""
    rank: int = 0
    hadamard: int = 0
    slots: tuple[str, ...] = ()
    bins: int = 0
    known: int = 0
    mix: int = 0
    moved: int = 0

    def to_dict(self) -> dict:
        """Plain data; the last four are there only where there are any."""
        return {key: value for key, value in asdict(self).items() if key not in COUNTS or value}

    def empty(self, n: int, k: int, dtype: torch.dtype, device: str = "meta") -> dict[str, Tensor]:
        """Empty canonical tensors for a weight (N, K), by slot."""
        fmt = formats.get(self.weight)
        kp = formats.padded(k, self.weight, self.act, multiple=self.hadamard or 1)
        act_groups = kp // (formats.get(self.act).block or kp) if self.act else 1
        shapes = {
            **fmt.shapes(n, kp),
            "smooth": ((k,), dtype),
            "down": ((self.rank, k), dtype),
            "up": ((n, self.rank), dtype),
            "bias": ((n,), dtype),
            "shift": ((), dtype),
            "act_scale": ((act_groups,), torch.float32),
            "t_edges": ((max(0, self.bins - 2),), torch.float32),
            "t_mix": ((self.bins, self.mix), torch.float32),
            "t_shift": ((self.moved if self.mix else self.bins, k), dtype),
            "t_scale": ((self.bins,), torch.float32),
            "t_bias": ((self.mix or self.bins, n), dtype),
            "known_x": ((self.known, k), dtype),
            "known_y": ((self.known, n), dtype),
        }
        wanted = {"codes", "scales", *self.slots}
        return {
            slot: torch.empty(shapes[slot][0], dtype=shapes[slot][1], device=device)
            for slot in STORED
            if slot in wanted
        }
