"""GPUs as people write them: 24, 2x80, 80GB, 16x3090, 4xA100-80GB, and several kinds as 24+2x80.

A number is the GiB of one GPU, and so are the GB it is sold with: an RTX 4090 with "24 GB" has 24 x 2^30 bytes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..base.errors import did_you_mean

MOST_GPUS = 16
#: more than any GPU has: 288 is the most today
_MOST_GIB = 512
#: GiB by name; several numbers where a name was sold with several sizes
_GIB: dict[str, tuple[int, ...]] = {
    "1080ti": (11,), "2080ti": (11,), "3060": (8, 12), "3070": (8,), "3080": (10, 12), "3080ti": (12,),
    "3090": (24,), "3090ti": (24,), "4060": (8,), "4060ti": (8, 16), "4070": (12,), "4070ti": (12,), "4080": (16,),
    "4090": (24,), "4090d": (24, 48), "5060ti": (8, 16), "5070": (12,), "5070ti": (16,), "5080": (16,), "5090": (32,),
    "pro6000": (96,), "6000ada": (48,), "a4000": (16,), "a5000": (24,), "a6000": (48,),
    "t4": (16,), "p40": (24,), "p100": (12, 16), "v100": (16, 32), "a10": (24,), "a16": (16,), "a30": (24,),
    "a40": (48,), "a100": (40, 80), "l4": (24,), "l40": (48,), "l40s": (48,), "h20": (96, 141), "h100": (80,),
    "h200": (141,), "b200": (180, 192), "b300": (288,), "gh200": (96, 144),
    "7900xt": (20,), "7900xtx": (24,), "9070xt": (16,), "w7900": (48,),
    "mi50": (16, 32), "mi60": (32,), "mi100": (32,), "mi210": (64,), "mi250x": (128,), "mi300x": (192,),
    "mi325x": (256,), "mi355x": (288,),
}  # fmt: skip
_MAKERS = re.compile(r"nvidia|geforce|rtx|gtx|tesla|quadro|amd|radeon|rx|instinct|blackwell|[\s_-]")
_COUNTED = re.compile(r"(?:(\d{1,2})\s*[x*×]\s*)?(.+)")
_COUNTED_AFTER = re.compile(r"(.*[a-z].*?|\d{4})\s*[x*×]\s*(\d{1,9})")
_NUMBER = re.compile(r"0*(\d{1,9})\s*(?:gi?b?)?")
_SIZED = re.compile(r"(.+?)[\s-]*0*(\d{1,3})\s*(?:gi?b?)?")


class Gpus(NamedTuple):
    """The GPUs asked for."""

    text: str
    """24, 2x80, 24+80 or 16x3090 (16x24)"""
    gib: tuple[int, ...]
    """of each GPU"""


def parse_gpus(text: str) -> Gpus:
    """Parse one GPU, several of a kind, or several kinds joined by +, in llama.cpp's order. Raises ValueError with a
    sentence for people."""
    parts = text.split("+")
    kinds = [_alike(part if len(parts) == 1 or part.strip() else text) for part in parts]
    if len(kinds) == 1:
        return kinds[0]
    gib = tuple(n for kind in kinds for n in kind.gib)
    if len(gib) > MOST_GPUS:
        raise ValueError(f"{text!r} is {len(gib)} GPUs, and {MOST_GPUS} are the most")
    return Gpus("+".join(kind.text for kind in kinds), gib)


def _alike(text: str) -> Gpus:
    item = " ".join(text.lower().split())
    after = _COUNTED_AFTER.fullmatch(item)
    m = _COUNTED.fullmatch(f"{after[2]}x{after[1]}" if after and _is_one(after[1]) else item)
    if m is None or not 1 <= int(m[1] or 1) <= MOST_GPUS:
        raise ValueError(_wrong(text))
    n, what = int(m[1] or 1), m[2]
    number = _NUMBER.fullmatch(what)
    if number and 1 <= int(number[1]) <= _MOST_GIB:
        each = int(number[1])
        return Gpus(f"{n}x{each}" if m[1] else str(each), (each,) * n)
    sized = _SIZED.fullmatch(what)
    known = _GIB.get(_name(what), ())
    if sized and not known and _name(sized[1]) in _GIB and 1 <= int(sized[2]) <= _MOST_GIB:
        known = (int(sized[2]),)
    if len(known) == 1:
        times = f"{n}x" if n > 1 else ""
        return Gpus(f"{times}{what} ({times}{known[0]})", known * n)
    if known:
        sold = " or ".join(map(str, known))
        raise ValueError(f"{text!r}: {what.upper()} are sold with {sold} GiB; say which, such as {n}x{known[-1]}")
    if number and int(number[1]) > _MOST_GIB:
        mib = round(int(number[1]) / 1024)
        perhaps = f"; as MiB it would be {n}x{mib}" if 1 <= mib <= _MOST_GIB and int(number[1]) >= 4096 else ""
        raise ValueError(
            f"{text!r}: no GPU has {int(number[1]):,} GiB (at most {_MOST_GIB}), nor is one known by that name{perhaps}"
        )
    raise ValueError(_wrong(text, did_you_mean(_name(what), _GIB) if re.search("[a-z]", what) else ""))


def _is_one(text: str) -> bool:
    return _name(text) in _GIB or _NUMBER.fullmatch(text) is not None


def _name(text: str) -> str:
    return _MAKERS.sub("", text)


def _wrong(text: str, guess: str = "") -> str:
    return (
        f"{text!r} is not VRAM in GiB such as 24, 2x80 or 24+80 for two GPUs (at most {MOST_GPUS}), or a GPU such as "
        f"3090{guess}"
    )
