"""The general.* keys of a GGUF: name, sampling defaults, size label, license, from a checkpoint's files.

They are found by the `gguf` package, as in the converter.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...base.errors import SourceError
from ...gguf.header import ARRAY, I32, KV, STRING, TYPE_NAMES, kv, kv_array
from ..catalogue import Source, Tensor
from .beside import check_files, folder_name


def general_kvs(arch: str, model: str, tensors: Iterable[Tensor], source: Source | None) -> list[KV]:
    """Return general.architecture, .type, sampling defaults, name, size label, license… from the checkpoint's files.
    Raises SourceError."""
    head = [kv("general.architecture", STRING, arch), kv("general.type", STRING, "model")]
    if source is None:
        return [*head, kv("general.name", STRING, model)]
    import gguf

    check_files(source.path)
    logging.getLogger("metadata").setLevel(logging.ERROR)
    total, shared, expert, n_experts = _count(tensors)
    try:
        metadata = _metadata(source.path, total)
        repetition = gguf.Metadata.load_generation_config(source.path).get("repetition_penalty")
        if metadata.sampling_penalty_repeat is None and repetition is not None:
            metadata.sampling_penalty_repeat = repetition  # the package on PyPI does not yet read this name
        if metadata.name is None:
            metadata.name = folder_name(source.path) or model
        if metadata.size_label is None:
            metadata.size_label = gguf.size_label(total, shared, expert, n_experts)
        writer = gguf.GGUFWriter(None, arch)
        metadata.set_gguf_meta_model(writer)
        return head + [item for item in from_writer(writer) if item.key != "general.architecture"]
    except Exception as e:  # a malformed model card can make the package and struct raise anything
        raise SourceError(
            f"{source.path}: README.md or generation_config.json cannot be taken into the metadata: {one_line(e)}; "
            "mend or remove it"
        ) from None


def _metadata(folder: Path, total: int) -> Any:
    """Return the gguf.Metadata of a folder and its files."""
    import gguf

    metadata = gguf.Metadata.load(None, folder, None, total)
    name = folder_name(folder)
    if name == folder.name:
        return metadata
    card, params = gguf.Metadata.load_model_card(folder), gguf.Metadata.load_hf_parameters(folder)
    named = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, params, Path(name), total)
    for field in fields(metadata):
        if field.name.startswith("sampling_"):
            setattr(named, field.name, getattr(metadata, field.name))
    return named


def one_line(error: Exception) -> str:
    """Return the message of another library's error, shortened to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _count(tensors: Iterable[Tensor]) -> tuple[int, int, int, int]:
    """Count for the size label: all parameters, those outside routed experts, those of one expert, and experts."""
    total = shared = expert = n_sum = n = 0
    for t in tensors:
        total += t.n_elements
        if "_exps." in t.name and len(t.shape) == 3:
            expert += t.n_elements // t.shape[2]
            n_sum += t.shape[2]
            n += 1
        else:
            shared += t.n_elements
    return total, shared, expert, n_sum // n if n else 0


def from_writer(writer: Any) -> list[KV]:
    """Return what a gguf.GGUFWriter has collected, as quantkit's key/values."""
    out = []
    for key, value in writer.kv_data[0].items():
        try:
            if int(value.type) == ARRAY:
                items = list(value.value)
                element = STRING if items and isinstance(items[0], str) else I32
                if value.sub_type is not None:
                    element = int(value.sub_type)
                out.append(kv_array(key, element, items))
            else:
                out.append(kv(key, int(value.type), value.value))
        except (struct.error, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError(f"{key} is {value.value!r:.60}, no {TYPE_NAMES[int(value.type)]}") from None
    return out
