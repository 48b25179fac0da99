"""The tokenizer.* keys of a GGUF, for byte-level BPE tokenizers in Hugging Face's files.

The vocabulary and its types follow the converter's rules (conversion/base.py, get_vocab_base), and are read
with the `tokenizers` package; `gguf` finds merges, special tokens and the chat template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...base.errors import SourceError, UnsupportedError
from ...gguf.header import I32, KV, STRING, U32, kv, kv_array
from .added_tokens import add_tokens
from .general import from_writer, one_line
from .options import Options

#: sha256 of the token ids of `_PROBE` -> tokenizer.ggml.pre, as published by llama.cpp
#: (conversion/base.py, get_vocab_base_pre)
PRE_TOKENIZERS = {
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "81212dc7cdb7e0c1074ca62c5aeab0d43c9f52b8a737be7b12a777c953027890": "kimi-k2",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
}

#: the text whose tokens identify a pre-tokenizer, from llama.cpp's convert_hf_to_gguf_update.py
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f "
    "(multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 "
    "3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e "
    "\u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

_ONLY_JSON = (
    "and quantkit reads byte-level BPE from tokenizer.json; convert the model with convert_hf_to_gguf.py --outtype "
    "bf16, and give the GGUF"
)
PAD_KEY = "tokenizer.ggml.padding_token_id"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def refuse_sentencepiece(path: Path) -> None:
    """Raise UnsupportedError for a checkpoint with a tokenizer.model, which a converter would prefer to
    tokenizer.json."""
    if (path / "tokenizer.model").is_file():
        raise UnsupportedError(f"{path}: has a SentencePiece tokenizer (tokenizer.model), {_ONLY_JSON}")


def flag(path: Path, key: str) -> bool | None:
    """Return the flag `key` of tokenizer_config.json, or None if it is not there. Raises SourceError."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text("utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise SourceError(f"{file}: cannot be read: {one_line(e)}; download it again") from None
    if value is not None and not isinstance(value, bool):
        raise SourceError(f"{file}: {key} is {value!r:.60}, not true or false; download it again")
    return value


def tokenizer_kvs(path: Path, n_vocab: int, options: Options) -> tuple[list[KV], list[str]]:
    """Return the tokenizer.* keys of a checkpoint directory, and notes for the user.

    Raises SourceError if the tokenizer is missing, has ids beyond the vocabulary, or is not one of
    the known ones and --pre was not given; UnsupportedError if it is not a byte-level BPE tokenizer.
    """
    import gguf
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    file = path / "tokenizer.json"
    if not file.is_file():
        if (path / "tiktoken.model").is_file():
            raise UnsupportedError(f"{path}: has a tiktoken tokenizer (tiktoken.model), {_ONLY_JSON}")
        raise SourceError(f"{path}: tokenizer.json is missing; download it from the model's repository")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        if not isinstance(tokenizer.model, BPE):
            raise UnsupportedError(f"{file}: is a {type(tokenizer.model).__name__} tokenizer; quantkit reads BPE ones")
        if tokenizer.model.byte_fallback:
            raise UnsupportedError(f"{file}: is a SentencePiece tokenizer (byte_fallback is true), {_ONLY_JSON}")
        add_tokens(path, tokenizer, n_vocab)
        tokens, types = _vocabulary(file, tokenizer, n_vocab)
    except SourceError:
        raise
    except Exception as e:  # the package raises nothing more specific
        raise SourceError(f"{file}: not a usable tokenizer: {one_line(e)}; download it again") from None
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    try:
        special = gguf.SpecialVocab(path, load_merges=True)
        special.add_special_token = _added_automatically(path, special)
        writer = gguf.GGUFWriter(None, "none")
        special.add_to_gguf(writer, quiet=True)
        collected = [item for item in from_writer(writer) if item.key != "general.architecture"]
    except Exception as e:  # malformed files can make the package and struct raise anything
        raise SourceError(
            f"{path}: the special tokens or chat template in tokenizer_config.json cannot be read: {one_line(e)}; "
            "download it again"
        ) from None
    if not special.merges:
        raise SourceError(f"{file}: has no merges; quantkit reads byte-level BPE tokenizers, which have them")
    for kind, i in special.special_token_ids.items():
        if i >= n_vocab:
            raise SourceError(
                f"{path}: the {kind} token has the id {i:,}, but config.json's vocab_size is {n_vocab:,}; do "
                "config.json and tokenizer belong together?"
            )
    out = [
        kv("tokenizer.ggml.model", STRING, "gpt2"),
        kv("tokenizer.ggml.pre", STRING, _pre(file, tokenizer, special.special_token_ids.get("bos"), options)),
        kv_array("tokenizer.ggml.tokens", STRING, tokens),
        kv_array("tokenizer.ggml.token_type", I32, types),
    ]
    out += collected
    return _pad_token(file, out, tokens, special.special_token_ids, options.pad_token)


def _added_automatically(path: Path, special: Any) -> dict[str, bool]:
    """Return whether a tokenizer adds bos, eos, sep to a text by itself: what tokenizer.json's post-processor
    does, else what tokenizer_config.json says. These are the rules of llama.cpp's gguf-py, newer
    than those of the package on PyPI, where the config has the last word."""

    def load(name: str) -> dict[str, Any]:
        file = path / name
        value = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return value if isinstance(value, dict) else {}

    post, said = load("tokenizer.json").get("post_processor"), load("tokenizer_config.json")
    out: dict[str, bool] = {}
    for step in post.get("processors", [post]) if isinstance(post, dict) else []:
        if step.get("type") == "ByteLevel":
            out.setdefault("bos", False)
            out.setdefault("eos", False)
        elif step.get("type") == "RobertaProcessing":
            out |= {"bos": True, "eos": True, "sep": True}
        elif step.get("type") == "TemplateProcessing":
            out |= _added_by_template(step, said)
    for kind in special.special_token_types:
        value = said.get(f"add_{kind}_token")
        if isinstance(value, bool):
            out.setdefault(kind, value)
    return out


def _added_by_template(step: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, bool]:
    def text(name: str) -> Any:
        value = said.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def special(item: Mapping[str, Any]) -> Any:
        return item.get("SpecialToken", {}).get("id")

    out: dict[str, bool] = {}
    single, pair = step.get("single", []), step.get("pair", [])
    first = special(single[0]) if len(single) > 1 else None
    last = special(single[-1]) if len(single) > 1 else None
    if first:
        out["bos"] = True
    if last:
        out["eos"] = True
    inner = pair[1 if pair and first and special(pair[0]) == first else 0 :]
    if inner and last and special(inner[-1]) == last:
        inner = inner[:-1]
    ends = [item.get("Sequence", {}).get("id") for item in (inner[:1] + inner[-1:])]
    if ends == ["A", "B"] and len(inner) > 2:
        separators = {text("sep_token"), last or text("eos_token")} - {None}
        between = [special(item) for item in inner[1:-1]]
        # either directly after the first text, or after the end-of-text token that closes it
        out["sep"] = (not last and between[0] in separators) or (len(between) == 2 and between[1] in separators)
    return out


def _vocabulary(file: Path, tokenizer: Any, n_vocab: int) -> tuple[list[str], list[int]]:
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= n_vocab:
        raise SourceError(
            f"{file}: the token {by_id[max(by_id)]!r:.60} has the id {max(by_id):,}, but config.json's vocab_size is "
            f"{n_vocab:,}; do the two belong together?"
        )
    added = tokenizer.get_added_tokens_decoder()
    tokens: list[str] = []
    types: list[int] = []
    for i in range(n_vocab):
        token = by_id.get(i)
        if token is None:
            tokens.append(f"[PAD{i}]")
            types.append(_UNUSED)
            continue
        if i not in added:
            types.append(_NORMAL)
        else:
            if not added[i].normalized:
                ids = tokenizer.encode(token, add_special_tokens=False).ids
                token = tokenizer.decode(ids, skip_special_tokens=False)
            if added[i].special or _looks_special(token):
                types.append(_CONTROL)
            else:
                token = token.replace("\u2581", " ")
                types.append(_USER_DEFINED)
        tokens.append(token)
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether a token is a control token even if its tokenizer does not mark it as one."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return any(token.startswith(a) and token.endswith(b) for a, b in pairs)


def _pre(file: Path, tokenizer: Any, bos: int | None, options: Options) -> str:
    """Return the pre-tokenizer's name: the user's, else by the published hashes. Raises SourceError."""
    if options.pre is not None and not options.recognize:
        return options.pre
    try:
        whole, plain = tokenizer.encode(_PROBE).ids, tokenizer.encode(_PROBE, add_special_tokens=False).ids
    except Exception as e:  # the package raises nothing more specific
        raise SourceError(f"{file}: not a usable tokenizer: {one_line(e)}; download it again") from None
    # the published hashes are of what transformers returns: bos first if the tokenizer sets
    # add_bos_token, else what the post-processor does. The order matters: without its bos, the
    # tokenizer of R1's Qwen distills equals Qwen2's
    variants = [whole, plain]
    if bos is not None:
        variants.insert(0 if flag(file.parent, "add_bos_token") else 2, [bos, *plain])
    hashes = [sha256(str(ids).encode()).hexdigest() for ids in variants]
    for h in hashes:
        if h in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[h]
    if options.pre is not None:
        return options.pre
    raise SourceError(
        f"{file}: the pre-tokenizer is not one quantkit recognizes (hash {hashes[0][:16]}…); name it with --pre, for "
        f"a DeepSeek-V3 or R1: --pre deepseek-v3 (known: {', '.join(sorted(set(PRE_TOKENIZERS.values())))})"
    )


def _pad_token(
    file: Path, kvs: list[KV], tokens: list[str], special: dict[str, int], asked: str | None
) -> tuple[list[KV], list[str]]:
    key = PAD_KEY
    pad, eos = special.get("pad"), special.get("eos")
    if asked is None:
        if pad is not None and pad == eos:
            own = "<\uff5c\u2581pad\u2581\uff5c>"
            says = f"the padding token is the end-of-text token ({tokens[pad]!r}, id {pad}), "
            if own in tokens:
                says += f"a fault of R1's tokenizer that harms fine-tuning; --pad-token '{own}' mends it"
            else:
                says += "which harms fine-tuning; --pad-token can name another"
            return kvs, [says]
        return kvs, []
    item = kv(key, U32, token_id(str(file), tokens, asked))
    if any(k.key == key for k in kvs):
        return [item if k.key == key else k for k in kvs], []
    return [*kvs, item], []


def token_id(where: str, tokens: Sequence[str], asked: str) -> int:
    """Return the id that --pad-token names, as a number or as a text. Raises SourceError."""
    if asked.isascii() and asked.isdecimal() and len(asked) < 20 and int(asked) < len(tokens):
        return int(asked)
    if asked in tokens:
        return tokens.index(asked)
    raise SourceError(f"{where}: --pad-token {asked!r:.60} is neither a token nor an id below {len(tokens):,}")
