"""`quantkit verify` catches and names planted damage, in one file and in shards."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
from checking import (
    DOWN,
    GATE,
    MIX,
    UP,
    Infos,
    assert_found,
    check,
    expert,
    info_of,
    outcome_of,
    poke,
    reshape,
    rewrite,
    set_key,
)
from small_builds import OPTIONS, build, plan_of

from quantkit.gguf.header import BOOL, KV, STRING, U16, U32, TensorInfo, header_bytes, kv, read_header
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan
from quantkit.verifying import manifest


@pytest.fixture
def shards(sound_set: Path, tmp_path: Path) -> list[Path]:
    """A copy of `sound_set` to damage."""
    return sorted(Path(shutil.copytree(sound_set, tmp_path / "split")).glob("*.gguf"))


# ---------------------------------------------------------------- one file


def swap(path: Path, a: TensorInfo | tuple[int, int], b: TensorInfo | tuple[int, int]) -> None:
    """Exchange two stretches (offset, bytes) of a file."""
    (p, n), (q, m) = ((x.offset, x.nbytes) if isinstance(x, TensorInfo) else x for x in (a, b))
    assert n == m
    blob = path.read_bytes()
    poke(path, p, blob[q : q + n])
    poke(path, q, blob[p : p + n])


def entry(path: Path, name: str) -> int:
    """Offset of a tensor's entry in the header."""
    raw = name.encode()
    return path.read_bytes().index(struct.pack("<Q", len(raw)) + raw)


def after_name(path: Path, name: str, field: str) -> int:
    """Offset of a field in a tensor's entry."""
    at = entry(path, name) + 8 + len(name)
    n: int = struct.unpack_from("<I", path.read_bytes(), at)[0]
    return {"dims": at, "shape": at + 4, "type": at + 4 + 8 * n, "offset": at + 8 + 8 * n}[field]


def padded(path: Path) -> TensorInfo:
    return next(t for t in read_header(path).tensors if t.nbytes % 32)


def insert(path: Path, at: int, raw: bytes) -> None:
    blob = path.read_bytes()
    path.write_bytes(blob[:at] + raw + blob[at:])


def exchange_names(kvs: list[KV], infos: Infos) -> None:
    i, j = (next(k for k, t in enumerate(infos) if t[0] == n) for n in (GATE, UP))
    infos[i], infos[j] = (UP, *infos[i][1:]), (GATE, *infos[j][1:])


def exchange_offsets(kvs: list[KV], infos: Infos) -> None:
    i, j = (next(k for k, t in enumerate(infos) if t[0] == n) for n in (GATE, UP))
    infos[i], infos[j] = (*infos[i][:3], infos[j][3]), (*infos[j][:3], infos[i][3])


def retype(name: str, type_: str) -> Callable[[list[KV], Infos], None]:
    def change(_kvs: list[KV], infos: Infos) -> None:
        i = next(k for k, t in enumerate(infos) if t[0] == name)
        infos[i] = (name, infos[i][1], type_, infos[i][3])

    return change


def move(name: str, by: int) -> Callable[[list[KV], Infos], None]:
    def change(_kvs: list[KV], infos: Infos) -> None:
        i = next(k for k, t in enumerate(infos) if t[0] == name)
        infos[i] = (*infos[i][:3], infos[i][3] + by)

    return change


def drop_last_tensor(path: Path) -> None:
    n = read_header(path).tensors[-1].nbytes
    rewrite(path, lambda _kvs, infos: infos.pop())
    path.write_bytes(path.read_bytes()[: -(n + -n % 32)])


def shift_rows(path: Path, name: str) -> None:
    """Move each row of a tensor one place further, the last one to the front."""
    t = info_of(path, name)
    n_rows = int(np.prod(t.shape[1:]))
    rows = np.frombuffer(path.read_bytes()[t.offset : t.offset + t.nbytes], np.uint8).reshape(n_rows, -1)
    poke(path, t.offset, np.roll(rows, 1, axis=0).tobytes())


def zero_row(path: Path, name: str, row: int) -> None:
    t = info_of(path, name)
    n = t.nbytes // int(np.prod(t.shape[1:]))
    poke(path, t.offset + row * n, bytes(n))


def token_changed(path: Path) -> None:
    raw = b"<t9>" if b"<t9>" in path.read_bytes() else None
    item = next(i for i in read_header(path).kvs if i.key == "tokenizer.ggml.tokens")
    at = path.read_bytes().index(item.payload)
    assert raw is None or at
    # the first byte of the first token's text, after the element type (4), count (8) and length (8)
    factory.flip(path, at + 20, 1)


def key_twice(path: Path) -> None:
    h = read_header(path)
    kvs = [*h.kvs, h.kvs[0]]
    infos = [(t.name, t.shape, t.type, t.offset - h.data_offset) for t in h.tensors]
    path.write_bytes(header_bytes(kvs, infos) + path.read_bytes()[h.data_offset :])


#: name of the damage -> (the function that makes it, the kind of the finding, its text)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a bit of a 2-bit grid block": (
        lambda p: factory.flip(p, expert(p, DOWN, 2)[0] + 66 * 17 + 30, 3),
        "row",
        r"blk\.1\.ffn_down_exps\.weight: row 529 \(expert 2, its row 17\), block 0 of 1: IQ2_XXS bytes",
    ),
    "a bit of a K-quant": (
        lambda p: factory.flip(p, info_of(p, "blk.0.ffn_up.weight").offset + 144 * 3 + 50),
        "row",
        r"blk\.0\.ffn_up\.weight: row 3, block 0",
    ),
    "a bit of a norm": (
        lambda p: factory.flip(p, info_of(p, "output_norm.weight").offset + 4 * 7),
        "row",
        r"output_norm\.weight: row 0, column 7",
    ),
    "a bit of an F16 value": (
        lambda p: factory.flip(p, info_of(p, "token_embd.weight").offset + 2 * 300),
        "row",
        r"token_embd\.weight: row 1, column 44",
    ),
    "a bit of a BF16 value": (
        lambda p: factory.flip(p, info_of(p, "blk.2.attn_kv_a_mqa.weight").offset),
        "row",
        r"attn_kv_a_mqa\.weight: row 0, column 0",
    ),
    "a bit of a transposed tensor": (
        lambda p: factory.flip(p, info_of(p, "blk.0.attn_k_b.weight").offset + 5, 2),
        "row",
        r"blk\.0\.attn_k_b\.weight: row 0 \(matrix 0",
    ),
    "the last bit of the last tensor": (
        lambda p: factory.flip(p, read_header(p).tensors[-1].offset + read_header(p).tensors[-1].nbytes - 1, 7),
        "row",
        r"blk\.2\.",
    ),
    "two tensors exchanged": (
        lambda p: swap(p, info_of(p, GATE), info_of(p, UP)),
        "row",
        r"blk\.1\.ffn_(gate|up)_exps",
    ),
    "two names exchanged": (lambda p: rewrite(p, exchange_names), "plan", r"comes after .* not before it"),
    "two offsets exchanged": (
        lambda p: rewrite(p, exchange_offsets),
        "layout",
        r"data are not in the order of the header: expected 'blk\.1\.ffn_gate_exps",
    ),
    "two experts exchanged": (
        lambda p: swap(p, expert(p, UP, 1), expert(p, UP, 3)),
        "row",
        r"ffn_up_exps\.weight: row 256 \(expert 1, its row 0\)",
    ),
    "rows shifted by one": (
        lambda p: shift_rows(p, "blk.2.attn_q_b.weight"),
        "row",
        r"blk\.2\.attn_q_b\.weight: row 0",
    ),
    "a row of zeros": (lambda p: zero_row(p, "output.weight", 5), "row", r"output\.weight: row 5, block 0.*found 0000"),
    "padding of a tensor": (
        lambda p: poke(p, padded(p).offset + padded(p).nbytes, b"\7"),
        "padding",
        r"after 'blk.* not zero: expected 00, found 07",
    ),
    "padding of the header": (
        lambda p: poke(p, read_header(p).data_offset - 1, b"\1"),
        "padding",
        r"after the header not zero",
    ),
    "a byte less": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "length", r"the file is too short"),
    "half of the file": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "layout",
        r"lies beyond the end of the file",
    ),
    "bytes behind the end": (
        lambda p: p.write_bytes(p.read_bytes() + bytes(32)),
        "length",
        r"bytes behind the last tensor",
    ),
    "the magic": (lambda p: poke(p, 0, b"GGML"), "header", r"expected b'GGUF', found b'GGML'"),
    "an interrupted llama-quantize": (lambda p: poke(p, 0, bytes(4096)), "header", r"interrupted llama-quantize"),
    "the version": (lambda p: poke(p, 4, b"\4"), "header", r"version: expected 3, found 4"),
    "one tensor more": (
        lambda p: poke(p, 8, struct.pack("<Q", len(read_header(p).tensors) + 1)),
        "header",
        r"the (length of the )?name of tensor",
    ),
    "one key less": (
        lambda p: poke(p, 16, struct.pack("<Q", len(read_header(p).kvs) - 1)),
        "header",
        r"has \d[\d,]* dimensions|the length of|dimensions of|not printable|is said to have",
    ),
    "a tensor of another type of that size": (
        lambda p: rewrite(p, retype("token_embd.weight", "BF16")),
        "row",
        r"token_embd\.weight: row \d",
    ),
    "a type that there is not": (
        lambda p: poke(p, after_name(p, GATE, "type"), struct.pack("<I", 99)),
        "header",
        r"ffn_gate_exps\.weight: ggml has no such type: found 99",
    ),
    "a shape of as many values": (
        lambda p: rewrite(p, reshape(GATE, (256, 512, 2))),
        "plan",
        r"ffn_gate_exps\.weight: shape: expected 256x256x4, found 256x512x2",
    ),
    "a shape of other rows": (
        lambda p: poke(p, after_name(p, GATE, "shape"), struct.pack("<Q", 250)),
        "header",
        r"rows do not divide into Q2_K blocks",
    ),
    "a shape of 2^64 values": (
        lambda p: poke(p, after_name(p, GATE, "shape"), struct.pack("<QQ", 1 << 40, 1 << 40)),
        "header",
        r"impossible shape",
    ),
    "an offset that is not aligned": (
        lambda p: rewrite(p, move(GATE, 8)),
        "layout",
        r"is not aligned: expected a multiple of 32",
    ),
    "an offset into the tensor before": (
        lambda p: rewrite(p, move(GATE, -32)),
        "layout",
        r"ffn_gate_exps\.weight: overlaps",
    ),
    "an offset of 2^63": (
        lambda p: poke(p, after_name(p, GATE, "offset"), struct.pack("<Q", 1 << 63)),
        "layout",
        r"lies beyond the end",
    ),
    "a tensor twice": (
        lambda p: rewrite(p, lambda _k, infos: infos.__setitem__(1, (infos[0][0], *infos[1][1:]))),
        "header",
        r"is there twice",
    ),
    "a tensor missing": (drop_last_tensor, "plan", r"blk\.2\..*: is missing: expected"),
    "a tensor that is not in the plan": (
        lambda p: rewrite(p, lambda _k, infos: infos.__setitem__(0, ("extra.weight", *infos[0][1:]))),
        "plan",
        r"the plan has no such tensor",
    ),
    "another file type": (
        lambda p: rewrite(p, lambda kvs, _i: set_key(kvs, kv("general.file_type", U32, 7))),
        "metadata",
        r"key 'general\.file_type': expected u32 15, found u32 7",
    ),
    "a value of another type": (
        lambda p: rewrite(p, lambda kvs, _i: set_key(kvs, kv("deepseek2.block_count", BOOL, True))),
        "metadata",
        r"key 'deepseek2\.block_count': expected u32 3, found bool 1",
    ),
    "a key missing": (
        lambda p: rewrite(
            p, lambda kvs, _i: kvs.pop(next(i for i, x in enumerate(kvs) if x.key.endswith("freq_base")))
        ),
        "metadata",
        r"key 'deepseek2\.rope\.freq_base' is missing",
    ),
    "a key too many": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.append(kv("general.author", STRING, "me"))),
        "metadata",
        r"key 'general\.author' is not in the plan",
    ),
    "keys in another order": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.reverse()),
        "metadata",
        r"the order of the keys",
    ),
    "a key twice": (
        key_twice,
        "header",
        r"key 'general\.architecture' is there twice",
    ),
    "no architecture": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.pop(0)),
        "header",
        r"general\.architecture: expected a string, found nothing",
    ),
    "a token's text": (token_changed, "metadata", r"key 'tokenizer\.ggml\.tokens'"),
    "an alignment of 7": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.append(kv("general.alignment", U32, 7))),
        "header",
        r"general\.alignment",
    ),
    "a scale that is NaN": (
        lambda p: poke(p, info_of(p, DOWN).offset + 66 * 300, b"\0\x7e"),
        "scale",
        r"ffn_down_exps\.weight: row 300 \(expert 1, its row 44\), block 0: NaN or Inf in IQ2_XXS",
    ),
    "a dmin that is Inf": (
        lambda p: poke(p, info_of(p, "blk.0.ffn_up.weight").offset + 2, b"\0\x7c"),
        "scale",
        r"ffn_up\.weight: row 0, block 0: NaN or Inf in Q4_K",
    ),
    "a scale at the end of a block": (
        lambda p: poke(p, info_of(p, "output.weight").offset + 210 * 9 + 208, b"\xff\xff"),
        "scale",
        r"output\.weight: row 9, block 0: NaN or Inf in Q6_K",
    ),
    "a norm that is Inf": (
        lambda p: poke(p, info_of(p, "output_norm.weight").offset + 4, struct.pack("<f", float("inf"))),
        "scale",
        r"output_norm\.weight: row 0, column 1: NaN or Inf in F32",
    ),
    "a BF16 value that is NaN": (
        lambda p: poke(p, info_of(p, "blk.2.attn_kv_a_mqa.weight").offset + 6, b"\xc0\x7f"),
        "scale",
        r"row 0, column 3: NaN or Inf in BF16",
    ),
    "32 bytes between two tensors": (
        lambda p: insert(p, info_of(p, GATE).offset, bytes(32)),
        "length",
        r"bytes behind the last tensor",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_planted_damage_is_caught_and_named(what: str, copied: Path, sound_plan: Plan, tiny_imatrix: Path) -> None:
    damage, kind, says = DAMAGE[what]
    before = copied.read_bytes()
    damage(copied)
    assert copied.read_bytes() != before
    verdict = check(copied, sound_plan, tiny_imatrix, "all" if kind == "row" else None)
    assert_found(verdict, kind, says)


# ---------------------------------------------------------------- shards


def split_key(path: Path, item: KV) -> None:
    rewrite(path, lambda kvs, _infos: set_key(kvs, item))


def exchange_files(a: Path, b: Path) -> None:
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)


def other_build(shards: list[Path], tmp_path: Path, seed: int, split: int) -> list[Path]:
    """The shards of a build with other weights, or split differently."""
    folder = tmp_path / f"other-{seed}-{split}"
    source = factory.checkpoint(folder / "Tiny-V3", seed=seed)
    catalogue = open_model(str(source), OPTIONS)
    imatrix = factory.imatrix_for(catalogue, folder / "imatrix.gguf")
    return sorted(build(plan_of(source, MIX, imatrix), folder / "tiny.gguf", imatrix, split).parent.glob("tiny-*.gguf"))


SHARD_DAMAGE: dict[str, tuple[Callable[[list[Path]], Any], str, str]] = {
    "a shard missing": (
        lambda s: s[1].unlink(),
        "shards",
        r"tiny-00002-of-\d{5}\.gguf missing: expected \d shards",
    ),
    "two shards exchanged": (
        lambda s: exchange_files(s[1], s[2]),
        "shards",
        r"00002-of-.*split\.no: expected u16 1, found u16 2",
    ),
    "a wrong split.no": (
        lambda s: split_key(s[1], kv("split.no", U16, 9)),
        "shards",
        r"split\.no: expected u16 1, found u16 9",
    ),
    "a wrong split.count": (
        lambda s: split_key(s[0], kv("split.count", U16, 2)),
        "shards",
        r"00001-of-.*split\.count: expected u16 \d, found u16 2",
    ),
    "split.count of another type": (
        lambda s: split_key(s[0], kv("split.count", U32, 4)),
        "shards",
        r"split\.count: expected u16 \d, found u32 4",
    ),
    "no split keys": (
        lambda s: rewrite(s[1], lambda kvs, _i: kvs.clear()),
        "shards",
        r"split\.tensors\.count: expected i32 \d+, found nothing",
    ),
    "a truncated shard": (
        lambda s: s[1].write_bytes(s[1].read_bytes()[:-40]),
        "length",
        r"00002-of-.*: the file is too short",
    ),
    "a shard whose header is gone": (lambda s: poke(s[1], 0, bytes(64)), "header", r"00002-of-.*zeros in place"),
    "a tensor in two shards": (
        lambda s: rewrite(
            s[2], lambda _k, infos: infos.__setitem__(0, (read_header(s[1]).tensors[0].name, *infos[0][1:]))
        ),
        "shards",
        r"is in tiny-00002-of-\d{5}\.gguf too",
    ),
    "one shard by its keys, none by its name": (
        lambda s: [s[0].rename(s[0].with_name("tiny.gguf"))] and s.__setitem__(0, s[0].with_name("tiny.gguf")),
        "shards",
        r"tiny\.gguf: is one shard of several by its keys",
    ),
    "a shard beyond the last": (
        lambda s: shutil.copy(s[1], s[1].with_name(s[1].name.replace("00002-of", "00099-of"))),
        "shards",
        r"00099-of-.*is beyond the last",
    ),
    "the model's keys in a later shard": (
        lambda s: rewrite(s[1], lambda kvs, _i: kvs.append(kv("general.name", STRING, "x"))),
        "metadata",
        r"key 'general\.name' belongs in the first shard",
    ),
}


@pytest.mark.parametrize("what", SHARD_DAMAGE)
def test_damage_of_a_set_is_caught_and_named(
    what: str, shards: list[Path], sound_plan: Plan, tiny_imatrix: Path
) -> None:
    damage, kind, says = SHARD_DAMAGE[what]
    damage(shards)
    assert_found(check(shards[0], sound_plan, tiny_imatrix, None), kind, says)


def test_a_shard_of_another_split_is_caught(
    shards: list[Path], sound_plan: Plan, tiny_imatrix: Path, tmp_path: Path
) -> None:
    other = other_build(shards, tmp_path, 7, 700_000)
    assert len(other) != len(shards)
    shutil.copy(other[1], shards[1])
    verdict = check(shards[0], sound_plan, tiny_imatrix, None)
    assert_found(verdict, "shards", r"split\.count: expected")
    assert_found(verdict, "shards", r"split\.tensors\.count: expected")


def test_a_shard_of_other_weights_is_caught(
    shards: list[Path], sound_plan: Plan, tiny_imatrix: Path, tmp_path: Path
) -> None:
    sums = outcome_of(shards[0], hashing=True)
    given = manifest.make(sums.files.files, sums.digests)
    other = other_build(shards, tmp_path, 8, 500_000)
    shutil.copy(other[1], shards[1])
    # by its structure alone it is as good as the right one
    assert check(shards[0], sound_plan, tiny_imatrix, None).ok
    names = {t.name for t in read_header(shards[1]).tensors}
    verdict = check(shards[0], sound_plan, tiny_imatrix, "0.1%")
    assert_found(verdict, "row", shards[1].name)
    assert {f.tensor for f in verdict.findings.kept()} <= names
    assert_found(check(shards[0], manifest=given), "manifest", rf"{shards[1].name}: SHA-256: expected")
