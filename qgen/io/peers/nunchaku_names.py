"""Which layers a Nunchaku file fuses, splits, shifts and interleaves, model by model, and what diffusers calls them.

Nunchaku runs blocks of its own, so its files hold what those want: q, k and v as one layer; the last layer of a Flux single block as two,
for attention and for the MLP; the layers after GELU with shifted input, where they are INT4; adaLN layers in W4A16 with rows that take
turns (a shift, a scale, a gate, …) and the one of `1 + scale` in the bias. Layers that are not listed are the same in both.
"""

__all__ = ["FAMILIES", "Family", "Place", "family_named"]

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Place:
    """A layer of the file, under `block`.

    file: its name in files. also: other spellings there. paths: of the layers of diffusers that it holds, stacked along N. half: 0 or 1 if
    it is the left or right part along K of the one layer in `paths`. size: (N, K) of each path in units of the hidden size. gelu: whether
    its input comes from GELU. turns: in how many parts its rows take turns.
    """

    block: str
    file: str
    paths: tuple[str, ...]
    also: tuple[str, ...] = ()
    half: int | None = None
    size: tuple[int, int] | None = None
    gelu: bool = False
    turns: int = 0

    @property
    def scales(self) -> tuple[int, ...]:
        """Of the parts that take turns, those that are used as 1 + scale."""
        return {0: (), 3: (1,), 6: (1, 4)}[self.turns]

    @cached_property
    def _file(self) -> re.Pattern:
        names = "|".join(re.escape(name) for name in (self.file, *self.also))
        return re.compile(rf"({self.block})\.(?:{names})")

    def in_file(self, stem: str) -> str | None:
        """The block, if `stem` is this place's name in a file."""
        found = self._file.fullmatch(stem)
        return found and found[1]

    def in_model(self, path: str) -> tuple[str, int] | None:
        """The block and the position in `paths`, if `path` is one of this place's layers."""
        for index, name in enumerate(self.paths):
            block = path.removesuffix(f".{name}")
            if block != path and re.fullmatch(self.block, block):
                return block, index
        return None


@dataclass(frozen=True)
class Family:
    """What files of one kind of model look like. models: diffusers' class names. names: of tensors, (pattern in the file, in diffusers).

    old: whether its files use the older tails (lora_down, smooth). runner: the class that runs it in Nunchaku.
    """

    models: tuple[str, ...]
    places: tuple[Place, ...]
    runner: str
    names: tuple[tuple[str, str], ...] = ()
    back: tuple[tuple[str, str], ...] = ()
    old: bool = False

    def of_file(self, stem: str) -> tuple[str, Place] | None:
        """Block and place of a file's layer, None = it has the same name in diffusers."""
        for place in self.places:
            block = place.in_file(stem)
            if block is not None:
                return block, place
        return None

    def of_model(self, path: str) -> Iterator[tuple[str, Place, int]]:
        """(block, place, position) of a layer of diffusers: two of them where the file has it in halves."""
        for place in self.places:
            found = place.in_model(path)
            if found:
                yield found[0], place, found[1]

    def to_model(self, name: str) -> str:
        """The name of an ordinary tensor of the file, in diffusers."""
        return _renamed(name, self.names)

    def to_file(self, name: str) -> str:
        """Inverse of `to_model`."""
        return _renamed(name, self.back)


def family_named(*names: str | None) -> Family | None:
    """The family of the first class name that is known, of diffusers or of Nunchaku."""
    for name in filter(None, names):
        plain = re.sub(r"^nunchaku|v2$", "", str(name).lower())
        for family in FAMILIES:
            if plain in (model.lower() for model in family.models):
                return family
    return None


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, put in rules:
        changed = re.sub(pattern, put, name)
        if changed != name:
            return changed
    return name


def _qkv(prefix: str = "", names: tuple[str, str, str] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"
_ANY = r"(?:single_)?transformer_blocks\.\d+"

FLUX = Family(
    ("FluxTransformer2DModel",),
    (
        Place(_DOUBLE, "qkv_proj", _qkv("attn."), ("attn.to_qkv",), size=(1, 1)),
        Place(_DOUBLE, "qkv_proj_context", _qkv("attn.", _ADDED), ("attn.add_qkv_proj",), size=(1, 1)),
        Place(_DOUBLE, "out_proj", ("attn.to_out.0",), ("attn.to_out.0",), size=(1, 1)),
        Place(_DOUBLE, "out_proj_context", ("attn.to_add_out",), ("attn.to_add_out",), size=(1, 1)),
        Place(_DOUBLE, "mlp_fc1", ("ff.net.0.proj",), ("ff.net.0.proj",), size=(4, 1)),
        Place(_DOUBLE, "mlp_fc2", ("ff.net.2",), ("ff.net.2",), size=(1, 4), gelu=True),
        Place(_DOUBLE, "mlp_context_fc1", ("ff_context.net.0.proj",), ("ff_context.net.0.proj",), size=(4, 1)),
        Place(_DOUBLE, "mlp_context_fc2", ("ff_context.net.2",), ("ff_context.net.2",), size=(1, 4), gelu=True),
        Place(_DOUBLE, "norm1.linear", ("norm1.linear",), turns=6),
        Place(_DOUBLE, "norm1_context.linear", ("norm1_context.linear",), turns=6),
        Place(_SINGLE, "qkv_proj", _qkv("attn."), ("attn.to_qkv",), size=(1, 1)),
        Place(_SINGLE, "mlp_fc1", ("proj_mlp",), size=(4, 1)),
        Place(_SINGLE, "out_proj", ("proj_out",), ("attn.to_out",), half=0, size=(1, 1)),
        Place(_SINGLE, "mlp_fc2", ("proj_out",), half=1, size=(1, 4), gelu=True),
        Place(_SINGLE, "norm.linear", ("norm.linear",), turns=3),
    ),
    "NunchakuFluxTransformer2dModel",
    names=((rf"^({_ANY})\.(norm_(?:added_)?[qk])\.", r"\1.attn.\2."),),
    back=((rf"^({_ANY})\.attn\.(norm_(?:added_)?[qk])\.", r"\1.\2."),),
    old=True,
)
QWEN = Family(
    ("QwenImageTransformer2DModel",),
    (
        Place(_DOUBLE, "attn.to_qkv", _qkv("attn."), size=(1, 1)),
        Place(_DOUBLE, "attn.add_qkv_proj", _qkv("attn.", _ADDED), size=(1, 1)),
        Place(_DOUBLE, "attn.to_out.0", ("attn.to_out.0",), size=(1, 1)),
        Place(_DOUBLE, "attn.to_add_out", ("attn.to_add_out",), size=(1, 1)),
        Place(_DOUBLE, "img_mlp.net.0.proj", ("img_mlp.net.0.proj",), size=(4, 1)),
        Place(_DOUBLE, "img_mlp.net.2", ("img_mlp.net.2",), size=(1, 4), gelu=True),
        Place(_DOUBLE, "txt_mlp.net.0.proj", ("txt_mlp.net.0.proj",), size=(4, 1)),
        Place(_DOUBLE, "txt_mlp.net.2", ("txt_mlp.net.2",), size=(1, 4), gelu=True),
        Place(_DOUBLE, "img_mod.1", ("img_mod.1",), turns=6),
        Place(_DOUBLE, "txt_mod.1", ("txt_mod.1",), turns=6),
    ),
    "NunchakuQwenImageTransformer2DModel",
)
_UNET = r".+\.transformer_blocks\.\d+"
SDXL = Family(
    ("UNet2DConditionModel", "SDXLUNet2DConditionModel"),
    (
        Place(_UNET, "attn1.to_qkv", _qkv("attn1.")),
        Place(_UNET, "attn1.to_out.0", ("attn1.to_out.0",)),
        Place(_UNET, "attn2.to_q", ("attn2.to_q",)),
        Place(_UNET, "attn2.to_out.0", ("attn2.to_out.0",)),
        Place(_UNET, "ff.net.0.proj", ("ff.net.0.proj",)),  # GEGLU: what follows is not shifted
        Place(_UNET, "ff.net.2", ("ff.net.2",)),
    ),
    "NunchakuSDXLUNet2DConditionModel",
)
_LAYER = r"(?:layers|noise_refiner|context_refiner)\.\d+"
Z_IMAGE = Family(
    ("ZImageTransformer2DModel",),
    (
        Place(_LAYER, "attention.to_qkv", _qkv("attention.")),
        Place(_LAYER, "attention.to_out.0", ("attention.to_out.0",)),
        Place(_LAYER, "feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1")),  # value first, then gate
        Place(_LAYER, "feed_forward.net.2", ("feed_forward.w2",)),
    ),
    "NunchakuZImageTransformer2DModel",
)
FAMILIES = (FLUX, QWEN, SDXL, Z_IMAGE)
