"""From SOURCE on the command line, whatever it is, to a Catalogue.

SOURCE is a checkpoint directory or a GGUF file, local or remote (hf://org/repo, hf://… or https://… of a GGUF: only
headers are read), a config.json, the name of a known model, or the id of a repository downloaded by `hf download`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..base.errors import SourceError, UnsupportedError, did_you_mean
from ..gguf.header import ALIGNMENT, KV, STRING, U32, array_head, decode, is_gguf, is_other_alignment, is_utf8, kv
from ..gguf.pre_tokenizers import PRE_KEY, unknown_pre
from ..gguf.types import IK_TYPES, STORED_TYPES
from ..hub.address import is_hub
from . import families
from .catalogue import Catalogue, MlaLayout, Part, Role, Tensor, is_quantizable, layer_of, output_order, role_of
from .families.beside import folder_name
from .families.known import MODELS
from .families.known import config as known_config
from .families.options import Options
from .families.tokenizer import PAD_KEY, token_id
from .hub import downloaded, open_address
from .sources.gguf_file import GgufFile, GgufHeaders, open_as_far
from .sources.kinds import other_file, other_folder, other_gguf
from .sources.remote import is_remote, open_remote
from .sources.safetensors_dir import Checkpoint, open_checkpoint, open_partial, read_json

_MAX_LAYERS = 4096
_MAX_TITLE = 200


def open_model(source: str, options: Options | None = None) -> Catalogue:
    """Return the catalogue of whatever `source` names. Raises SourceError that suggests a similar name."""
    opts = options or Options()
    if opts.pre is not None and not opts.recognize and (says := unknown_pre(opts.pre)):
        raise SourceError(f"--pre: {says}")
    if is_remote(source):
        return _from_elsewhere(source, opts)
    path = _expand(source)
    if not is_utf8(str(path.absolute())):
        raise SourceError(f"{source!a}: the path gives the model its name, but is not UTF-8; rename the folder or file")
    try:
        if path.is_dir():
            return _from_directory(path, opts)
        if path.is_file():
            if path.suffix == ".json":
                return families.build(folder_name(_folder_of(path)) or source, read_json(path), opts)
            if (says := other_file(path)) and not is_gguf(path):
                raise UnsupportedError(f"{path}: {says}")
            if path.suffix == ".safetensors":
                raise SourceError(f"{path}: is one shard of a checkpoint; give the directory: {_folder_of(path)}")
            return from_gguf(open_as_far(path), opts)
    except OSError as e:
        raise SourceError(f"{source}: cannot be read: {e.strerror or e}") from None
    if source.lower() in MODELS:
        return families.build(source.lower(), known_config(source.lower()), opts)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        found = downloaded(source)
        if found is not None:
            return _from_directory(found, opts)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII):
            raise SourceError(
                f"'{source}' is no directory, no file and not in Hugging Face's cache; to read a repository on the "
                f"Hub, give hf://{source}"
            )
    if path.suffix.lower() in (".gguf", ".safetensors", ".json"):
        try:
            beside = [p.name for p in path.absolute().parent.iterdir() if p.suffix.lower() == path.suffix.lower()]
        except OSError:
            beside = []
        raise SourceError(f"{source}: there is no such file{did_you_mean(path.name, beside)}")
    raise SourceError(
        f"'{source}' is not a directory, file or known model{did_you_mean(source, MODELS)}; give a checkpoint "
        "directory, "
        f"a GGUF, a config.json, or one of {', '.join(MODELS)}"
    )


def _expand(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return Path(source)


def _from_directory(path: Path, options: Options) -> Catalogue:
    if says := other_folder(path):
        raise UnsupportedError(f"{path}: {says}")
    if not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; to read a GGUF, give the file: {ggufs[0]}" if ggufs else ""
        raise SourceError(f"{path}: has no config.json, so it is not a checkpoint directory{hint}")
    try:
        checkpoint = open_checkpoint(path.resolve())
    except SourceError as e:
        if not e.cut:
            raise
        checkpoint = open_partial(path.resolve(), e)
    return _of_checkpoint(checkpoint, options)


def _of_checkpoint(checkpoint: Checkpoint, options: Options) -> Catalogue:
    """Return a checkpoint's catalogue; if its weights cannot be read, `headers` is set instead of `source`."""
    made = families.build(folder_name(checkpoint.path), checkpoint.config, options, checkpoint, checkpoint.named)
    if not checkpoint.lacks:
        return made
    notes = (*made.notes, checkpoint.note) if checkpoint.note else made.notes
    return replace(made, source=None, headers=made.source, lacks=checkpoint.lacks, partial=checkpoint.note, notes=notes)


def _from_elsewhere(source: str, options: Options) -> Catalogue:
    found = open_address(source) if is_hub(source) else open_remote(source)
    made = from_gguf(found, options) if isinstance(found, GgufHeaders) else _of_checkpoint(found, options)
    return replace(made, commit=found.commit, notes=(*made.notes, *commit_note(found)))


def commit_note(found: GgufHeaders | Checkpoint) -> list[str]:
    """What was read on the Hub was so at one commit."""
    return [f"read on the Hub at commit {found.commit}"] if found.commit else []


def _folder_of(file: Path) -> Path:
    """Return the folder of a file. If the file is a link, as in Hugging Face's cache, the link is not followed."""
    return Path(os.path.realpath(file.parent))


def from_gguf(file: GgufHeaders, options: Options | None = None) -> Catalogue:
    """Return the catalogue of a GGUF: its tensors unchanged, sorted as llama-quantize sorts them. Raises SourceError
    for a file that is not a model, and for options that do not apply to a GGUF."""
    kvs = {item.key: item for item in file.kvs}

    def text(key: str) -> str | None:
        return str(decode(kvs[key])) if key in kvs and kvs[key].type == STRING else None

    def number(key: str) -> int | None:
        return int(decode(kvs[key])) if key in kvs and kvs[key].type == U32 else None

    arch_name = text("general.architecture")
    has_tokenizer = "tokenizer.ggml.tokens" in kvs
    says = other_gguf(text("general.type"), arch_name, bool(file.infos), has_tokenizer)
    if says and not (file.infos and arch_name and options is not None and options.any_kind):
        raise UnsupportedError(f"{file.where}: {says}")
    if arch_name is None or not re.fullmatch(r"[\w.-]{1,64}", arch_name):
        what = "has no general.architecture" if arch_name is None else f"general.architecture is {arch_name!r:.60}"
        raise SourceError(f"{file.where}: {what}; it is not a model")
    if not file.infos:
        raise SourceError(f"{file.where}: has no tensors, only metadata; give the file that holds the weights")
    tensors = []
    for info in file.infos:
        n_rows = 1
        for n in info.shape[1:]:
            n_rows *= n
        parts = (Part(info.name, (n_rows, info.shape[0]), 0, n_rows),)
        quantizable = is_quantizable(info.name, info.shape, arch_name)
        tensors.append(
            Tensor(info.name, info.shape, role_of(info.name), layer_of(info.name), quantizable, info.type, parts)
        )
    tensors.sort(key=lambda t: output_order(t.name))
    found = [t.layer for t in tensors if t.layer is not None]
    n_layers = number(f"{arch_name}.block_count") or max(found, default=-1) + 1
    if not all(0 <= n < _MAX_LAYERS for n in (n_layers, *found)):
        odd = next(n for n in (n_layers, *found) if not 0 <= n < _MAX_LAYERS)
        raise SourceError(
            f"{file.where}: layer number or count {odd:,} is beyond {_MAX_LAYERS:,}; the header is corrupt"
        )
    moe = sorted({t.layer for t in tensors if t.layer is not None and t.role == Role.ROUTED_EXPERT})
    dense = sorted(set(found) - set(moe))
    names = {t.name.rpartition(".attn_")[2] for t in tensors}
    layout = (
        MlaLayout.K_B_V_B if "k_b.weight" in names else MlaLayout.KV_B if "kv_b.weight" in names else MlaLayout.AS_IS
    )
    if options is not None and options.layout_given and options.layout != layout:
        raise SourceError(
            f"{file.where}: --layout {options.layout} cannot be had from a GGUF, whose tensors stay as they are (here: "
            f"{layout}); leave it out, or give the checkpoint"
        )
    out_kvs, notes = _with_options(file, kvs, options or Options())
    notes = (*notes, f"it {says}") if says else notes
    notes = (*notes, file.note) if file.note else notes
    weights = file if isinstance(file, GgufFile) else None
    name = text("general.name") or ""
    name = name if name.isprintable() and 0 < len(name) <= _MAX_TITLE else file.stem
    return Catalogue(
        name, arch_name, layout, n_layers, tuple(dense), tuple(moe), tuple(tensors), out_kvs, True,
        None if file.lacks else weights, (*notes, *_notes(file)),
        headers=weights if file.lacks else None, lacks=file.lacks, partial=file.note,
    )  # fmt: skip


def _with_options(file: GgufHeaders, kvs: dict[str, KV], options: Options) -> tuple[tuple[KV, ...], tuple[str, ...]]:
    """Return a GGUF's keys with --pre and --pad-token applied, and notes. Raises SourceError if they do not apply."""

    def text(key: str) -> str | None:
        return str(decode(kvs[key])) if key in kvs and kvs[key].type == STRING else None

    kind = text("tokenizer.ggml.model")
    wanted: list[KV] = []
    if options.pre is not None and not options.recognize:
        if kind != "gpt2":
            what = "it has no tokenizer" if kind is None else f"its tokenizer, {kind!r:.60}, has no pre-tokenizer"
            raise SourceError(f"{file.where}: --pre {options.pre} means nothing here: {what}; leave it out")
        wanted.append(kv(PRE_KEY, STRING, options.pre))
    if options.pad_token is not None:
        tokens = kvs.get("tokenizer.ggml.tokens")
        if tokens is None or array_head(tokens)[0] != "str":
            what = f"--pad-token {options.pad_token!r:.60} means nothing here: it has no tokenizer"
            raise SourceError(f"{file.where}: {what}; leave it out")
        wanted.append(kv(PAD_KEY, U32, token_id(file.where, [str(t) for t in decode(tokens)], options.pad_token)))
    changed = {item.key: item for item in wanted}
    out = [changed.pop(item.key, item) for item in file.kvs]
    pre = text(PRE_KEY)
    if kind == "gpt2" and pre is not None and not any(item.key == PRE_KEY for item in wanted):
        says = unknown_pre(pre)
        if says:
            return (*out, *changed.values()), (f"{PRE_KEY} is {pre!r:.60}: {says}; --pre names another",)
    return (*out, *changed.values()), ()


def _notes(file: GgufHeaders) -> Iterator[str]:
    """Yield what is unusual about a readable GGUF."""
    foreign = Counter(info.type for info in file.infos if info.type in IK_TYPES)
    if foreign:
        n, kinds = sum(foreign.values()), ", ".join(sorted(foreign))
        yield (
            f"{n:,} tensor{'s are' if n > 1 else ' is'} of types that only ik_llama.cpp has ({kinds}): the file "
            "can be looked at, verified, split and merged here, but nothing can be built from it"
        )
    aligned = [decode(item) for item in file.kvs if is_other_alignment(item)]
    if aligned:
        yield f"general.alignment is {aligned[0]}; what is built from this has the usual {ALIGNMENT}, without that key"


def describe_stored(catalogue: Catalogue) -> dict[str, tuple[int, int]]:
    """Return how a source stores its tensors, including scales and left-out layers: dtype -> (tensors, bytes)."""
    source = catalogue.source or catalogue.headers
    counts: dict[str, tuple[int, int]] = {}
    if source is None and catalogue.kvs_complete:  # a remote GGUF
        for t in catalogue.tensors:
            n, nbytes = counts.get(t.source_type, (0, 0))
            counts[t.source_type] = (n + 1, nbytes + STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows)
    stored = [(st.dtype, st) for st in getattr(source, "tensors", {}).values()]
    stored += [(f"{st.dtype} (scale)", st) for st in getattr(source, "scales", {}).values()]
    for kind, st in stored:
        n, nbytes = counts.get(kind, (0, 0))
        counts[kind] = (n + 1, nbytes + st.nbytes)
    return dict(sorted(counts.items()))
