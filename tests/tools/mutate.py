"""Structure-aware mutations of valid inputs: binary files as pieces, JSON as a tree, YAML as lines and tokens.

Every function takes a random.Random, so that a seed gives the same bytes again.
"""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

Random = random.Random

EXTREMES = (
    0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 127, 128, 255, 256, 511, 512, 4096, 65535, 65536, 1 << 24,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 60, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 32, (1 << 64) - 1,
)  # fmt: skip
TEXTS = (
    "", " ", ".", "..", "/", "../x.safetensors", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\\..\\b",
    "x\0y", "a\nb", "\x1b[31mred", "\u202eabc", "\ud800", "\ufeff", "\u0663", "%s%n{0}", "x" * 300, "x" * 70_000,
    "blk.0.attn_q.weight", "blk.99999999999999999999.ffn_up.weight", "blk.-1.x.weight", "blk.\u0663.ffn_up.weight",
    "general.alignment", "general.architecture", "split.count", "split.no", "llama", "deepseek2", "None", "null",
    "model.safetensors", "config.json", ".", "model-00001-of-00002.safetensors/../x", "\U0001f600" * 20, "é", "1e9",
)  # fmt: skip


class Piece(NamedTuple):
    """A field of a binary file: what it is ("int", "float", "text", "data"), and its bytes."""

    kind: str
    raw: bytes


def u32(n: int) -> Piece:
    return Piece("int", struct.pack("<I", n))


def u64(n: int) -> Piece:
    return Piece("int", struct.pack("<Q", n))


def string(text: bytes) -> list[Piece]:
    """Its length in 64 bits, and the text."""
    return [u64(len(text)), Piece("text", text)]


def join(pieces: Sequence[Piece]) -> bytes:
    return b"".join(p.raw for p in pieces)


def _integer(rng: Random, piece: Piece) -> Piece:
    bits = 8 * len(piece.raw)
    value = int.from_bytes(piece.raw, "little")
    how = rng.random()
    if how < 0.4:
        value = rng.choice(EXTREMES)
    elif how < 0.7:
        value += rng.choice((-32, -8, -4, -2, -1, 1, 2, 4, 8, 32))
    elif how < 0.85:
        value ^= 1 << rng.randrange(max(1, bits))
    else:
        value = rng.getrandbits(bits)
    return Piece("int", (value % (1 << bits)).to_bytes(len(piece.raw), "little"))


def _text(rng: Random, pieces: list[Piece], i: int) -> None:
    """Another text, mostly with its length before it set right."""
    raw = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        raw = bytes(rng.getrandbits(8) for _ in range(rng.randrange(20)))
    pieces[i] = Piece("text", raw)
    if i and pieces[i - 1].kind == "int" and rng.random() < 0.8:
        size = len(pieces[i - 1].raw)
        pieces[i - 1] = Piece("int", len(raw).to_bytes(size, "little"))


def mutate_pieces(rng: Random, pieces: Sequence[Piece]) -> bytes:
    """One to a few changes; sometimes cut off or longer at the end."""
    out = list(pieces)
    for _ in range(1 + min(5, int(rng.expovariate(0.9)))):
        i, n = rng.randrange(len(out)), len(out)
        how = rng.random()
        if how < 0.45:
            ints = [k for k in range(n) if out[k].kind == "int"]
            if ints:
                k = rng.choice(ints)
                out[k] = _integer(rng, out[k])
        elif how < 0.55:
            if out[i].raw:
                raw = bytearray(out[i].raw)
                raw[rng.randrange(len(raw))] = rng.getrandbits(8)
                out[i] = Piece(out[i].kind, bytes(raw))
        elif how < 0.65:
            texts = [k for k in range(n) if out[k].kind == "text"]
            if texts:
                _text(rng, out, rng.choice(texts))
        elif how < 0.72:
            floats = [k for k in range(n) if out[k].kind == "float"]
            if floats:
                hostile = (0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000, 0, 0x80000000, 1, 0x7F7FFFFF, 0x7F000000)
                out[rng.choice(floats)] = Piece("float", struct.pack("<I", rng.choice(hostile)))
        elif how < 0.78 and n > 2:
            del out[i : i + rng.randrange(1, 6)]
        elif how < 0.84:
            out[i:i] = out[i : i + rng.randrange(1, 8)] * rng.choice((1, 1, 1, 2, 30))
        elif how < 0.90:
            j = rng.randrange(n)
            out[i], out[j] = out[j], out[i]
        elif how < 0.95:
            out.insert(i, out[rng.randrange(n)])
        else:
            out.insert(i, Piece("data", bytes(rng.getrandbits(8) for _ in range(rng.choice((1, 4, 8, 33))))))
        if not out:
            return b""
    return cut(rng, join(out))


def cut(rng: Random, raw: bytes) -> bytes:
    """Mostly as it is; else truncated, or with more at the end."""
    how = rng.random()
    if how < 0.06:
        return raw[: rng.randrange(len(raw) + 1)]
    if how < 0.09:
        return raw + bytes(rng.choice((1, 32, 4096)))
    return raw


def mutate_bytes(rng: Random, raw: bytes) -> bytes:
    """Changes that know nothing of structure."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        how = rng.random()
        if how < 0.5 and at < len(out):
            out[at] = rng.choice((0, 9, 10, 34, 92, 123, 125, 255, rng.getrandbits(8)))
        elif how < 0.7:
            del out[at : at + rng.choice((1, 2, 8, 100))]
        elif how < 0.85:
            out[at:at] = out[at : at + rng.choice((1, 8, 50, 500))]
        else:
            out[at:at] = rng.choice((b"\0", b"[", b"{", b'"', b"\\u0000", b"\xff\xfe", b"\xf0", b"[" * 40, b"9" * 30))
    return cut(rng, bytes(out))


# ---------------------------------------------------------------- JSON

#: written as they stand: what json.dumps would not write
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "1.0", "0.5", "1e3", "9" * 25, "9" * 400, "9" * 5000,
    '"\\ud800"', '"\\u0000"', "[" * 40 + "]" * 40, "[" * 3000, "[" * 30_000, '{"a":' * 40 + "1" + "}" * 40, "[]", "{}",
    '{"a":1,"a":2}', "\u0661", "\ufeff1", "0x10", "01", "-", "tru",
)  # fmt: skip


def _hostile(rng: Random) -> Any:
    how = rng.random()
    if how < 0.3:
        return rng.choice((1, 1, -1)) * rng.choice(EXTREMES)
    if how < 0.55:
        return rng.choice(TEXTS)
    if how < 0.75:
        return f"__raw{rng.randrange(len(RAW))}__"
    return rng.choice((None, True, False, [], {}, [1], [None], [[]], {"a": 1}, 0.5, -1, [0, 0], ["a"] * 9, [1] * 40))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    out: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        inner = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, child in inner:
            out.append((one, key))
            if isinstance(child, dict | list):
                todo.append(child)
    return out


def mutate_tree(rng: Random, value: Any) -> Any:
    """A changed copy of a JSON value. "__rawN__" and "__twice__" are for `json_text`."""
    out = copy.deepcopy(value)
    for _ in range(1 + min(4, int(rng.expovariate(1.2)))):
        places = _places(out)
        if not places:
            return _hostile(rng)
        where, key = rng.choice(places)
        other, other_key = rng.choice(places)
        how = rng.random()
        if how < 0.45:
            old = where[key]
            if type(old) is int and rng.random() < 0.5:
                where[key] = old + rng.choice((-1, 1, 2, 64, -old, -2 * old, old))
            else:
                where[key] = _hostile(rng)
        elif how < 0.6:
            del where[key]
        elif how < 0.7:
            where[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(where[key])
        elif how < 0.78 and isinstance(where, dict):
            where[rng.choice(TEXTS)] = where.pop(key)
        elif how < 0.84 and isinstance(where, dict):
            where["__twice__" + str(key)] = copy.deepcopy(where[key])
        elif how < 0.90:
            where[key] = [where[key]] if rng.random() < 0.5 else {"a": where[key]}
        elif isinstance(where, list):
            where.insert(key, copy.deepcopy(other[other_key]))
        else:
            where[key] = copy.deepcopy(other[other_key])
    return out


def json_text(value: Any) -> bytes:
    text = json.dumps(value).replace('"__twice__', '"')
    return re.sub('"__raw([0-9]+)__"', lambda m: RAW[int(m[1])], text).encode()


def mutate_json(rng: Random, value: Any) -> bytes:
    """Mostly the tree, else the text."""
    if rng.random() < 0.85:
        text = json_text(mutate_tree(rng, value))
        return cut(rng, text) if rng.random() < 0.1 else text
    return mutate_bytes(rng, json.dumps(value).encode())


# ---------------------------------------------------------------- YAML

TOKENS = (
    "&a ", "*a", "<<: ", "<<: *a", "!!python/object/apply:os.system [true]", "!!binary ", "!x ", "!!int ", "- ", "? ",
    ": ", "{", "}", "[", "]", ",", "'", '"', "|\n", ">\n", "#", "%YAML 1.2\n", "---\n", "...\n", "@", "`", "\t", "\0",
    "\x1b", "\ufeff", "\u2028", "\x85", "~", "null", "true", "yes", "1e999", "0x_", "2020-13-45", "1:99", "1_000",
    ".inf", "=", "moe[:6]", "all[::0]", "all[-999999:]", "moe[1:2:3:4]", "blk.*", "{a,b}" * 8, "{a,b}" * 40, "*" * 60,
    "*a" * 30, "[a-z]", "[!]", "[]", "$x", "$", "mixture Q4_K_M", "required", "Q4_K", "IQ1_S", "9" * 30, "-1",
    "\U0001f600", "\\", "[" * 300, "- " * 300, "x" * 2000,
)  # fmt: skip


def mutate_yaml(rng: Random, text: str, others: Sequence[str] = ()) -> bytes:
    """Lines deleted, repeated, swapped, indented and taken from others; tokens put in; values replaced."""
    lines = text.split("\n")
    for _ in range(1 + min(5, int(rng.expovariate(0.8)))):
        i = rng.randrange(len(lines))
        how = rng.random()
        if how < 0.35:
            at = rng.randrange(len(lines[i]) + 1)
            gone = rng.choice((0, 0, 1, 5))
            lines[i] = lines[i][:at] + rng.choice(TOKENS) + lines[i][at + gone :]
        elif how < 0.55:
            key, colon, rest = lines[i].partition(": ")
            new = rng.choice((*TOKENS, *(t.replace("\ud800", "") for t in TEXTS), str(rng.choice(EXTREMES))))
            lines[i] = f"{key}{colon}{new}" if colon and rng.random() < 0.7 else f"{key}: {rest}{new}"
        elif how < 0.65 and len(lines) > 2:
            del lines[i]
        elif how < 0.73:
            lines[i:i] = lines[i : i + rng.randrange(1, 6)] * rng.choice((1, 1, 50))
        elif how < 0.80:
            j = rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
        elif how < 0.88:
            lines[i] = " " * rng.randrange(5) + lines[i].lstrip() if rng.random() < 0.5 else "  " + lines[i]
        elif others:
            lines.insert(i, rng.choice(rng.choice(others).split("\n")))
        else:
            lines.append(lines[i])
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, raw) if rng.random() < 0.08 else raw
