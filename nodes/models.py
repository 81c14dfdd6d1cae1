"""From ComfyUI's model to one with the same structure and 4-bit layers, and the patcher around it.

The input is never changed: a *twin* is a copy of the model's modules whose parameters are new objects on the same memory. Layers of the
twin are then exchanged one by one; what stays float is copied at the end. So a 4-bit model is one of its own for ComfyUI's memory
management, the 16-bit one may be freed, and an interrupted quantization leaves nothing behind. Samplers, ControlNets, LoRAs and other
packs see the class they know, with other layers in it. Patches that the input carries (a LoRA before the quantizer) are in the twin's
weights; its options, wrappers, hooks and object patches go on to the new patcher.
"""

__all__ = ["REPORT", "compute_dtype", "exchange", "is_quantized", "patcher_around", "settle", "twin"]

from types import MethodType
from typing import Any

import torch
from torch import nn

from qgen.nodes.ops import adapt, packed_layers

KEY = "qgen"
REPORT = "qgen_report"  # attachment of a patcher: the rows of the report
_BOOKS = ("backup", "backup_buffers", "object_patches_backup", "pinned", "hook_backup")
# What belongs to one model of ComfyUI's and must not travel to another one's patcher.
_OWN = {
    *(
        "model",
        "size",
        "patches",
        "patches_uuid",
        "parent",
        "cached_patcher_init",
        "cached_hook_patches",
        "clone_base_uuid",
    ),
    *("is_injected", "is_multigpu_base_clone", "weight_inplace_update", "load_device", "offload_device"),
    *("hook_patches_backup", "current_hooks"),
}


def twin(patcher: Any) -> Any:
    """A copy of the patcher's model that shares memory with it, with the patcher's weight patches applied, off the device."""
    import comfy.model_management as management
    from comfy.utils import set_attr_param

    if getattr(patcher, "is_dynamic", bool)():
        patcher = patcher.clone(disable_dynamic=True)  # weights as ordinary tensors
    unload = getattr(management, "unload_model_and_clones", None) or getattr(management, "unload_model_clones", None)
    unload(patcher) if unload else management.unload_all_models()
    made = _copied(patcher.model, {})
    if hasattr(made, "current_patcher"):
        made.current_patcher = None
    for key in patcher.patches:
        set_attr_param(made, key, patcher.patch_weight_to_device(key, patcher.offload_device, return_weight=True))
    _thaw(made)
    return made


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The tree of modules anew; parameters are new objects on the same memory, everything that is no module or tensor is shared."""
    if id(module) in memo:
        return memo[id(module)]
    made = memo[id(module)] = object.__new__(type(module))
    own = {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in vars(module).items()}
    for name, p in own["_parameters"].items():
        if p is not None:
            own["_parameters"][name] = memo.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=False))
    own["_modules"] = {name: None if child is None else _copied(child, memo) for name, child in own["_modules"].items()}
    for name, value in own.items():
        if (
            isinstance(value, MethodType) and id(value.__self__) in memo
        ):  # a method kept as an attribute belongs to the copy
            own[name] = MethodType(value.__func__, memo[id(value.__self__)])
    made.__dict__.update(own)
    return made


def _thaw(model: nn.Module) -> None:
    """ComfyUI's own quantized linear layers as float ones."""
    from comfy.ops import manual_cast

    for path, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear) or not hasattr(weight, "dequantize") or not hasattr(layer, "in_features"):
            continue
        if type(weight.detach()) in (torch.Tensor, nn.Parameter):
            continue  # not packed
        plain = manual_cast.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().dequantize(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        exchange(model, path, plain)


def exchange(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts a module in the place of another one."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def settle(model: nn.Module, device: torch.device) -> None:
    """Gives a twin its own copies of what stayed float, on `device`."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in copies:
                    copies[id(p)] = nn.Parameter(p.detach().to(device, copy=True), requires_grad=False)
                module._parameters[name] = copies[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = b.detach().to(device, copy=True)
        for name in ("comfy_patched_weights", "prev_comfy_cast_weights"):  # marks of how the input was loaded
            module.__dict__.pop(name, None)
    model.device = device
    model.model_loaded_weight_memory = 0
    model.model_lowvram, model.lowvram_patch_counter = False, 0
    model.current_weight_patches_uuid = None


def patcher_around(model: Any, like: Any = None) -> Any:
    """A patcher for a quantized model. like: a patcher whose devices, options, wrappers and hooks it takes over.

    Patchers of one model share their books (what is patched, what was there before), as ComfyUI's clones do.
    """
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import CallbacksMP

    load = management.get_torch_device() if like is None else like.load_device
    rest = management.unet_offload_device() if like is None else like.offload_device
    made = ModelPatcher(model, load, rest)
    shared = model.__dict__.setdefault("qgen_books", {})
    for name in _BOOKS:
        if hasattr(made, name):
            setattr(made, name, shared.setdefault(name, getattr(made, name)))
    if like is not None:
        carried = vars(like.clone())
        for name in (vars(made).keys() & carried.keys()) - _OWN - set(_BOOKS):
            setattr(made, name, carried[name])
    made.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    made.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, adapt)
    return made


def compute_dtype(model: Any) -> torch.dtype:
    """In which dtype ComfyUI runs the model here."""
    return (
        model.get_dtype_inference()
        if hasattr(model, "get_dtype_inference")
        else model.manual_cast_dtype or model.get_dtype()
    )


def is_quantized(model: Any) -> bool:
    """Whether a model of ComfyUI's has packed layers."""
    return any(True for _ in packed_layers(model))
