"""What tests/tools/fuzz_inputs.py feeds: for each kind of input valid seeds, their mutations, and quantkit's reader.

A reader takes the bytes of one file. Where the kind is a file of a checkpoint, the rest of the directory is sound. What
a reader accepts is used on: a model is planned and laid out, a recipe applied, an importance matrix read to its end.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mutate
from mutate import Piece, string, u32, u64

from quantkit.authoring import clone
from quantkit.authoring.sizes import lock
from quantkit.gguf.header import (  # fmt: skip
    ARRAY,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Header,
    header_bytes,
    kv,
    kv_array,
    pad,
    read_header,
)
from quantkit.imatrix import converting, coverage, merging, report
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.model import demo
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options
from quantkit.model.families.tokenizer import tokenizer_kvs
from quantkit.model.open import describe_stored, open_model
from quantkit.model.sources.safetensors_dir import read_shard
from quantkit.planning.file_layout import lay_out, output_kvs
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load, parse
from quantkit.recipe.named import mixture_recipe, shipped

CONFIG: dict[str, Any] = {
    **demo.CONFIG, "first_k_dense_replace": 1, "hidden_size": 256, "intermediate_size": 512, "kv_lora_rank": 256,
    "moe_intermediate_size": 256, "n_routed_experts": 2, "num_attention_heads": 2, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "num_nextn_predict_layers": 0, "vocab_size": 384,
}  # fmt: skip
KNOWN = Options(pre="deepseek-v3")


class Reader(NamedTuple):
    suffix: str
    """of a file of this kind"""
    mutate: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    """raises a QuantkitError for bytes it does not like"""
    share: int
    """of a thousand cases"""


# ---------------------------------------------------------------- seeds


def gguf_pieces(head: Header, raw: bytes) -> list[Piece]:
    """A GGUF as its fields; `head` is what is written in `raw`."""
    out = [Piece("data", raw[:4]), u32(head.version), u64(len(head.tensors)), u64(len(head.kvs))]
    for item in head.kvs:
        out += [*string(item.key.encode()), u32(item.type), *value_pieces(item.type, item.payload)]
    for t in head.tensors:
        out += [*string(t.name.encode()), u32(len(t.shape)), *map(u64, t.shape), u32(TYPE_IDS[t.type])]
        out.append(u64(t.offset - head.data_offset))
    at = len(mutate.join(out))
    assert raw[:at] == mutate.join(out)
    out.append(Piece("data", raw[at : head.data_offset]))
    data = raw[head.data_offset :]
    return out + [Piece("float", data[i : i + 4]) for i in range(0, len(data), 4)]


def value_pieces(type_: int, payload: bytes) -> list[Piece]:
    """The value at the start of `payload`."""
    if type_ == STRING:
        return string(payload[8 : 8 + struct.unpack_from("<Q", payload)[0]])
    if type_ != ARRAY:
        return [Piece("int", payload)]
    element, count = struct.unpack_from("<IQ", payload)
    out, at = [u32(element), u64(count)], 12
    if element not in (STRING, ARRAY):
        return [*out, Piece("data", payload[12 : 12 + count * SIZES[element]])]
    for _ in range(count):
        inner = value_pieces(element, payload[at:])
        at += len(mutate.join(inner))
        out += inner
    return out


#: ids of the tensor types that the seeds have; bytes of the elements that their arrays have
TYPE_IDS = {"F32": 0, "Q8_0": 8, "BF16": 30}
SIZES = {U16: 2, I32: 4}


def gguf_bytes(kvs: list[Any], tensors: Sequence[tuple[str, tuple[int, ...], str, int]]) -> bytes:
    """A GGUF: (name, ne shape, type, bytes) each."""
    infos, at = [], 0
    for name, shape, type_, nbytes in tensors:
        infos.append((name, shape, type_, at))
        at += pad(nbytes)
    data = struct.pack("<f", 1.5) * (at // 4)
    return header_bytes(kvs, infos) + data


def seed_ggufs() -> Iterator[bytes]:
    name = kv("general.architecture", STRING, "llama")
    small = [("token_embd.weight", (32, 3), "F32", 384), ("blk.0.attn_q.weight", (32, 2), "Q8_0", 68)]
    yield gguf_bytes([name, kv("llama.block_count", U32, 1)], small)
    yield gguf_bytes(
        [
            name, kv("general.name", STRING, "Tiny"), kv("general.alignment", U32, 32), kv("a.u64", U64, 1 << 40),
            kv("a.u8", U8, 3), kv("a.f32", F32, 0.5), kv_array("a.words", STRING, ["a", "bc", ""]),
            kv_array("a.numbers", I32, [1, -2, 3]), kv("llama.block_count", U32, 2),
        ],
        [*small, ("blk.1.ffn_up_exps.weight", (32, 2, 2), "BF16", 256), ("output_norm.weight", (32,), "F32", 128)],
    )  # fmt: skip
    nested = struct.pack("<IQ", ARRAY, 2) + 2 * (struct.pack("<IQ", U16, 2) + bytes(4))
    yield gguf_bytes([name, kv("general.name", STRING, "x")._replace(key="n", type=ARRAY, payload=nested)], small[:1])
    split = [kv("split.no", U16, 0), kv("split.count", U16, 1), kv("split.tensors.count", I32, 2)]
    yield gguf_bytes([name, kv("llama.block_count", U32, 1), *split], small)


def seed_imatrix() -> bytes:
    kvs = [
        kv("general.type", STRING, "imatrix"), kv_array("imatrix.datasets", STRING, ["calib.txt"]),
        kv("imatrix.chunk_count", U32, 3), kv("imatrix.chunk_size", U32, 512),
    ]  # fmt: skip
    tensors: list[tuple[str, tuple[int, ...], str, int]] = []
    for name, n_cols, n_mats in (("blk.0.attn_q.weight", 8, 1), ("blk.0.ffn_up_exps.weight", 4, 3)):
        tensors += [(f"{name}.in_sum2", (n_cols, n_mats), "F32", 4 * n_cols * n_mats)]
        tensors += [(f"{name}.counts", (1, n_mats), "F32", 4 * n_mats)]
    name = "blk.0.attn_q.weight"  # the one with all that a file can have
    tensors += [(f"{name}.in_sum", (8,), "F32", 32), (f"{name}.stats", (12,), "F32", 48)]
    return gguf_bytes(kvs, tensors)


def legacy_pieces() -> list[Piece]:
    out = [u32(3)]
    for name, n in ((b"blk.0.attn_q.weight", 8), (b"blk.0.ffn_up_exps.weight", 12), (b"output.weight", 4)):
        out += [u32(len(name)), Piece("text", name), u32(2), u32(n), *[Piece("float", struct.pack("<f", 0.5))] * n]
    return [*out, u32(3), u32(9), Piece("text", b"calib.txt")]


def seed_shard() -> tuple[dict[str, Any], int]:
    """A safetensors header and the bytes of its data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    tensors: list[tuple[str, str, list[int], int]] = [
        ("a", "F32", [2, 3], 24), ("b.weight", "BF16", [4], 8), ("c", "F8_E4M3", [3, 3], 9), ("d", "I64", [], 8),
        ("e", "U8", [0, 5], 0),
    ]  # fmt: skip
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


RECIPE = """\
name: Small
title: a small one
arch: [deepseek2, llama]
file_type: Q4_K_M
vars: {down: Q6_K}
metadata: {general.author: "str:me"}
otherwise: mixture Q2_K
rules:
  - match: "blk.*.ffn_{gate,up}*.weight"
    layers: "all[:1]"
    type: Q4_K
    why: first
    optional: true
  - {match: "*[a-q]*.weight", type: $down, why: "others", optional: true}
"""
LOCK = """\
version: 1
matrix:
  recipes: [Q4_K_M, "*"]
  models: [all]
  layouts: [kv_b]
cells:

- cell: {recipe: Q4_K_M, model: x, layout: kv_b}
  elements: 120
  tensor_bytes: 300
  file_bytes: 400
  roles: {norm: 100, other: 200}
  types: {F32: 6, Q4_K: 1}
  tensors:
    token_embd.weight: Q4_K
    blk.{0-1,5}.{attn_norm,ffn_norm}.weight: F32

- cell: {recipe: Q9, model: x, layout: kv_b}
  error: cannot be
"""


# ---------------------------------------------------------------- readers


PLAIN = parse(
    "{name: x, arch: [llama, deepseek2, qwen2], file_type: Q4_K_M, rules: [{match: '*', type: Q4_K, why: x}]}", "x.yaml"
)


def use(catalogue: Catalogue) -> None:
    """Go on with what was opened, as `plan` and `build` would."""
    describe_stored(catalogue)
    plan = make_plan(catalogue, PLAIN)
    lay_out(plan, output_kvs(plan, None), 1 << 20)


def use_imatrix(matrix: Imatrix, folder: Path, how: int) -> None:
    """Go on with an importance matrix as `quantkit imatrix` would: look into it, add it to the sound one, convert it,
    which must not change what the quantizer gets."""
    json.dumps(coverage.cover(matrix).to_json())
    if how == 0:
        report.info_text(coverage.cover(matrix), every_tensor=bool(matrix.n_chunks % 2))
    elif how in (1, 2):
        sound = put(folder / "sound.gguf", seed_imatrix())
        merging.merge([open_imatrix(str(sound)), matrix], folder / "made", as_dat=how == 2, replace=True)
        open_imatrix(str(folder / "made")).check()
    elif how in (3, 4):
        converting.convert(matrix, folder / "made", as_dat=how == 3, replace=True)
        other = open_imatrix(str(folder / "made"))
        for name, entry in matrix.entries.items():
            a, b = (m.weights(name, 0, entry.n_values).tobytes() for m in (matrix, other))
            assert a == b, f"{name} is another"


def put(path: Path, raw: bytes, more: int = 0) -> Path:
    """Write a file; `more` bytes of zeros follow."""
    with path.open("wb") as f:
        f.write(raw)
        if more:
            f.truncate(len(raw) + more)
    return path


def readers(folder: Path) -> dict[str, Reader]:
    """All kinds by name; `folder` is for their files, best in memory."""
    model = folder / "Tiny"
    model.mkdir(parents=True, exist_ok=True)
    demo.make_checkpoint(model, CONFIG, 7, 2)
    config, index = (json.loads((model / n).read_text()) for n in ("config.json", "model.safetensors.index.json"))
    tokens, settings = (json.loads((model / n).read_text()) for n in ("tokenizer.json", "tokenizer_config.json"))
    first = model / min(set(index["weight_map"].values()))
    (head_bytes,) = struct.unpack("<Q", first.read_bytes()[:8])
    head = json.loads(first.read_bytes()[8 : 8 + head_bytes])
    data_bytes = first.stat().st_size - 8 - head_bytes
    only_config = folder / "Config" / "config.json"
    only_config.parent.mkdir(exist_ok=True)

    def restored(path: Path, read: Callable[[bytes], object]) -> Callable[[bytes], object]:
        """Put the checkpoint's own file back afterwards."""
        own = path.read_bytes()

        def wrapped(raw: bytes) -> object:
            try:
                return read(raw)
            finally:
                path.write_bytes(own)

        return wrapped

    def whole(name: str) -> Callable[[bytes], object]:
        def read(raw: bytes) -> None:
            put(model / name, raw)
            use(open_model(str(model), KNOWN))

        return restored(model / name, read)

    def read_first(raw: bytes) -> None:
        put(first, raw, data_bytes)
        use(open_model(str(model), KNOWN))

    def read_config(raw: bytes) -> None:
        use(open_model(str(put(only_config, raw)), Options()))

    def read_tokens(name: str) -> Callable[[bytes], object]:
        def read(raw: bytes) -> None:
            put(model / name, raw)
            tokenizer_kvs(model, 384, KNOWN if len(raw) % 4 else Options())

        return restored(model / name, read)

    def read_gguf(raw: bytes) -> None:
        catalogue = open_model(str(put(folder / "x.gguf", raw)))
        how = sum(raw) % 32  # all of them is slow
        if how < 8:
            use(catalogue)
        if how == 0:
            clone.clone(catalogue, "x.gguf", "x")

    def read_imatrix(suffix: str) -> Callable[[bytes], object]:
        def read(raw: bytes) -> None:
            matrix = open_imatrix(str(put(folder / f"im{suffix}", raw)))
            matrix.check()
            for name, entry in matrix.entries.items():
                n_mats = len(entry.counts)
                if matrix.fits(name, entry.n_values // n_mats, n_mats):
                    matrix.weights(name, n_mats - 1, entry.n_values // n_mats)
            use_imatrix(matrix, folder, sum(raw) % 8)

        return read

    target = open_model(str(put(folder / "target.gguf", list(seed_ggufs())[1])))

    def read_recipe(raw: bytes) -> None:
        make_plan(target, load(str(put(folder / "r.yaml", raw))))

    def read_lock(raw: bytes) -> None:
        for cell in lock.read_lock(put(folder / "sizes.yaml", raw)).cells:
            lock.ungroup(cell.tensors)

    ggufs = [gguf_pieces(read_header(put(folder / "seed.gguf", raw)), raw) for raw in seed_ggufs()]
    im_pieces = gguf_pieces(read_header(put(folder / "seed.gguf", seed_imatrix())), seed_imatrix())
    dat = legacy_pieces()
    small, small_bytes = seed_shard()
    recipes = [RECIPE, RECIPE, RECIPE.replace("otherwise: mixture Q2_K\n", "base: Q4_K_M\n"), mixture_recipe("Q4_K_M")]
    other_recipes = [text for text in shipped().values() if len(text) < 4000][:20]

    def shard(rng: random.Random, header: dict[str, Any], data: bytes) -> bytes:
        """A header with its length before it, which is right in most cases."""
        raw = mutate.mutate_json(rng, header)
        pieces = [u64(len(raw)), Piece("data", raw), Piece("data", data)]
        return mutate.mutate_pieces(rng, pieces) if rng.random() < 0.15 else mutate.join(pieces)

    return {
        "gguf": Reader(
            ".gguf", lambda rng: mutate.mutate_pieces(rng, rng.choice(ggufs)), read_gguf, 330
        ),
        "imatrix_gguf": Reader(
            ".gguf", lambda rng: mutate.mutate_pieces(rng, im_pieces), read_imatrix(".gguf"), 190
        ),
        "imatrix_dat": Reader(".dat", lambda rng: mutate.mutate_pieces(rng, dat), read_imatrix(".dat"), 190),
        "shard": Reader(
            ".safetensors", lambda rng: shard(rng, small, bytes(small_bytes)),
            lambda raw: read_shard(put(folder / "x.safetensors", raw)), 200,
        ),
        "config": Reader(".json", lambda rng: mutate.mutate_json(rng, config), read_config, 25),
        "recipe": Reader(
            ".yaml", lambda rng: mutate.mutate_yaml(rng, rng.choice(recipes), other_recipes), read_recipe, 20
        ),
        "lock": Reader(".yaml", lambda rng: mutate.mutate_yaml(rng, LOCK), read_lock, 25),
        "index": Reader(
            ".json", lambda rng: mutate.mutate_json(rng, index), whole("model.safetensors.index.json"), 7
        ),
        "checkpoint": Reader(".safetensors", lambda rng: shard(rng, head, b""), restored(first, read_first), 7),
        "tokenizer": Reader(".json", lambda rng: mutate.mutate_json(rng, tokens), read_tokens("tokenizer.json"), 3),
        "tokenizer_config": Reader(
            ".json", lambda rng: mutate.mutate_json(rng, settings), read_tokens("tokenizer_config.json"), 3
        ),
    }  # fmt: skip


def in_memory() -> Path | None:
    """Where temporary files cost least."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
