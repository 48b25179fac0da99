"""What a rule selects: tensor names, by globs with braces; layers, as numbers or as Python slices of named lists.

In a glob, `*` matches any run of characters, `?` one character, `[ab]`, `[a-z]` and `[!a]` one of a set; `{a,b}` gives
alternatives, which are expanded first. A glob matches whole names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count

from ..base.errors import did_you_mean

LAYER_GROUPS = ("all", "dense", "moe", "more_bits")
_MAX_ALTERNATIVES = 256
_MAX_PATTERN = 1000
_MAX_LAYERS = 4096


def expand_braces(pattern: str) -> list[str]:
    """Expand a glob with {a,b} alternatives into globs without; braces may nest. Raises ValueError."""
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"'{pattern:.60}…' is longer than {_MAX_PATTERN:,} characters")
    # for every open brace: the finished alternatives, and those being extended since the last comma
    open_: list[tuple[list[str], list[str]]] = [([], [""])]
    for token in re.split("([{},])", pattern):
        done, now = open_[-1]
        if token == "{":
            open_.append(([], [""]))
        elif token == "," and len(open_) > 1:
            open_[-1] = (done + now, [""])
        elif token == "}":
            open_.pop()
            if not open_:
                break
            choices, (done, now) = done + now, open_[-1]
            if len(done) + len(now) * len(choices) > _MAX_ALTERNATIVES:
                raise ValueError(f"'{pattern:.60}' has more than {_MAX_ALTERNATIVES} alternatives")
            open_[-1] = (done, [a + b for a in now for b in choices])
        else:
            open_[-1] = (done, [a + token for a in now])
    if len(open_) != 1:
        raise ValueError(f"'{pattern:.60}' has a brace without its partner")
    return open_[0][1]


_group = count()


def glob_regex(pattern: str) -> str:
    """Translate a brace-free glob into a regular expression for the whole name. Raises ValueError.

    The text between two stars is matched where it first occurs and nowhere else (another place could
    not match more), so no pattern takes long: the standard library's fnmatch does the same.
    """
    pieces = [""]
    i = 0
    while i < len(pattern):
        ch = pattern[i]
        i += 1
        if ch == "*":
            if pieces[-1] or len(pieces) == 1:
                pieces.append("")
        elif ch == "?":
            pieces[-1] += "."
        elif ch == "[":
            negated = pattern[i : i + 1] in ("!", "^")
            end = pattern.find("]", i + negated + 1)
            if end < 0:
                raise ValueError(f"'{pattern:.60}' has a '[' without its ']'")
            pieces[-1] += f"[{'^' * negated}{_set_regex(pattern[i + negated : end], pattern)}]"
            i = end + 1
        else:
            pieces[-1] += re.escape(ch)
    first, middle, last = pieces[0], pieces[1:-1], pieces[-1] if len(pieces) > 1 else ""
    names = [f"g{next(_group)}" for _ in middle]
    once = "".join(f"(?=(?P<{name}>.*?{piece}))(?P={name})" for name, piece in zip(names, middle, strict=True))
    return f"(?s:{first}{once}{'.*' if len(pieces) > 1 else ''}{last})\\Z"


def _set_regex(body: str, pattern: str) -> str:
    """Translate the body of a set: characters, and ranges such as a-z."""
    out = ""
    while body:
        if len(body) > 2 and body[1] == "-":
            if body[0] > body[2]:
                raise ValueError(f"'{pattern:.60}' has a set with the empty range {body[:3]}")
            out += f"{re.escape(body[0])}-{re.escape(body[2])}"
            body = body[3:]
        else:
            out += re.escape(body[0])
            body = body[1:]
    return out


@lru_cache(maxsize=1024)
def matcher(pattern: str) -> re.Pattern[str]:
    """Compile a glob with braces; use `match`, which then covers the whole name. Raises ValueError."""
    return re.compile("|".join(glob_regex(p) for p in expand_braces(pattern)))


_RANGES = re.compile(r"\s*\d{1,6}\s*(?:[-\u2013]\s*\d{1,6}\s*)?(?:,\s*\d{1,6}\s*(?:[-\u2013]\s*\d{1,6}\s*)?)*")
_LAYERS = re.compile(r"(?P<group>\w+)\s*(?:\[\s*(?P<index>[^\]]*?)\s*\])?")
_NUMBER = re.compile(r"[+-]?\d{1,6}")


def parse_layers(text: str) -> tuple[str, int | slice | frozenset[int] | None]:
    """'moe[:6]' as ('moe', slice(None, 6)), 'all[-1]' as ('all', -1), 'dense' as ('dense', None), and '3-5, 9' as
    ('all', {3, 4, 5, 9}). Raises ValueError."""
    if _RANGES.fullmatch(text):
        return "all", frozenset(_numbers(text))
    m = _LAYERS.fullmatch(text.strip())
    if m is None:
        raise ValueError(
            f"'{text:.60}' is not a choice of layers; write numbers, such as 3-12 or [3, 5], or a list of layers "
            "with a "
            "Python slice, such as moe, moe[:6] or all[-1]"
        )
    if m["group"] not in LAYER_GROUPS:
        raise ValueError(
            f"unknown layer list '{m['group']:.60}'{did_you_mean(m['group'], LAYER_GROUPS)}; "
            f"there are {', '.join(LAYER_GROUPS)}"
        )
    if m["index"] is None:
        return m["group"], None
    numbers = [n.strip() for n in m["index"].split(":")]
    if not all(_NUMBER.fullmatch(n) or (n == "" and len(numbers) > 1) for n in numbers) or len(numbers) > 3:
        raise ValueError(f"'[{m['index']:.60}]' is not a Python slice or index, such as [:6], [6:] or [-1]")
    if len(numbers) == 1:
        return m["group"], int(numbers[0])
    if len(numbers) == 3 and numbers[2] != "" and int(numbers[2]) == 0:
        raise ValueError(f"'[{m['index']:.60}]' has a step of 0")
    return m["group"], slice(*(int(n) if n else None for n in numbers))


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers of '3-5, 9'. Raises ValueError."""
    for part in text.split(","):
        first, _, last = (n.strip() for n in part.replace("\u2013", "-").partition("-"))
        if last and int(last) < int(first):
            raise ValueError(f"'{part.strip()}' runs backwards; write {last}-{first}")
        if last and int(last) - int(first) > _MAX_LAYERS:
            raise ValueError(f"'{part.strip()}' is more than {_MAX_LAYERS:,} layers")
        yield from range(int(first), int(last or first) + 1)


def pick_layers(text: str, groups: Mapping[str, Sequence[int]]) -> frozenset[int]:
    """Return the layer numbers that a selector takes from a model's layer lists; those beyond a list are ignored."""
    group, index = parse_layers(text)
    layers = groups[group]
    if index is None:
        return frozenset(layers)
    if isinstance(index, frozenset):
        return index.intersection(layers)
    if isinstance(index, slice):
        return frozenset(layers[index])
    return frozenset(layers[index : index + 1 or None])
