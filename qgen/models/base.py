"""Adapter: what only a model family knows. Every default works for any pipeline with denoisers under the usual names, and any module."""

__all__ = ["Adapter", "adapter_for", "adapters"]

import fnmatch
from typing import Any

from torch import nn

from qgen.errors import NotQuantizable
from qgen.registry import Registry

adapters: Registry["Adapter"] = Registry("model family", "qgen.models")
_DENOISERS = ("transformer", "unet", "transformer_2", "unet_2", "prior", "decoder", "denoiser")


class Adapter:
    """Defaults for a family. Subclass, set `matches` (globs on class names, compared as text), override, register an instance."""

    matches: tuple[str, ...] = ()

    def denoisers(self, pipe: Any) -> dict[str, nn.Module]:
        """The modules to quantize, by attribute name in the pipeline ("" = the object itself). NotQuantizable if there are none."""
        if isinstance(pipe, nn.Module):
            return {"": pipe}
        found = {name: getattr(pipe, name) for name in _DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)}
        if not found:
            parts = sorted(getattr(pipe, "components", {}) or {})
            holds = f"its components are {', '.join(parts)}" if parts else "it has no components"
            raise NotQuantizable(
                f"{type(pipe).__name__} has no denoiser to quantize: looked for {', '.join(_DENOISERS)}; {holds}. "
                "Pass a diffusers pipeline, or the module itself: qgen.quantize(module, calibration=[...])"
            )
        return found

    def keep_float(self) -> tuple[str, ...]:
        """Globs of module paths that always stay float in this family."""
        return ()


def adapter_for(pipe: Any) -> Adapter:
    """The first registered adapter whose globs match a class name of `pipe` (its own or a base class's), else the defaults."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    for _, adapter in adapters.items():
        if any(fnmatch.fnmatchcase(name, glob) for name in names for glob in adapter.matches):
            return adapter
    return Adapter()
