"""Quantize Model: MODEL in, 4-bit MODEL out."""

__all__ = ["quantize", "recipe_for"]

from dataclasses import replace
from typing import Any

from qgen.nodes import registry
from qgen.nodes.attention import NUMBERS
from qgen.nodes.cache import Cache, fingerprint
from qgen.nodes.inputs import recipe as recipe_input
from qgen.nodes.inputs import sampling
from qgen.nodes.inputs import seed as seed_input
from qgen.nodes.registry import Input, Node, Output

# What the node calls a format: numbers of weights and of activations (None = they stay float).
FORMATS: dict[str, tuple[str, str | None]] = {
    "W4A4 int4": ("int4_g64", "int4_g64"),
    "W4A4 nvfp4": ("nvfp4", "nvfp4_dynamic"),
    "W4A4 mxfp4": ("mxfp4", "mxfp4"),
    "W4A8 int": ("int4_s8_g64", "int8_row"),
    "W4A16 uint4": ("uint4_g64", None),
    "W8A8 int8": ("int8_row", "int8_row"),
    "W8A8 fp8": ("fp8_e4m3_row", "fp8_e4m3_row"),
}
CALIBRATION = ("auto", "none", "from conditioning")
ATTENTION = ("as it is", *NUMBERS)
_made = Cache()


def recipe_for(name: str, form: str = "auto", rank: int = -1, device: Any = "cpu", calibrated: bool = True) -> Any:
    """The recipe that the node's fields ask for.

    name: of `qgen.recipes.names()`; "auto" without calibration is rounding to nearest. form: a key of FORMATS, or "auto" = as the recipe
    has it. rank: of the low-rank branch, -1 = as the recipe has it, 0 = none.
    """
    from qgen import recipes
    from qgen.methods.lowrank import LowRank

    if name == "auto" and not calibrated:
        name = "rtn-nvfp4" if recipes.auto(device).default.weight == "nvfp4" else "rtn-w4a16"
    recipe = recipes.get(name, device)

    def changed(spec: Any, numbers: bool) -> Any:
        if spec is None:
            return None
        if numbers and form != "auto":
            spec = replace(spec, weight=FORMATS[form][0], act=FORMATS[form][1])
        if rank < 0:
            return spec
        methods = tuple(replace(m, rank=rank) if isinstance(m, LowRank) else m for m in spec.methods)
        return replace(spec, methods=tuple(m for m in methods if rank or not isinstance(m, LowRank)))

    rules = tuple(replace(rule, spec=changed(rule.spec, False)) for rule in recipe.rules)
    return replace(recipe, default=changed(recipe.default, True), rules=rules)


def quantize(
    model: Any,
    recipe: str = "auto",
    format: str = "auto",
    rank: int = -1,
    calibration: str = "auto",
    seed: int = 0,
    steps: int = 20,
    cfg: float = 1.0,
    sampler_name: str = "euler",
    scheduler: str = "simple",
    denoise: float = 1.0,
    runs: int = 1,
    budget: str = "",
    attention: str = ATTENTION[0],
    positive: Any = None,
    negative: Any = None,
    latent: Any = None,
) -> tuple[Any]:
    """The node. The model that comes in is not changed, whatever happens."""
    from qgen.nodes.attention import attention as attend
    from qgen.nodes.calibrate import Settings, record
    from qgen.nodes.models import REPORT, patcher_around
    from qgen.nodes.progress import Bars
    from qgen.nodes.quantizing import needs_calls, quantized_twin, tensors_of

    limit = _limit(budget)
    given = positive is not None and latent is not None
    if calibration == "from conditioning" and not given:
        raise ValueError(
            "calibration: 'from conditioning' needs the inputs positive and latent; connect what your sampler gets"
        )
    calibrated = given and calibration != "none"
    made = recipe_for(recipe, format, rank, model.load_device, calibrated)
    if needs_calls(made) and not calibrated:
        raise ValueError(
            f"recipe: {recipe!r} calibrates; connect positive and latent (what your sampler gets), or choose a recipe that needs no "
            "calibration: auto, rtn-int4, rtn-nvfp4, rtn-w4a16, fp8"
        )
    if limit is not None and not calibrated:
        raise ValueError(
            f"budget: {limit} is kept by measuring each layer; connect positive and latent (what your sampler gets)"
        )
    settings = Settings(seed, steps, cfg, sampler_name, scheduler, denoise, runs)
    conditions: tuple = ()
    if calibrated and (needs_calls(made) or limit is not None):
        sampling = model.get_model_object("model_sampling")
        conditions = (
            repr(settings),
            positive,
            negative,
            latent,
            tensors_of(sampling),
            repr(getattr(sampling, "shift", None)),
        )
    patches = {key: [p[:4] for p in listed] for key, listed in model.patches.items()}
    key = fingerprint(made.to_json(), tensors_of(model.model), patches, str(model.load_device), conditions, str(limit))
    if (known := _made.get(key)) is not None:
        base, rows = known
    else:
        calls = None
        if conditions:
            with Bars()(total=steps * runs, desc="record") as bar:
                calls = record(model, positive, negative if negative is not None else positive, latent, settings, bar)
        quantized, rows = quantized_twin(model, made, calls, seed, limit)
        base = patcher_around(quantized, model)
        _made.put(key, base, rows)
    out = patcher_around(base.model, model)
    out.parent = base  # as a clone's: ComfyUI takes a model for leaked that outlives all of its patchers
    out.set_attachments(REPORT, rows)
    return (out,) if attention == ATTENTION[0] else attend(out, attention)


def _limit(budget: str | None) -> Any:
    """The field `budget` as `qgen.allocate` has it, None if it is empty. ValueError for what cannot be read."""
    from qgen.allocate import Quality, asked

    text = (budget or "").strip()  # None where another node will give it
    if not text:
        return None
    try:
        limits = asked(None, text) if ">" in text or "\u2265" in text else asked(text, None)
    except ValueError as error:
        raise ValueError(f"budget: {error}; or a quality such as 'sqnr>=20'; empty = none") from None
    found = next(limit for limit in limits if limit is not None)
    if isinstance(found, Quality) and found.metric != "sqnr":
        raise ValueError(f"budget: {found.metric} is measured on pictures, here only 'sqnr>=…' of the model's output")
    return found


def _check(budget: str) -> bool | str:
    try:
        _limit(budget)
    except ValueError as error:
        return str(error)
    return True


registry.register(
    Node(
        "QGenQuantizeModel",
        "Quantize Model (qgen)",
        "Turns a 16-bit diffusion model into a 4-bit one, right between its loader and your sampler. Connect positive, negative and latent "
        "to calibrate with your own prompt and sampler settings; without them weights are rounded as they are. The model that comes in "
        "stays as it was; the result is kept, so that queueing again costs nothing.",
        run=quantize,
        check=_check,
        search=("qgen", "4-bit", "svdquant", "nvfp4", "int4", "w4a4", "quantization", "compress model"),
        inputs=(
            Input(
                "model",
                "MODEL",
                "The 16-bit (or 8-bit) diffusion model to quantize. LoRAs before it become part of the weights.",
            ),
            recipe_input(
                "What goes where: numbers, methods, which layers stay float. auto picks what this device runs best."
            ),
            Input(
                "format",
                "COMBO",
                "Numbers of weights (W) and activations (A) inside the blocks. auto takes the recipe's own.",
                default="auto",
                choices=("auto", *FORMATS),
            ),
            Input(
                "rank",
                "INT",
                "Rank of the 16-bit low-rank branch that takes what 4 bits cannot hold. -1 takes the recipe's own, 0 leaves it out.",
                default=-1,
                low=-1,
                high=512,
            ),
            Input(
                "calibration",
                "COMBO",
                "auto calibrates if positive and latent are connected and the recipe asks for it; none never does.",
                default="auto",
                choices=CALIBRATION,
            ),
            seed_input("Seed of the calibration's noise and of the methods.", advanced=True),
            *sampling("each calibration run", least=0.01, advanced=True),
            Input(
                "runs",
                "INT",
                "How many seeds are drawn for calibration: more is better and takes longer.",
                default=2,
                low=1,
                high=64,
            ),
            Input(
                "budget",
                "STRING",
                "Mixed precision: '4.5 bits' a weight, '6 GiB', '12 ms', or 'sqnr>=20' dB of the model's output. "
                "Needs positive and latent; empty = every layer as the recipe has it.",
                default="",
            ),
            Input(
                "attention",
                "COMBO",
                "Low-bit attention as well, where its error stays small; auto is what this device runs best. "
                "4-bit Attention has more choices.",
                default=ATTENTION[0],
                choices=ATTENTION,
            ),
            Input(
                "positive", "CONDITIONING", "What your sampler gets as positive: turns calibration on.", optional=True
            ),
            Input(
                "negative",
                "CONDITIONING",
                "What your sampler gets as negative; the positive if nothing is connected.",
                optional=True,
            ),
            Input(
                "latent",
                "LATENT",
                "What your sampler gets as latent: its size is what is calibrated for.",
                optional=True,
            ),
        ),
        outputs=(
            Output(
                "MODEL",
                "model",
                "The same model with 4-bit layers. LoRAs, ControlNets and patches go after it as before.",
            ),
        ),
    )
)
