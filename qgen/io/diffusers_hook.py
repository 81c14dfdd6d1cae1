"""The one place that knows diffusers' private quantizer API (checked against 0.42): the quantizer, registration, a self-test.

diffusers has no public registration; other projects assign into the same two dictionaries. What we rely on is compared in `check`.
"""

__all__ = ["attach", "check", "quantizer", "register"]

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from qgen.errors import QgenError
from qgen.io import onthefly
from qgen.io.config import QGenConfig, QGenMethod
from qgen.io.header import KEY, collect, verify
from qgen.io.quantizer import Core, config_of
from qgen.nn.packed import Packed

NAME = QGenMethod.QGEN.value


class _Hooks(Core):
    """Methods that `ModelMixin.from_pretrained` and `save_pretrained` call, in this order."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True  # LoRA: gradients flow through packed layers to their inputs
    is_compileable = True
    dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            onthefly.require_data_free(self.quantization_config.recipe)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        if torch_dtype is not None and torch_dtype.itemsize < 2:
            raise ValueError(f"a quantized model computes in 16 or 32 bits, torch_dtype={torch_dtype} was asked for")
        self.dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list) -> list[str]:
        self.files = self.open(checkpoint_files) if self.pre_quantized else None
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] = (), **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            kept = [path for path, _ in model.named_modules() if set(path.split(".")) & set(keep_in_fp32_modules or ())]
            self.begin(model, kept)
        elif self.files is None:
            raise QgenError(
                "a quantized model is loaded from a folder by from_pretrained or qgen.load; from_single_file reads float weights"
            )
        else:
            self.swap(model, self.files, self.dtype or torch.float32)
            self.wants = {name: t.shape for name, t in model.state_dict().items() if self.keeps(model, name)}

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        placeholders = {
            f"{path}.weight" for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Packed)
        }
        return [key for key in missing_keys if key not in placeholders]

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Slots are handed on as bytes: diffusers casts what looks like floats before it asks us."""
        if not self.pre_quantized:
            return state_dict
        new = {}
        for name, tensor in state_dict.items():
            verify(name, tensor, self.header, self.where)
            new[name] = tensor.contiguous().reshape(-1).view(torch.uint8) if name in self.wants else tensor
        self.dtypes = {**getattr(self, "dtypes", {}), **{name: t.dtype for name, t in state_dict.items()}}
        for name, source in self.header.aliases.items():
            if source in new:
                new[name] = new[source]
        return new

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict, **kwargs: Any
    ) -> bool:
        return param_name in self.wants if self.pre_quantized else self.quantizes(model, param_name)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not self.pre_quantized:
            self.quantize(model, param_name, param_value.to(target_device), param_value.dtype)
            return
        path, _, slot = param_name.rpartition(".")
        value = (
            state_dict[param_name]
            .clone()
            .view(self.dtypes[param_name])
            .reshape(self.wants[param_name])
            .to(target_device)
        )
        setattr(model.get_submodule(path), slot, nn.Parameter(value, requires_grad=False))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.end(model, self.dtype or torch.float32)
        _own(model)
        if not self.pre_quantized:
            model.register_to_config(quantization_config=self.quantization_config)
        self.pre_quantized, self.header, self.files = True, None, None
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict, dict]:
        if not safe_serialization:
            raise ValueError("quantized models are saved as safetensors: leave safe_serialization=True")
        kept, header = collect(state_dict)
        return kept, {KEY: header.to_json()}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        from qgen.io.float_layers import dequantize

        model.__dict__.pop("fuse_lora", None)
        config = model._internal_dict
        model._internal_dict = type(config)(
            {key: value for key, value in config.items() if key != "quantization_config"}
        )
        return dequantize(model)


@functools.cache
def quantizer() -> type:
    """The quantizer class; made on first use, so that importing this file does not import diffusers."""
    from diffusers.quantizers.base import DiffusersQuantizer

    made = type("QGenQuantizer", (_Hooks, DiffusersQuantizer), {"__doc__": _Hooks.__doc__, "__module__": __name__})
    globals()["QGenQuantizer"] = made  # where pickle and deepcopy look for it
    return made


def register() -> None:
    """Makes `quantization_config=QGenConfig(...)` and config.json's "quant_method": "qgen" known to diffusers."""
    from diffusers.quantizers import auto

    check()
    auto.AUTO_QUANTIZER_MAPPING[NAME] = quantizer()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = QGenConfig


def check() -> None:
    """QgenError naming the first thing that this diffusers does otherwise than we rely on."""
    import diffusers
    from diffusers.quantizers import auto
    from diffusers.quantizers.base import DiffusersQuantizer

    wanted = {
        "validate_environment": (), "update_torch_dtype": ("torch_dtype",), "maybe_update_loaded_keys": ("loaded_keys", "checkpoint_files"),
        "maybe_update_state_dict": ("state_dict",), "update_missing_keys": ("model", "missing_keys", "prefix"),
        "check_if_quantized_param": ("model", "param_value", "param_name", "state_dict"), "create_quantized_param": (),
        "get_state_dict_and_metadata": ("state_dict", "safe_serialization"),
        "preprocess_model": ("model",), "postprocess_model": ("model",),
        "_process_model_before_weight_loading": ("model",), "_process_model_after_weight_loading": ("model",), "_dequantize": ("model",),
    }  # fmt: skip
    wrong = [
        name
        for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
        if not isinstance(getattr(auto, name, 0), dict)
    ]
    for name, arguments in wanted.items():
        method = getattr(DiffusersQuantizer, name, None)
        found = tuple(inspect.signature(method).parameters)[1:] if method else ("absent",)
        if method is None or found[: len(arguments)] != arguments:
            wrong.append(f"DiffusersQuantizer.{name}({', '.join(arguments)}), found ({', '.join(found)})")
    if wrong:
        raise QgenError(
            f"diffusers {diffusers.__version__} differs from what qgen was checked against (0.42): wanted {'; '.join(wrong)}"
        )


def attach(model: nn.Module, recipe: Any = None) -> None:
    """Makes `save_pretrained` of a model that was quantized after loading write what `from_pretrained` reads."""
    check()
    config = config_of(model, recipe)
    model.hf_quantizer = quantizer()(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    # Some of diffusers' loaders (IP-Adapter) set attributes of the config, which a new config would not have.
    said = {name: value for name, value in vars(model.config).items() if model.config.get(name, value) is not value}
    model.register_to_config(quantization_config=config)
    for name, value in said.items():
        setattr(model.config, name, value)
    _own(model)


def _own(model: nn.Module) -> None:
    """Methods of a quantized model that are other than its class's."""
    model.fuse_lora = _refuse_fusing
    model.to = types.MethodType(_to, model)


def _to(model: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """`model.to` with a dtype, which diffusers refuses for quantized models, and which its loader of IP-Adapters calls. Packed layers keep
    their numbers through a cast, and everything else is to follow."""
    model.is_quantized = False
    try:
        return type(model).to(model, *args, **kwargs)
    finally:
        model.is_quantized = True


def _refuse_fusing(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "weights of 4 bits cannot take a LoRA in; call qgen.fuse_lora(pipe), which appends it to the low-rank branch"
    )
