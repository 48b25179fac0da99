"""How a checkpoint's FP8 weights are scaled, from config.json and hf_quant_config.json: what llama.cpp's converter
reads (conversion/base.py, dequant_model), by each of the names it has.

    method               scale of X.weight       shape
    fp8                  X.weight_scale_inv      a block of weight_block_size; without one: a tensor, or a row
    modelopt             X.weight_scale          a tensor, or a row
    compressed-tensors   X.weight_scale          a block of block_structure; without one: a row

Whatever else is quantized is refused by its own name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ...base.errors import SourceError, UnsupportedError
from ..catalogue import SourceTensor

SCALE_INV, SCALE = "_scale_inv", "_scale"
#: what ModelOpt writes beside config.json
MODELOPT_CONFIG = "hf_quant_config.json"
_DEFAULT_BLOCK = (128, 128)
#: more than any dimension: a block that has all columns, or all rows
_ALL = 1 << 30
_NAMES = {
    "aqlm": "AQLM", "awq": "AWQ", "bitnet": "BitNet", "bitsandbytes": "bitsandbytes", "eetq": "EETQ", "exl2": "EXL2",
    "fbgemm_fp8": "FBGEMM FP8", "gptq": "GPTQ", "hqq": "HQQ", "mxfp4": "MXFP4", "quanto": "Quanto", "quark": "Quark",
    "spqr": "SpQR", "torchao": "torchao", "vptq": "VPTQ",
}  # fmt: skip
_READS = "quantkit reads FP8 (E4M3) and unquantized checkpoints"
#: the converter reads these too, so there is a way
_CONVERTED = ("bitnet", "gptq", "compressed-tensors", "modelopt", "mxfp4")
_TAKE_BF16 = "get the weights it was made from"
_CONVERT = "convert it with convert_hf_to_gguf.py --outtype bf16 and give the GGUF, or get the weights it was made from"


class Scheme(NamedTuple):
    """How FP8 weights are scaled."""

    suffix: str
    """of a scale's name, after its weight's"""
    block: tuple[int, int] | None
    """rows and columns of a scale; None: a scale a tensor, or a row"""
    stated: bool = True
    """config.json has the block, or says that there is none"""
    unused: tuple[str, ...] = ()
    """suffixes of tensors that only a kernel with quantized activations or caches needs"""


def read_scheme(folder: Path, config: Mapping[str, Any], modelopt: Mapping[str, Any] | None) -> Scheme:
    """The scheme of a checkpoint; `modelopt` is what hf_quant_config.json holds, if it is there. Raises SourceError,
    and UnsupportedError for what is no FP8 of these."""
    where = f"{folder}/config.json"
    quant = config.get("quantization_config")
    if quant is None:
        quant = {}
    if not isinstance(quant, dict):
        raise SourceError(f"{where}: quantization_config is {quant!r:.80}, not an object")
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx and not quant:
        raise _other(where, "MLX has it", "")
    method = quant.get("quant_method")
    if method is None and (quant.get("load_in_4bit") or quant.get("load_in_8bit")):
        method = "bitsandbytes"
    if modelopt is not None and method in (None, "modelopt"):
        inner = modelopt.get("quantization")
        return _modelopt(f"{folder}/{MODELOPT_CONFIG}", {**quant, **(inner if isinstance(inner, dict) else {})})
    if method == "modelopt":
        return _modelopt(where, quant)
    if method in (None, "fp8"):
        return _fp8(where, quant)
    if method == "compressed-tensors":
        return _compressed_tensors(where, quant)
    name = _NAMES.get(method, repr(method)[:80]) if isinstance(method, str) else repr(method)[:80]
    bits = quant.get("bits", quant.get("w_bit"))
    raise _other(where, f"{name}{f' of {bits} bits' if type(bits) is int else ''}", method)


def _other(where: str, name: str, method: object) -> UnsupportedError:
    way = _CONVERT if method in _CONVERTED else _TAKE_BF16
    return UnsupportedError(f"{where}: the checkpoint is quantized as {name}; {_READS}: {way}")


def _fp8(where: str, quant: Mapping[str, Any]) -> Scheme:
    fmt = quant.get("fmt", "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise _other(where, f"FP8 in the format {fmt!r:.80}", "fp8")
    unused = (".activation_scale", "_activation_scale")
    block = quant.get("weight_block_size", _DEFAULT_BLOCK)
    if block is None:
        return Scheme(SCALE_INV, None, unused=unused)
    return Scheme(SCALE_INV, _pair(where, "weight_block_size", block), "weight_block_size" in quant, unused)


def _modelopt(where: str, quant: Mapping[str, Any]) -> Scheme:
    algorithm = quant.get("quant_algo")
    if algorithm is not None and not (isinstance(algorithm, str) and algorithm.startswith("FP8")):
        raise _other(where, f"ModelOpt's {algorithm!r:.80}", "modelopt")
    return Scheme(SCALE, None, unused=(".input_scale", ".k_scale", ".v_scale"))


def _compressed_tensors(where: str, quant: Mapping[str, Any]) -> Scheme:
    form, groups = quant.get("format"), quant.get("config_groups")
    method = "compressed-tensors"
    if form not in ("float-quantized", "naive-quantized") or not isinstance(groups, dict):
        raise _other(where, f"compressed-tensors in the format {form!r:.80}", method)
    if len(groups) != 1:
        raise _other(where, f"compressed-tensors in {len(groups)} groups", "")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise SourceError(f"{where}: quantization_config.config_groups has no weights object; get it again")
    kind = weights.get("type"), weights.get("num_bits")
    if kind != ("float", 8):
        raise _other(where, f"compressed-tensors of {kind[1]!r:.20}-bit {kind[0]!r:.20}", method)
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if strategy not in ("channel", "block") or weights.get("group_size") is not None:
        raise _other(where, f"compressed-tensors with the strategy {strategy!r:.80}", "")
    return Scheme(SCALE, None if block is None else _pair(where, "block_structure", block))


def _pair(where: str, key: str, block: object) -> tuple[int, int]:
    pair = tuple(block) if isinstance(block, list | tuple) else ()
    if len(pair) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in pair):
        raise SourceError(f"{where}: {key} is {block!r:.80}, not two positive integers")
    return pair[0], pair[1]


class Scales(NamedTuple):
    """The scales of the FP8 weights."""

    block: tuple[int, int]
    """rows and columns of one"""
    of: dict[str, SourceTensor]
    """by the weight's name, each with the shape [ceil(rows/block), ceil(cols/block)]"""
    rest: dict[str, SourceTensor]
    """the other tensors, without those that are not used"""


def is_weight(scheme: Scheme, name: str) -> bool:
    """Whether a tensor is neither a scale nor one that is not used."""
    is_scale = name.endswith(f"weight{scheme.suffix}" if scheme.suffix == SCALE else scheme.suffix)
    return not is_scale and not name.endswith(scheme.unused or ("\0",))


def sorted_out(scheme: Scheme, tensors: Mapping[str, SourceTensor]) -> Scales:
    """Weights and scales of a checkpoint apart, the shapes of the scales checked. Raises SourceError."""
    packed = next((t for name, t in tensors.items() if name.endswith(".qweight")), None)
    if packed is not None:
        raise _other(f"{packed.file}: '{packed.name}'", "GPTQ or AWQ", "")
    found, rest = {}, {}
    for name, tensor in tensors.items():
        # `_scale` is the end of many a name, and only a weight's is one
        if name.endswith(f"weight{scheme.suffix}" if scheme.suffix == SCALE else scheme.suffix):
            found[name.removesuffix(scheme.suffix)] = tensor
        elif not name.endswith(scheme.unused or ("\0",)):
            rest[name] = tensor
    block = scheme.block
    if block is not None and not scheme.stated and found and all(_is_scalar(t) for t in found.values()):
        block = None
    if block is not None:
        return Scales(block, found, rest)
    of_tensors = [t for t in found.values() if _is_scalar(t)]
    of_rows = [t for t in found.values() if not _is_scalar(t)]
    # a matrix of a single row has a scale that is both
    if of_rows and any(rest[n].shape[:1] != (1,) for n, t in found.items() if _is_scalar(t) and n in rest):
        raise UnsupportedError(
            f"{of_rows[0].file}: scale '{of_rows[0].name}' has the shape {list(of_rows[0].shape)}, and "
            f"'{of_tensors[0].name}' is a single number; quantkit reads a checkpoint with either kind: {_TAKE_BF16}"
        )
    flat = {n: t._replace(shape=_flat(t.shape)) for n, t in found.items()}
    return Scales((1, _ALL) if of_rows else (_ALL, _ALL), flat, rest)


def _is_scalar(tensor: SourceTensor) -> bool:
    return len(tensor.shape) < 3 and prod(tensor.shape) == 1


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[], [1], [rows] as [1, 1], [rows, 1]; what has more dimensions stays."""
    return (*shape, 1, 1)[:2] if len(shape) < 2 else shape


def other_scale(name: str, tensors: Collection[str]) -> str | None:
    """The scale of a weight by a name that another scheme has, if it is among the tensors."""
    base = name.removesuffix("weight")
    candidates = (f"{name}_scale", f"{name}_scale_inv", f"{base}scale", f"{base}qscale_weight", f"{base}scales")
    return next((c for c in candidates if c in tensors), None)
