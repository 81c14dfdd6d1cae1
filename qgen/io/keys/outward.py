"""diffusers' names to the original layout, part by part: what ComfyUI wants. Parts of a fused layer wait for each other, no others do."""

__all__ = ["original", "outward"]

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from qgen.errors import BadCheckpoint
from qgen.io.keys.fused import joined, picked
from qgen.io.parts import Parts
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.floats import dequantized
from qgen.registry import Registry


@dataclass(frozen=True)
class Place:
    """Where a module's tensors go. path: in the original layout. order: (number, of how many) in a fused layer, or None.

    swapped: whether the halves of its rows change places. leaf: another word for "weight".
    """

    path: str
    order: tuple[int, int] | None = None
    swapped: bool = False
    leaf: str = "weight"


outward: Registry[Callable[[str], Place]] = Registry("original layout", "qgen.io.keys")


def original(parts: Iterable[Layer | Plain], kind: str) -> Parts:
    """Parts of a diffusers model under the names of its original layout.

    kind: class of the model. ValueError if its original layout is not known, BadCheckpoint for parts that are not the model's.
    """
    if kind not in outward:
        raise ValueError(
            f"no original layout is known for {kind or 'a model of unknown class'}; known: {', '.join(outward)}. Convert the model's "
            "original single file instead: qgen convert FILE --to …"
        )
    return Parts(_renamed(parts, outward[kind], kind), getattr(parts, "__length_hint__", lambda: 0)())


def _renamed(parts: Iterable[Layer | Plain], place_of: Callable[[str], Place], kind: str) -> Iterator[Layer | Plain]:
    waiting: dict[str, dict[int, Layer]] = {}
    loose: dict[tuple[str, str], dict[int, Plain]] = {}
    for part in parts:
        path, leaf = (part.path, "") if isinstance(part, Layer) else _split(part.name)
        try:
            place = place_of(path)
        except KeyError:
            raise BadCheckpoint(f"{path!r} is no part of {kind}; is the checkpoint of another architecture?") from None
        if isinstance(part, Layer):
            part = _swapped(part, place.path) if place.swapped else replace(part, path=place.path)
            if place.order is None:
                yield part
                continue
            group = waiting.setdefault(place.path, {})
            group[place.order[0]] = part
            if len(group) == place.order[1]:
                yield from joined(place.path, [group[i] for i in sorted(waiting.pop(place.path))])
            elif any(key[0] == place.path for key in loose):
                yield from _mixed(place, waiting, loose)
            continue
        tensor = torch.cat(part.tensor.chunk(2)[::-1]) if place.swapped else part.tensor
        part = Plain(f"{place.path}.{place.leaf if leaf == 'weight' else leaf}", tensor, part.note)
        if place.order is None:
            yield part
            continue
        group = loose.setdefault((place.path, leaf), {})
        group[place.order[0]] = part
        if len(group) == place.order[1]:
            whole = torch.cat([group[i].tensor for i in sorted(group)])
            del loose[place.path, leaf]
            yield Plain(part.name, whole, part.note)
        elif place.path in waiting:
            yield from _mixed(place, waiting, loose)
    for path in [*waiting, *(path for path, _ in loose)]:
        raise BadCheckpoint(f"{path!r} cannot be put together: some of its parts are not there")


def _mixed(place: Place, waiting: dict, loose: dict) -> Iterator[Plain]:
    """A fused layer of which some parts are packed and some are float: all become float, once they are there."""
    layers, weights, biases = (
        waiting.get(place.path, {}),
        loose.get((place.path, "weight"), {}),
        loose.get((place.path, "bias"), {}),
    )
    if len(layers) + len(weights) < place.order[1]:
        return
    made = {i: dequantized(layer) for i, layer in layers.items()}
    want_bias = bool(biases) or any(bias is not None for _, bias in made.values())
    if want_bias and len(biases) < len(weights):
        return
    dtype = next(iter(layers.values())).dtype
    weight = [made[i][0] if i in made else weights[i].tensor.float() for i in range(place.order[1])]
    yield Plain(
        f"{place.path}.weight", torch.cat(weight).to(dtype), "dequantized: other parts of the fused layer are float"
    )
    if want_bias:
        both = [made[i][1] if i in made else biases[i].tensor for i in range(place.order[1])]
        both = [torch.zeros(len(w)) if b is None else b.float() for w, b in zip(weight, both, strict=True)]
        yield Plain(f"{place.path}.bias", torch.cat(both).to(dtype))
    for store, key in ((waiting, place.path), (loose, (place.path, "weight")), (loose, (place.path, "bias"))):
        store.pop(key, None)


def _swapped(layer: Layer, path: str) -> Layer:
    half = layer.shape[0] // 2
    return picked(layer, torch.cat([torch.arange(half, layer.shape[0]), torch.arange(half)]), path)


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf
