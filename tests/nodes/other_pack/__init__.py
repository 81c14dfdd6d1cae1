"""A node pack of somebody else's, as the server's tests need one: it patches attention and wraps the denoiser's call, as many packs do."""

import sys
from pathlib import Path


class OtherPackPatch:
    """Scales what self-attention gives, and counts calls of the denoiser through ComfyUI's single wrapper slot."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "scale": ("FLOAT", {"default": 1.0})}}

    def patch(self, model, scale):
        made = model.clone()
        made.set_model_attn1_output_patch(lambda out, options: out * scale)

        def wrapper(apply, told):
            return apply(told["input"], told["timestep"], **told["c"]) * (0.5 + 0.5 * scale)

        made.set_model_unet_function_wrapper(wrapper)
        return (made,)


NODE_CLASS_MAPPINGS = {"OtherPackPatch": OtherPackPatch}

_nodes = sys.modules.get("nodes")
_kernels = sys.modules.get("kernels")
_ours = bool(_kernels) and "qgen" in str(getattr(_kernels, "__path__", ""))
_theirs = Path(getattr(_nodes, "__file__", "")).name == "nodes.py" and hasattr(_nodes, "NODE_CLASS_MAPPINGS")
print(f"OTHER PACK: nodes is ComfyUI's: {_theirs}; kernels is ours: {_ours}", flush=True)
