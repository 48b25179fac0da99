"""How llama.cpp cuts a text into words before byte-pair encoding, by the name of its pre-tokenizer.

A pre-tokenizer is a list of regular expressions. The first one cuts the text into its matches and the pieces between
them; each further one cuts all those pieces again. Expressions with categories (\\p{L}) see the collapsed text
(categories.py), the others the code points; \\s is ASCII white space, to which all other white space is mapped.
Expressions and names come from llama.cpp: src/llama-vocab.cpp, llm_tokenizer_bpe and load. Where it has a loop instead
of an expression (src/unicode.cpp), this is the equivalent expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import AnyStr, NamedTuple

from ..base.errors import did_you_mean
from .categories import HAN_LETTER, HAN_OTHER, LETTER, MARK, NUMBER, PUNCTUATION, SYMBOL, collapsed, with_plain_spaces


def _class(kind: int, ascii_: bytes) -> bytes:
    return bytes([kind]) + ascii_


_LETTERS = _class(LETTER, b"A-Za-z")
#: category in an expression -> its members in a class of bytes; to llama.cpp all letters are one category
_CLASSES = {
    "N": _class(NUMBER, b"0-9"),
    "P": _class(PUNCTUATION, rb"!-#%-*,-/:;?@\[-\]_{}"),
    "S": _class(SYMBOL, rb"$+<=>\^`|~"),
    "M": _class(MARK, b""),
    **dict.fromkeys(("L", "Lu", "Ll", "Lt", "Lm", "Lo"), _LETTERS),
}

_NO_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _NO_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _NO_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
_CASED_TOO = r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
_LAST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_OLD_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_HAN_CLASS = f"\\x{HAN_LETTER:x}\\x{HAN_OTHER:x}"
_LLM_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ"
    "-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰"
    "-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


class Pre(NamedTuple):
    """A pre-tokenizer: its expressions, and the settings that its name implies."""

    expressions: tuple[str, ...]
    ignores_merges: bool = False
    """a word that is itself a token stays one, whatever the merges would make of it"""
    adds_bos: bool = False
    """default of tokenizer.ggml.add_bos_token"""
    has_bos: bool = True
    """has a beginning-of-text token even if the file names none"""
    han: bool = False
    """its expressions distinguish Han from other letters"""


_KINDS = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Pre((_LLAMA3,), True, True),
    "dbrx smaug-bpe": Pre((_LLAMA3,)),
    "chatglm-bpe": Pre((_LLAMA3,), has_bos=False),
    "glm4 glm5": Pre((_LLAMA3,), True, has_bos=False),
    "deepseek-llm": Pre((
        r"[\r\n]", rf"\s?[{_LLM_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+\Z", _OLD_CJK, r"\p{N}+",
    )),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _OLD_CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pre((r"\p{N}{1,3}", _CJK, _V3)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Pre((r"\p{N}", _GPT2)),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": Pre((_GPT2,)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Pre((_QWEN2,)),
    "qwen35": Pre((_NO_CASE + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
                   r"|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    "tekken": Pre((_CASED + _CASED_TOO + r"|\p{N}" + _LAST,), True, True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pre((
        _CASED + _NO_CASE + "?" + _CASED_TOO + _NO_CASE + "?" + r"|\p{N}{1,3}" + _LAST,
    )),
    "bailingmoe bailingmoe2 llada-moe": Pre((
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )),
    "seed-coder": Pre((
        _NO_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    )),
    "kimi-k2": Pre((
        f"[{_HAN_CLASS}]+|" r"[^\r\n\p{L}\p{N}]?\p{L}+" + _NO_CASE + r"?|\p{N}{1,3}"
        rf"| ?[^\s\p{{L}}\p{{N}}\x{HAN_LETTER:x}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ), han=True),
}  # fmt: skip
PRES = {name: pre for names, pre in _KINDS.items() for name in names.split()}


def cannot_be_rebuilt(name: str) -> str:
    """The message for a pre-tokenizer that is not in PRES; it follows the place's name."""
    return (
        f"its pre-tokenizer, {name!r:.60}, is not one that quantkit can rebuild{did_you_mean(name, PRES)}; it rebuilds "
        + ", ".join(sorted(PRES))
    )


class _Step(NamedTuple):
    """An expression, for either the collapsed text or the code points."""

    on_bytes: re.Pattern[bytes] | None
    on_text: re.Pattern[str] | None


@cache
def _step(expression: str) -> _Step:
    if r"\p{" not in expression:
        return _Step(None, re.compile(expression, re.ASCII))
    out, at, inside = bytearray(), 0, False
    while at < len(expression):
        ch = expression[at]
        named = re.compile(r"\\p\{(\w+)\}").match(expression, at)
        if named:
            members = _CLASSES[named[1]]
            out += members if inside else b"[" + members + b"]"
            at = named.end()
            continue
        if ch == "\\":
            out += expression[at : at + 2].encode("ascii")
            at += 2
            continue
        inside = ch == "[" or (inside and ch != "]")
        out += ch.encode("ascii")
        at += 1
    return _Step(re.compile(bytes(out)), None)


Span = tuple[int, int]


class Splitter:
    """Cuts texts into words by one pre-tokenizer."""

    def __init__(self, pre: Pre) -> None:
        self._steps, self._han = [_step(e) for e in pre.expressions], pre.han

    def words(self, text: str) -> Iterator[str]:
        """Yield the words of a text; concatenated, they are the text."""
        as_bytes = collapsed(text, self._han) if any(s.on_bytes for s in self._steps) else b""
        as_text = with_plain_spaces(text) if any(s.on_text for s in self._steps) else ""
        for start, end in self._cut(self._steps, as_bytes, as_text, len(text)):
            yield text[start:end]

    @staticmethod
    def _cut(steps: Sequence[_Step], as_bytes: bytes, as_text: str, n: int) -> Iterator[Span]:
        spans: Iterator[Span] = iter([(0, n)] if n else [])
        for on_bytes, on_text in steps:
            if on_bytes is not None:
                spans = _cut(on_bytes, as_bytes, spans)
            elif on_text is not None:
                spans = _cut(on_text, as_text, spans)
        return spans


def _cut(pattern: re.Pattern[AnyStr], text: AnyStr, spans: Iterator[Span]) -> Iterator[Span]:
    """Yield the pattern's matches within each span, and the pieces between them."""
    for start, end in spans:
        at = start
        for match in pattern.finditer(text, start, end):
            found = match.span()
            if found[0] > at:
                yield at, found[0]
            yield found
            at = found[1]
        if at < end:
            yield at, end
