"""What people write instead of a glob over tensor names: regular expressions, and NAME=TYPE lines of other tools.

Both are recognized by characters that no tensor name has, and the message shows the glob to write. `as_glob` translates
regular expressions that a glob can express; for others it returns None.
"""

from __future__ import annotations

import re

#: characters that regular expressions often have but globs over tensor names never: anchors, escapes, groups, +
_ONLY_IN_REGEX = re.compile(r"[\\^$()|+]")
#: NAME=TYPE, a line of another tool
_LINE = re.compile(r"(?P<name>[^=]+)=(?P<type>[A-Za-z][A-Za-z0-9_]*)")
_SET = re.compile(r"\[(?P<not>\^?)(?P<body>[^][\\]+)\]")
#: syntax that Python's re knows and ECMAScript does not, or that means something else there
_FOREIGN = re.compile(r"\\\\|(?P<bad>\(\?(?![:=!])|\\[AZz]|[*+?}]\+|\[[:.=]|\{,)|\\.")
_MOST_PATTERN = 1000
_CLASSES = {"d": "[0-9]", "w": "[A-Za-z0-9_]"}


def not_a_glob(text: str) -> str:
    """Explain why a text is not a glob over tensor names but some other notation, and show the glob to write; '' for a
    glob."""
    line = _LINE.fullmatch(text)
    if line is not None:
        name = _as_written(line["name"])
        return f"'{text:.80}' is a line NAME=TYPE of another tool; write match: \"{name}\" and type: {line['type']}"
    if "=" in text:
        return f"'{text:.80}' has a '=', which no tensor's name has; write the glob alone"
    if _ONLY_IN_REGEX.search(re.sub(r"\[[^\]]*\]", "", text)) is None:
        return ""
    glob = as_glob(text, loosely=True)
    shown = f': "{glob}"' if glob is not None else ', such as "blk.*.ffn_down_exps.weight"'
    return f"'{text:.80}' is a regular expression; a rule takes a glob over the whole name{shown}"


def _as_written(name: str) -> str:
    """Return the glob for the left side of another tool's line, which that tool searches for anywhere in a name."""
    if _ONLY_IN_REGEX.search(name) is None and re.search(r"[*?\[{]", name):
        return name
    return as_glob(name, loosely=True) or name


def as_glob(regex: str, loosely: bool = False) -> str | None:
    """Return the glob that matches the names in which the regular expression is found, or None if there is none:
    '*ffn_{up,gate}_exps*' for 'ffn_(up|gate)_exps'. `loosely`: use * for what a glob cannot repeat, such as [0-9]+."""
    body, starts, ends = regex, regex.startswith("^"), regex.endswith("$") and not regex.endswith("\\$")
    body = body[starts : len(body) - ends]
    parsed = _alternatives(body, 0, loosely)
    if parsed is None or parsed[1] != len(body):
        return None
    choices = parsed[0]
    if len(choices) > 1 and (starts or ends):  # ^a|b: the anchor applies to one side only
        return None
    inner = choices[0] if len(choices) == 1 else f"{{{','.join(choices)}}}"
    glob = f"{'' if starts else '*'}{inner}{'' if ends else '*'}"
    return re.sub(r"\*+", "*", glob)


def _alternatives(text: str, at: int, loosely: bool) -> tuple[list[str], int] | None:
    """Return globs for the parts between |, up to the end or the closing parenthesis, and the position of that."""
    done: list[str] = []
    now = ""
    while at < len(text):
        ch, rest = text[at], text[at + 1 : at + 2]
        if ch == ")":
            break
        if ch == "|":
            done.append(now)
            now, at = "", at + 1
            continue
        if ch == "(":
            start = at + 3 if text.startswith("(?:", at) else at + 1
            inner = _alternatives(text, start, loosely)
            if inner is None or text[inner[1] : inner[1] + 1] != ")":
                return None
            piece = inner[0][0] if len(inner[0]) == 1 else f"{{{','.join(inner[0])}}}"
            at = inner[1] + 1
        elif ch == "\\":
            if not rest or rest in "{}," or (rest.isalnum() and rest not in _CLASSES):
                return None
            piece = _CLASSES.get(rest) or (f"[{rest}]" if rest in "*?[" else rest)
            at += 2
        elif ch == "[":
            found = _SET.match(text, at)
            if found is None or "!" in found["body"][:1]:
                return None
            piece = f"[{'!' if found['not'] else ''}{found['body']}]"
            at = found.end()
        elif ch == ".":
            piece = "?"
            at += 1
        elif ch in "*+?{}^$,":
            return None
        else:
            piece = ch
            at += 1
        quantifier = text[at : at + 1]
        if quantifier in ("*", "+") and quantifier:
            if text[at + 1 : at + 2] in ("+", "?") or (piece != "?" and not loosely):
                return None  # * would match more than [0-9]+ and the like
            piece = "?*" if quantifier == "+" and piece == "?" else "*"
            at += 1
        elif quantifier in ("?", "{") and quantifier:
            return None
        now += piece
    return [*done, now], at


def tool_regex(written: str, in_lower_case: bool) -> re.Pattern[str]:
    """Compile a pattern written for std::regex (ECMAScript). llama-quantize lower-cases all of it, so \\S becomes
    \\s. Raises ValueError."""
    if len(written) > _MOST_PATTERN:
        raise ValueError(f"'{written:.60}…' is longer than {_MOST_PATTERN:,} characters")
    pattern = re.sub("[A-Z]", lambda m: m[0].lower(), written) if in_lower_case else written
    for m in _FOREIGN.finditer(pattern):
        if m["bad"]:
            raise ValueError(f"'{written:.60}' has '{m['bad']}', which quantkit does not read; write it out")
    try:
        return re.compile(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"'{written:.60}' is not a regular expression: {e}") from None
