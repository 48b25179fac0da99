"""What a folder or file is that is no checkpoint in safetensors: a sentence that says so, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

_CONVERT = "convert it with convert_hf_to_gguf.py --outtype bf16, and give the GGUF"
#: weights in formats of other libraries
_OTHERS = {
    ".bin": "PyTorch's pickle format", ".pt": "PyTorch's pickle format", ".pth": "PyTorch's pickle format",
    ".ckpt": "PyTorch's pickle format", ".h5": "TensorFlow's format", ".msgpack": "Flax's format",
    ".onnx": "ONNX's format", ".npz": "NumPy's format",
}  # fmt: skip
#: beside weights, and none themselves
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt")


def other_folder(path: Path) -> str | None:
    """What a folder is, if it is known and no checkpoint in safetensors: to follow its name. Raises OSError."""
    return other_names({p.name for p in path.iterdir()}, path)


def other_names(has: set[str], path: Path) -> str | None:
    """The same by the names of what is in a folder; `path` is where it lies, if it lies here."""
    weights = {name for name in has if name.endswith(".safetensors") and not name.startswith("adapter_model")}
    if "model_index.json" in has:
        return "is a pipeline of diffusers (model_index.json), which makes images; quantkit converts models of text"
    if "adapter_config.json" in has and not weights:
        return f"is a LoRA adapter{_base(path / 'adapter_config.json')}, not a model; {_MERGE} and give that"
    if "modules.json" in has:
        return (
            "is a model of sentence-transformers (modules.json), which embeds text; quantkit converts models that "
            f"write it: {_CONVERT}"
        )
    if weights:
        return None
    if "params.json" in has:
        return (
            "holds a model as its maker trained it (params.json), not in Hugging Face's form; get the release with "
            "config.json and model.safetensors"
        )
    for name in sorted(has - set(_NO_WEIGHTS)):
        form = _OTHERS.get(Path(name).suffix)
        if form is not None:
            return f"has its weights in {form} ({name}), and quantkit reads safetensors; {_CONVERT}"
    return None


def other_file(path: Path) -> str | None:
    """The same of a single file, by its name."""
    if path.name.startswith("adapter_model"):
        return f"is a LoRA adapter{_base(path.with_name('adapter_config.json'))}, not a model; {_MERGE} and give that"
    form = _OTHERS.get(path.suffix)
    if form is None:
        return None
    return f"is in {form}, and quantkit reads GGUF and safetensors; of a model's weights, {_CONVERT}"


_MERGE = "merge it into that (peft's merge_and_unload, then save_pretrained)"


def _base(config: Path) -> str:
    """' for MODEL', if a file of peft's says so."""
    try:
        base = json.loads(config.read_bytes()[: 1 << 20])["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return f" for {base:.200}" if isinstance(base, str) and base else ""


def other_gguf(kind: str | None, arch: str | None, has_tensors: bool, has_tokenizer: bool) -> str | None:
    """What a GGUF is that is no model, from its general.type and general.architecture."""
    if kind == "imatrix":
        return "is an importance matrix, not a model; give it with --imatrix"
    if kind == "adapter":
        return "is a LoRA adapter, not a model; llama.cpp takes it beside one (--lora) as it is"
    if kind == "mmproj" or arch == "clip":
        return (
            "is a projector of images or sound (mmproj), not a model; llama.cpp takes it beside one (--mmproj) as it is"
        )
    if arch == "controlvector":
        return "is a control vector, not a model; llama.cpp takes it beside one (--control-vector) as it is"
    if not has_tensors and has_tokenizer:
        return "is a vocabulary without weights (convert_hf_to_gguf.py --vocab-only); give the file that holds them"
    return None
