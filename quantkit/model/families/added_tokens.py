"""Tokens that stand beside tokenizer.json: in tokenizer_config.json, special_tokens_map.json, added_tokens.json.

They are added to the tokenizer as transformers does when it loads a fast one, in its order, which determines their
ids. Source: transformers 4.57, tokenization_utils_base._from_pretrained and tokenization_utils_fast.__init__.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base.errors import SourceError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = "additional_special_tokens"
_END = "<|endoftext|>"
#: tokens that a tokenizer class of transformers adds if tokenizer_config.json names none
_OF_CLASS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
}
#: config.json's model_type -> the tokenizer class, if no file names one
_OF_MODEL = {"deepseek_v2": "LlamaTokenizer", "deepseek_v3": "LlamaTokenizer", "llama": "LlamaTokenizer"}
_OF_MODEL["qwen2"] = "Qwen2Tokenizer"


def add_tokens(folder: Path, tokenizer: Tokenizer, n_vocab: int) -> None:
    """Add the tokens in the files beside tokenizer.json, and apply the flags given there to existing tokens. Raises
    SourceError for a file that cannot be read, and for a token of the tokenizer's class beyond the vocabulary."""
    config = folder / "tokenizer_config.json"
    written = _object(config)
    name = _class_name(folder, written)
    said = {**_OF_CLASS.get(name, {}), **written}
    try:
        _add(folder, tokenizer, said)
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise SourceError(
            f"{folder}: the added tokens in tokenizer_config.json, special_tokens_map.json and added_tokens.json "
            f"cannot be read: {' '.join(str(e).split())[:200]}; download them again"
        ) from None
    for key, text in _OF_CLASS.get(name, {}).items():
        i = tokenizer.token_to_id(text)
        if key not in written and i is not None and i >= n_vocab:
            raise SourceError(
                f"{config}: says no {key}, so transformers' {name} adds {text!r} with the id {i:,}, but config.json's "
                f"vocab_size is {n_vocab:,}; download the model's own tokenizer_config.json"
            )


def _add(folder: Path, tokenizer: Tokenizer, said: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in said:
        by_id = {int(i): AddedToken(**_fields(t)) for i, t in said["added_tokens_decoder"].items()}
    else:
        said |= _special_tokens_map(folder, said)
        special = {str(_token(t)) for t in _special(said)}
        for text, i in _object(folder / "added_tokens.json").items():
            own = str(text) in special
            by_id[int(i)] = AddedToken(text, rstrip=False, lstrip=False, normalized=not own, special=own)
        for entry in json.loads(tokenizer.to_str())["added_tokens"]:
            by_id[entry["id"]] = AddedToken(**_fields(entry))
    by_text = {str(t): t for t in by_id.values()}
    padding = tokenizer.padding
    if padding is not None:
        said.setdefault("pad_token", padding["pad_token"])
    wanted: list[AddedToken | str] = []
    for key in _NAMED:
        if said.get(key) is not None:
            token = _token(said[key])
            wanted.append(by_text.get(str(token), token))
    wanted += [_token(t) for t in _special({k: v for k, v in said.items() if k not in _NAMED})]
    present = tokenizer.get_added_tokens_decoder()
    # includes tokens that tokenizer.json has too: some of them become special
    missing: list[AddedToken | str] = [t for _, t in sorted(by_id.items())]
    texts = [str(t) for _, t in sorted(present.items())] + [str(t) for t in missing]
    seen: set[str] = set()
    for candidate in wanted:
        if str(candidate) in seen:
            continue
        seen.add(str(candidate))
        # a plain text that exists is not added again; an AddedToken is, because of its flags
        if not (isinstance(candidate, str) and candidate in texts) and candidate not in missing:
            missing.append(candidate)
    special = {str(t) for t in wanted}
    tokens = []
    for candidate in missing:
        own = str(candidate) in special
        token = AddedToken(candidate, special=own) if isinstance(candidate, str) else candidate
        if not isinstance(candidate, str):
            token.special = bool(token.special) or own
        tokens.append(token)
    tokenizer.add_tokens(tokens)


def _special_tokens_map(folder: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return special_tokens_map.json: it overrides tokenizer_config.json, and its tokens are special."""
    out: dict[str, Any] = {}
    for key, value in _object(folder / "special_tokens_map.json").items():
        if isinstance(value, dict):
            out[key] = {**value, "special": True}
        elif key == _MORE and isinstance(value, list):
            more = list(said.get(_MORE) or [])
            for item in value:
                token = {**item, "special": True} if isinstance(item, dict) else item
                if token not in more:
                    more.append(token)
            out[key] = more
        else:
            out[key] = value
    return out


def _special(said: Mapping[str, Any]) -> Iterable[Any]:
    """Yield every named special token: by a role, in the list of additional ones, or under the model's own names."""
    for key in _NAMED:
        if said.get(key) is not None:
            yield said[key]
    yield from said.get(_MORE) or []
    extra = said.get("extra_special_tokens") or {}
    yield from extra.values() if isinstance(extra, dict) else extra


def _token(value: Any) -> AddedToken | str:
    from tokenizers import AddedToken

    if isinstance(value, dict):
        return AddedToken(**_fields(value))
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no token")
    return value


def _fields(token: Any) -> dict[str, Any]:
    """Return the fields of a token, without further ones that files may have, such as an id or type."""
    if not isinstance(token, dict):
        raise TypeError(f"{token!r:.60} is no token")
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: token[name] for name in names if name in token}


def _class_name(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the class of transformers with which a converter loads the tokenizer."""
    name = config.get("tokenizer_class")
    if name is None:
        model = _object(folder / "config.json")
        name = model.get("tokenizer_class") or _OF_MODEL.get(str(model.get("model_type")))
    return str(name).removesuffix("Fast")


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise SourceError(f"{file}: cannot be read: {' '.join(str(e).split())[:200]}; download it again") from None
    if not isinstance(value, dict):
        raise SourceError(f"{file}: is {value!r:.60}, not an object; download it again")
    return value
