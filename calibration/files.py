"""Recorded calls in one safetensors file: tensors that calls share are stored once; files from strangers are checked."""

__all__ = ["load", "save"]

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qgen.calibration.base import CalibrationSet, Call, Moment, _map
from qgen.errors import BadCheckpoint

_VERSION = 1  # files without texts are read as well


def save(calibration: CalibrationSet, path: str | Path) -> None:
    """Writes recorded calls to one safetensors file; tensors that calls share are stored once. Other arguments must be JSON."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def stash(t: Tensor) -> dict:
        if id(t) not in names:
            names[id(t)] = f"t{len(names)}"
            tensors[names[id(t)]] = t.detach().contiguous().clone()
        return {"tensor": names[id(t)]}

    def row(call: Call) -> dict:
        return {
            "args": _map(call.args, stash),
            "kwargs": _map(call.kwargs, stash),
            "moment": asdict(call.moment),
            "output": None if call.output is None else stash(call.output),
        }

    rows, texts = ([row(call) for call in some] for some in (calibration.calls, calibration.texts))
    header = json.dumps({"version": _VERSION, "origin": calibration.origin, "calls": rows, "texts": texts})
    temporary = Path(path).with_suffix(".tmp")
    save_file(tensors, temporary, {"qgen_calibration": header})
    temporary.replace(path)


def load(path: str | Path) -> CalibrationSet:
    """Reads what `save` wrote; BadCheckpoint if the file is anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["qgen_calibration"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["version"] != _VERSION:
            raise BadCheckpoint(f"{path}: recorded calls of version {header['version']}, this qgen reads {_VERSION}")
        calls, texts = (
            tuple(_call(row, tensors) for row in rows) for rows in (header["calls"], header.get("texts", []))
        )
        if not isinstance(header["origin"], str):
            raise ValueError("its origin is no text")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: not a file of recorded calls ({error})") from None
    return CalibrationSet(calls, header["origin"], texts=texts)


def _call(row: dict, tensors: dict[str, Tensor]) -> Call:
    """One call out of the header of a file that nobody vouches for."""
    args, kwargs, output = (_unstash(row[name], tensors) for name in ("args", "kwargs", "output"))
    if not isinstance(args, list) or not isinstance(kwargs, dict) or not (output is None or isinstance(output, Tensor)):
        raise ValueError("a call is a list of arguments, an object of named ones and an output")
    moment = Moment(**row["moment"])
    kinds = {"sample": int, "step": int, "t": float, "log_snr": float, "branch": str, "held": bool}
    for name, value in asdict(moment).items():
        if not (isinstance(value, kinds[name]) or (kinds[name] is float and (value is None or type(value) is int))):
            raise ValueError(f"{name} of a call is {kinds[name].__name__}, found {value!r}")
    return Call(tuple(args), kwargs, moment, output)


def _unstash(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if set(value) == {"tensor"}
            else {k: _unstash(v, tensors) for k, v in value.items()}
        )
    return [_unstash(v, tensors) for v in value] if isinstance(value, list) else value


# A folder without __init__.py has no place for functions, so the public verbs are hung on it here (`record` in qgen/engine.py).
for _verb in (save, load):
    setattr(sys.modules["qgen.calibration"], _verb.__name__, _verb)
