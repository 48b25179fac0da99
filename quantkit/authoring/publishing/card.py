"""The model card: what the files are, how they were made, how good they are, and how to check them.

Nothing in it is made up: what the GGUFs, their attestations and an evaluation do not say is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.text import short_size, size
from ...gguf.types import STORED_TYPES
from ...hub.address import Address
from ...model.catalogue import Tensor
from ...planning.file_layout import POLICY_KEY, ROUNDING_PREFIX
from .evaluation import Measured
from .front_matter import Front, metadata
from .markdown import code, fenced, plain, table
from .parcel import Model, Parcel, attestation, recipe_of

#: characters of a recipe that are shown
_LONGEST_RECIPE = 1 << 16


def card_text(parcel: Parcel, front: Front, measured: Measured | None, to: Address) -> str:
    """The whole of README.md."""
    models = sorted(parcel.models, key=lambda m: m.nbytes)
    about = models[0].catalogue
    elements = sum(t.n_elements for t in about.tensors)
    made = "made with quantkit" if all(attestation(m) for m in models) else "published with quantkit"
    parts = [
        f"# {plain(to.repo.split('/')[1])}",
        f"GGUFs of {plain(about.model)} ({code(about.arch)}, {about.n_layers} layers, {elements:,} weights), {made}.",
        "## Files",
        _ladder(models),
    ]
    if parcel.imatrices:
        listed = ", ".join(f"{code(p.name)} ({short_size(p.stat().st_size)})" for p in parcel.imatrices)
        parts.append(f"Importance matrix: {listed}.")
    if measured is not None:
        parts += ["## Quality", *_quality(measured, parcel.titles)]
    for model in models:
        parts += [f"## {plain(model.title)}", *_details(model)]
    parts += ["## Check and run", *_checks(models, to)]
    return front.text() + "\n" + "\n\n".join(parts) + "\n"


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows for t in tensors)


def _bpw(tensors: Sequence[Tensor]) -> float:
    return 8 * _bytes(tensors) / max(1, sum(t.n_elements for t in tensors))


def _ladder(models: Sequence[Model]) -> str:
    rows = []
    for model in models:
        n = len(model.files)
        name = code(model.files[0].name) + (f" and {n - 1} more" if n > 1 else "")
        rows.append([name, str(n), size(model.nbytes), f"{_bpw(model.catalogue.tensors):.2f}"])
    return table(rows, ["file", "files", "size", "bits a weight"], (1, 3))


def _details(model: Model) -> list[str]:
    kvs = metadata(model)
    parts = [_by_role(model.catalogue.tensors)]
    if said := _imatrix(kvs):
        parts.append(f"Importance matrix: {said}.")
    if f"{ROUNDING_PREFIX}options" in kvs:
        parts.append(_rounding(kvs))
    parts += _recipe(model)
    return parts


def _by_role(tensors: Sequence[Tensor]) -> str:
    roles: dict[str, list[Tensor]] = {}
    for t in tensors:
        roles.setdefault(str(t.role), []).append(t)
    rows = []
    for role, of in sorted(roles.items(), key=lambda item: -_bytes(item[1])):
        counts: dict[str, int] = {}
        for t in of:
            counts[t.source_type] = counts.get(t.source_type, 0) + 1
        types = ", ".join(f"{kind} ({n})" for kind, n in sorted(counts.items(), key=lambda item: -item[1]))
        rows.append([plain(role), types, short_size(_bytes(of)), f"{_bpw(of):.2f}"])
    return table(rows, ["role", "types (tensors)", "size", "bits a weight"], (2, 3))


def _imatrix(kvs: Mapping[str, Any]) -> str:
    named = kvs.get("quantize.imatrix.file")
    if named is None:
        return ""
    said = [code(str(named).replace("\\", "/").rsplit("/", 1)[-1])]
    if text := kvs.get("quantize.imatrix.dataset"):
        said.append(f"from the text {code(str(text).replace(chr(92), '/').rsplit('/', 1)[-1])}")
    if isinstance(chunks := kvs.get("quantize.imatrix.chunks_count"), int):
        said.append(f"{chunks:,} chunks")
    if isinstance(entries := kvs.get("quantize.imatrix.entries_count"), int):
        said.append(f"{entries:,} entries")
    if policy := kvs.get(POLICY_KEY):
        said.append(f"where it has no data: {code(str(policy))}")
    return ", ".join(said)


def _rounding(kvs: Mapping[str, Any]) -> str:
    said = f"Rounding: not as ggml does it, but {code(str(kvs[f'{ROUNDING_PREFIX}options']))}"
    if isinstance(tokens := kvs.get(f"{ROUNDING_PREFIX}tokens"), int) and tokens:
        said += f", by a covariance of {tokens:,} tokens"
    if digest := kvs.get(f"{ROUNDING_PREFIX}covariance"):
        said += f" (SHA-256 {code(str(digest))})"
    return f"{said}. The file's own metadata names the tensors."


def _recipe(model: Model) -> list[str]:
    predicate, recipe = attestation(model), recipe_of(model)
    if predicate is None or recipe is None:
        return []
    parts = [f"The recipe {code(str(recipe.get('name')))}, which says why each tensor has its type:"]
    text = recipe["text"]
    cut = text if len(text) <= _LONGEST_RECIPE else f"{text[:_LONGEST_RECIPE]}\n# …"
    parts.append(fenced(cut, "yaml"))
    base = recipe.get("base")
    if isinstance(base, dict) and isinstance(base.get("text"), str):
        parts += [f"Its base {code(str(base.get('name')))}:", fenced(base["text"][:_LONGEST_RECIPE], "yaml")]
    changed = {k: recipe[k] for k in ("set", "changes") if isinstance(recipe.get(k), dict) and any(recipe[k].values())}
    if changed:
        listed = ", ".join(f"{code(str(k))}: {code(str(v))}" for of in changed.values() for k, v in of.items() if v)
        parts.append(f"Changed for this build: {listed}.")
    versions = predicate.get("runDetails", {}) if isinstance(predicate.get("runDetails"), dict) else {}
    builder = versions.get("builder", {})
    found = builder.get("version") if isinstance(builder, dict) else None
    if isinstance(found, dict):
        engine = predicate["buildDefinition"]["externalParameters"].get("engine")
        listed = ", ".join(f"{plain(str(k))} {plain(str(v))}" for k, v in found.items())
        parts.append(f"Built with {listed}, engine {plain(str(engine))}.")
    return parts


def _quality(measured: Measured, here: Sequence[str]) -> list[str]:
    rows = []
    for c in measured.candidates:
        rows.append(
            [
                plain(c.name) + ("" if c.name in here else " (not here)"),
                f"{c.bpw:.2f}",
                f"{c.ppl[0]:.4f} ± {c.ppl[1]:.4f}",
                f"{c.mean_kld[0]:.5f} ± {c.mean_kld[1]:.5f}",
                f"{c.kld_99:.4f}",
                f"{100 * c.same_top[0]:.2f} ± {100 * c.same_top[1]:.2f} %",
            ]
        )
    texts = ", ".join(code(t.replace("\\", "/").rsplit("/", 1)[-1]) for t in measured.texts)
    engine = "" if measured.engine == "native" else f", by {plain(measured.engine)}"
    return [
        table(rows, ["", "bits a weight", "perplexity", "mean KLD", "99 % KLD", "same top token"], (1, 2, 3, 4, 5)),
        f"Beside {plain(measured.reference)} (perplexity {measured.reference_ppl:.4f}) on {measured.n_tokens:,} tokens "
        f"of {texts}{engine}. KLD is in nats; ± is half of a 95 % interval, tokens taken as independent.",
    ]


def _checks(models: Sequence[Model], to: Address) -> list[str]:
    branch = [] if to.revision is None else ["--revision", to.revision]
    lines = [shlex.join(["hf", "download", to.repo, *branch, "--local-dir", "."])]
    for model in models:
        first = model.files[0].name
        command = ["quantkit", "verify", first if not first.startswith("-") else f"./{first}"]
        for kind in ("manifest", "attestation"):
            paper = next((q.path.name for q in model.papers if q.kind == kind), None)
            command += [f"--{kind}", paper] if paper else []
        lines.append(shlex.join(command))
    lines.append(shlex.join(["quantkit", "run-card", models[0].files[0].name]))
    papers = {q.kind for m in models for q in m.papers}
    said = {
        "manifest": "The manifest has the SHA-256 of every file and every tensor.",
        "attestation": "The attestation (in-toto, unsigned) says what was built from what.",
    }
    return [fenced("\n".join(lines), "sh"), *(text for kind, text in said.items() if kind in papers)]
