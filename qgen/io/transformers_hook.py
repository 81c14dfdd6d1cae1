"""The one place that knows transformers' quantizer API (checked against 5.23 and 5.24): the quantizer, registration, a self-test.

transformers moves every tensor of a file through an operation, `convert({name: tensor}) -> {name: tensor}`. On the fly ours returns
nothing: it has put the packed layer into the model by then.
"""

__all__ = ["attach", "check", "quantizer", "register"]

import functools
import inspect
from pathlib import Path
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
    """Methods that `PreTrainedModel.from_pretrained` and `save_pretrained` call, in this order."""

    is_trainable = True  # LoRA: gradients flow through packed layers to their inputs
    is_compileable = True
    dtype: torch.dtype | None = None

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            onthefly.require_data_free(self.quantization_config.recipe)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, checkpoint_files: list | None = None, **kwargs: Any
    ) -> None:
        self.dtype = dtype or self.dtype or torch.get_default_dtype()
        if not self.pre_quantized:
            self.begin(model, self.get_modules_to_not_convert(model))
            return
        if not checkpoint_files or any(Path(path).suffix != ".safetensors" for path in checkpoint_files):
            raise QgenError("a quantized model is loaded from its safetensors files; found none")
        files = self.open(checkpoint_files)
        for name, tensor in files.read():
            verify(name, tensor, self.header, self.where)
        self.swap(model, files, self.dtype)
        self.kept = {name for name in self.header.tensors if self.keeps(model, name)}
        for layer in model.modules():
            if isinstance(layer, Packed):
                # A placeholder in `state_dict` would count as missing; an initializer would write into slots.
                layer.shows_weight, layer._is_hf_initialized = False, True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None = as in the file. The names of a packed layer's slots are as we wrote them; others get the dtype that was asked for."""
        names = getattr(converter, "target_patterns", None) or []
        return None if any(name in self.kept for name in names) else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and self.quantizes(model, param_name)

    def get_quantize_ops(self) -> "_Quantize":
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.end(model, self.dtype)
        for layer in model.modules():
            if isinstance(layer, Packed):
                layer.shows_weight = True
        self.pre_quantized, self.header = True, None
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        model._weight_conversions = []  # names on disk are module paths
        state = model.state_dict()
        for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
            state.pop(name, None)
        kept, header = collect(state)
        return kept, {KEY: header.to_json()}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from qgen.io.float_layers import dequantize

        return dequantize(model, dtype)


class _Quantize:
    """The operation on a weight that streams in."""

    def __init__(self, quantizer: _Hooks):
        self.quantizer = quantizer

    def convert(
        self,
        tensors: dict[str, Any],
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        for name, value in tensors.items():
            weight = value[0] if isinstance(value, list) else value
            for path in self.quantizer.quantize(model, name, weight, weight.dtype):
                model.get_submodule(path)._is_hf_initialized = True
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@functools.cache
def quantizer() -> type:
    """The quantizer class; made on first use, so that importing this file does not import transformers."""
    from transformers.quantizers.base import HfQuantizer

    made = type("QGenHfQuantizer", (_Hooks, HfQuantizer), {"__doc__": _Hooks.__doc__, "__module__": __name__})
    globals()["QGenHfQuantizer"] = made  # where pickle and deepcopy look for it
    return made


def register() -> None:
    """Makes `quantization_config=QGenConfig(...)` and config.json's "quant_method": "qgen" known to transformers."""
    from transformers.quantizers import auto

    check()
    auto.AUTO_QUANTIZER_MAPPING[NAME] = quantizer()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = QGenConfig


def check() -> None:
    """QgenError naming the first thing that this transformers does otherwise than we rely on."""
    import transformers
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    wanted = {
        "validate_environment": (), "update_dtype": ("dtype",), "get_new_dtype": ("converter", "param", "dtype"),
        "param_needs_quantization": ("model", "param_name"), "get_quantize_ops": (), "get_state_dict_and_metadata": ("model",),
        "preprocess_model": ("model",), "postprocess_model": ("model",), "_process_model_before_weight_loading": ("model",),
        "_process_model_after_weight_loading": ("model",), "get_modules_to_not_convert": ("model",), "_dequantize": ("model",),
    }  # fmt: skip
    wrong = [
        name
        for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
        if not isinstance(getattr(auto, name, 0), dict)
    ]
    for name, arguments in wanted.items():
        method = inspect.getattr_static(HfQuantizer, name, None)
        method = getattr(method, "__func__", method)
        found = tuple(p for p in inspect.signature(method).parameters if p != "self") if method else ("absent",)
        if method is None or found[: len(arguments)] != arguments:
            wrong.append(f"HfQuantizer.{name}({', '.join(arguments)}), found ({', '.join(found)})")
    if wrong:
        raise QgenError(
            f"transformers {transformers.__version__} differs from what qgen was checked against (5.24): wanted {'; '.join(wrong)}"
        )


def attach(model: nn.Module, recipe: Any = None) -> None:
    """Makes `save_pretrained` of a model that was quantized after loading write what `from_pretrained` reads."""
    check()
    config = config_of(model, recipe)
    model.hf_quantizer = quantizer()(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config
