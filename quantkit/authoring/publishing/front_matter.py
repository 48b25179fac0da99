"""The front of a model card: the fields that the Hub documents, from what the GGUFs say or from what was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ...base.errors import SourceError
from ...gguf.header import ARRAY, decode
from ...hub.address import is_hub, parse
from .parcel import Model

#: the licences that the Hub knows by name; any other is `other` with its name beside
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
#: keys that name the repository of the source itself, before those that name what it was made from
_OWN = ("general.source.repo_url", "general.repo_url", "general.source.huggingface.repository")
_BASE = "general.base_model.0.repo_url"


class Front(NamedTuple):
    """`notes` say what is missing or guessed."""

    fields: Mapping[str, Any]
    notes: tuple[str, ...]

    def text(self) -> str:
        said = yaml.safe_dump(dict(self.fields), sort_keys=False, allow_unicode=True, default_flow_style=False)
        return f"---\n{said}---\n"


def metadata(model: Model) -> dict[str, Any]:
    """What is no array of a GGUF's metadata."""
    return {item.key: decode(item) for item in model.catalogue.kvs if item.type != ARRAY}


def front_of(models: Sequence[Model], license_: str | None, base_model: str | None) -> Front:
    """Raises SourceError for files of different licences, and for a base model that is no repository."""
    fields: dict[str, Any] = {}
    notes = []
    said = [metadata(model) for model in models]
    licences = list(dict.fromkeys(text for kvs in said if (text := _text(kvs, "general.license"))))
    if license_ is None and len(licences) > 1:
        raise SourceError(f"the files have different licences ({', '.join(licences)}); give one with --license")
    name = license_ or (licences[0] if licences else None)
    if name is None:
        notes.append("no licence is known; give --license")
    else:
        fields |= _license(name, said[0] if license_ is None else {})
    if base_model is not None:
        fields |= {"base_model": _repo_of(base_model), "base_model_relation": "quantized"}
    else:
        own = _repos(said, _OWN)
        if own:
            fields |= {"base_model": own[0] if len(own) == 1 else own, "base_model_relation": "quantized"}
        elif base := _repos(said, (_BASE,)):
            fields["base_model"] = base[0] if len(base) == 1 else base
            notes.append(
                f"base_model is {', '.join(base)}, which the source was made from; give --base-model ORG/NAME if the "
                "source is on the Hub itself"
            )
        else:
            notes.append("no base model is known; give --base-model ORG/NAME")
    return Front(fields | {"library_name": "gguf", "tags": ["gguf", "quantkit"]}, tuple(notes))


def _license(name: str, kvs: Mapping[str, Any]) -> dict[str, str]:
    known = name.strip().lower()
    link = _text(kvs, "general.license.link")
    said = {"license": known if known in LICENSES else "other"}
    if said["license"] == "other":
        named = (_text(kvs, "general.license.name") or name) if known == "other" else name
        slug = re.sub(r"[^a-z0-9.]+", "-", named.lower()).strip("-.")[:64]
        if slug and slug != "other":
            said["license_name"] = slug
        if re.fullmatch(r"https://[\w.-]+(/[\w./%~+-]*)?", link or "", re.ASCII):
            said["license_link"] = str(link)
    return said


def _text(kvs: Mapping[str, Any], key: str) -> str | None:
    value = kvs.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _repo_of(name: str) -> str:
    address = parse(name if is_hub(name) or "://" in name else f"hf://{name}")
    return address.repo


def _repos(said: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """The repositories of the Hub that the first of the keys in each file names."""
    found = []
    for kvs in said:
        for key in keys:
            text = _text(kvs, key)
            try:
                if text and (is_hub(text) or re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII)):
                    found.append(_repo_of(text))
                    break
            except SourceError:
                continue
    return list(dict.fromkeys(found))
