"""What families share about tensors: making those of the output, and checking those of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ...base.errors import SourceError, UnsupportedError
from ..catalogue import UNREAD, Part, SourceTensor, Tensor, is_quantizable, layer_of, output_order, role_of

FILE_TYPE_BF16 = 32
#: limits on what config.json may claim, checked before a catalogue is made of it; far beyond any model
MAX_LAYERS, MAX_HEADS, MAX_PARTS = 1024, 4096, 1 << 17
_MAX_WEIGHTS = 1 << 50
_DTYPES = ("F8_E4M3", "BF16", "F16", "F32")
#: buffers in old checkpoints that a converter drops, too
_DROPPED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_IS_IT = "is this config.json the one of the checkpoint?"


def assembled(name: str, ne: tuple[int, ...], parts: tuple[Part, ...]) -> Tensor:
    """Return an output tensor of (ne) shape from its parts: BF16, or F32 if never quantized, as a converter has it."""
    quantizable = is_quantizable(name, ne)
    return Tensor(name, ne, role_of(name), layer_of(name), quantizable, "BF16" if quantizable else "F32", parts)


def whole(name: str, source: str, *shape: int) -> Tensor:
    """Return one source tensor, of row-major `shape`, unchanged."""
    return assembled(name, tuple(reversed(shape)), (Part(source, shape, 0, shape[0] if len(shape) > 1 else 1),))


def in_order(model: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Sort tensors as llama-quantize does. Raises SourceError if they have more weights than any model."""
    out = sorted(tensors, key=lambda t: output_order(t.name))
    total = sum(t.n_elements for t in out)
    if total > _MAX_WEIGHTS:
        raise SourceError(f"{model}: config.json: its sizes make {total:,} weights, more than any model has")
    return out


def check_stored(
    model: str,
    what: str,
    wanted: Iterable[Tensor],
    stored: Mapping[str, SourceTensor],
    unused: Collection[str] = (),
    beyond: int | None = None,
) -> list[int]:
    """Check that the checkpoint has what the config promises, in the promised shapes, and nothing else. Raises
    SourceError, UnsupportedError. `what` describes the model in messages. Tensors named in `unused` may exist, and
    those of layers from `beyond` on, if given. Returns the layer of each of the latter."""
    needed: dict[str, tuple[int, ...]] = {p.source: p.shape for t in wanted for p in t.parts}
    for name, shape in needed.items():
        st = stored.get(name)
        if st is None:
            raise SourceError(
                f"{model}: tensor '{name}' {list(shape)} is in no shard, though config.json calls for it; {_IS_IT}"
            )
        if st.dtype == UNREAD:
            continue
        if st.shape != shape:
            raise SourceError(
                f"{st.file}: '{name}' has the shape {list(st.shape)}, but config.json calls for {list(shape)}; {_IS_IT}"
            )
        if st.dtype not in _DTYPES:
            raise UnsupportedError(f"{st.file}: '{name}' is {st.dtype}; weights are read as F8_E4M3, BF16, F16 or F32")
    left_out = []
    for name in sorted(stored.keys() - needed.keys()):
        m = _LAYER.match(name)
        if m and beyond is not None and int(m.group(1)) >= beyond:
            left_out.append(int(m.group(1)))
        elif not name.endswith(_DROPPED) and name not in unused:
            raise SourceError(
                f"{stored[name].file}: tensor '{name}' {list(stored[name].shape)} has no place in {what}; {_IS_IT}"
            )
    return left_out
