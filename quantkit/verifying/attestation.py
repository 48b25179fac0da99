"""What was built from what: an in-toto statement (v1) with SLSA provenance (v1) as its predicate.

    subject                the output files, by SHA-256
    externalParameters     the recipe's text, its base's, and what else was asked for
    internalParameters     what the plan came to: tensors, bytes, and a digest of every tensor's type
    resolvedDependencies   the source's files and the importance matrix
    runDetails             versions

The digests are evidence.py's. The statement is not signed: any in-toto tool can do that.
See https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import SourceError
from ..base.version import __version__
from ..planning.plan import Plan
from ..recipe.changes import Changes
from .against_plan import Expected, expected_of
from .evidence import Evidence, Inputs, file_digest, gather
from .gguf import regular
from .manifest import read_json
from .verdict import Finding, Findings, Progress

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:quantkit:build:1"
BUILDER = "urn:quantkit:cli"


class AskedRounding(NamedTuple):
    """How tensors were to be rounded otherwise than by ggml."""

    method: str
    """what --rounding said; '' where a policy or the recipe did"""
    policy: tuple[str, str] | None = None
    """the text of the policy, and the name of its file"""
    by_option: bool = True
    """whether the command line said so, and not the recipe"""

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"method": self.method, "byOption": self.by_option}
        return made if self.policy is None else {**made, "policy": _text_and_digest(*self.policy)}


@dataclass(frozen=True)
class Asked:
    """What a build was asked for: the recipe's text, --set's, and options that change the bytes."""

    recipe_name: str
    """as given: a shipped recipe's name, or the path of a file"""
    recipe_text: str
    sets: Mapping[str, str] = field(default_factory=dict)
    mixture_version: str = "current"
    layout: str = "k_b+v_b"
    pre: str | None = None
    pad_token: str | None = None
    split_max_size: int | None = None
    allow_requantize: bool = False
    engine: str = "native"
    base_text: tuple[str, str] | None = None
    """the text of the recipe's base, and the name of its file"""
    imatrix_policy: str | None = None
    """what stands in for data that the importance matrix lacks, where it was given beside the recipe"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """what --type and the like changed in the recipe (quantkit.recipe.changes)"""
    rounding: AskedRounding | None = None
    """None where ggml rounds all, or only the recipe's own words say otherwise"""
    rounding_device: str | None = None
    """where torch rounded rows, as the file says it; None for the CPU's own kernels"""

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": {
                **_text_and_digest(self.recipe_text, Path(self.recipe_name).name),
                "set": dict(self.sets),
                **({} if self.base_text is None else {"base": _text_and_digest(*self.base_text)}),
                **({"changes": dict(self.changes)} if self.changes else {}),
            },
            "mixtureVersion": self.mixture_version,
            "layout": self.layout,
            "pre": self.pre,
            "padToken": self.pad_token,
            "splitMaxSize": self.split_max_size,
            "allowRequantize": self.allow_requantize,
            "engine": self.engine,
            "imatrixPolicy": self.imatrix_policy,
            **({} if self.rounding is None else {"rounding": self.rounding.to_json()}),
            **({} if self.rounding_device is None else {"roundingDevice": self.rounding_device}),
        }


def _text_and_digest(text: str, name: str) -> dict[str, str]:
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}


def plan_digest(tensors: Iterable[Expected]) -> str:
    """SHA-256 of every tensor's name, shape, type and bytes, in order: a JSON array a line."""
    sha = hashlib.sha256()
    for t in tensors:
        line = json.dumps([t.name, list(t.shape), t.type, t.nbytes], separators=(",", ":"), ensure_ascii=True)
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()


def subjects(paths: Sequence[Path], progress: Progress) -> list[dict[str, Any]]:
    """The output files with their digests."""
    progress.start("hashes", sum(regular(p) for p in paths), "B")
    return [{"name": p.name, "digest": {"sha256": file_digest(p, progress=progress)}} for p in paths]


def statement(
    plan: Plan,
    evidence: Evidence,
    asked: Asked,
    files: Sequence[Path],
    versions: Mapping[str, str],
    progress: Progress,
    whole: bool = False,
) -> dict[str, Any]:
    """The statement of a finished build. `evidence`: what `gather` found before it; `files`: the output; `versions`:
    of what else made the bytes (ggml); `whole`: hash all of the source. Raises SourceError when a file cannot be read,
    or has changed."""
    tensors = expected_of(plan)
    inside = {
        "model": plan.catalogue.model,
        "arch": plan.catalogue.arch,
        "tensors": len(tensors),
        "tensorBytes": plan.tensor_bytes,
        "types": plan.types(),
        "planSha256": plan_digest(tensors),
    }
    return {
        "_type": STATEMENT,
        "subject": subjects(files, progress),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": asked.to_json(),
                "internalParameters": inside,
                "resolvedDependencies": evidence.to_json(whole, progress),
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"quantkit": __version__, **versions}}},
        },
    }


# ---------------------------------------------------------------- read back


@dataclass(frozen=True)
class Attested:
    """What a statement says, its form checked."""

    subjects: dict[str, str]
    """file name -> SHA-256"""
    asked: Asked
    plan_sha256: str
    dependencies: list[dict[str, Any]]


def read(path: Path) -> Attested:
    """A statement that `build --attest` wrote. Raises SourceError for anything else."""
    value = read_json(path, "an attestation")
    if value.get("_type") != STATEMENT or value.get("predicateType") != PREDICATE:
        raise SourceError(
            f"{path}: is not an in-toto statement of a build, but of type {value.get('_type')!r:.60} with "
            f"{value.get('predicateType')!r:.60}; give what build --attest wrote (without a signing envelope)"
        )
    try:
        definition = value["predicate"]["buildDefinition"]
        if definition["buildType"] != BUILD_TYPE:
            raise SourceError(f"{path}: attests another kind of build: {definition['buildType']!r:.60}")
        outside, recipe = definition["externalParameters"], definition["externalParameters"]["recipe"]
        base = recipe.get("base")
        made = Attested(
            {str(s["name"]): str(s["digest"]["sha256"]) for s in value["subject"]},
            Asked(
                str(recipe["name"]), str(recipe["text"]), {str(k): str(v) for k, v in recipe["set"].items()},
                str(outside["mixtureVersion"]), str(outside["layout"]), _text(outside["pre"]),
                _text(outside["padToken"]), outside["splitMaxSize"], bool(outside["allowRequantize"]),
                str(outside["engine"]), base and (str(base["text"]), str(base["name"])),
                _text(outside.get("imatrixPolicy")),  # older statements have none
                Changes.from_json(recipe.get("changes", {})).to_json(),
                _asked_rounding(outside.get("rounding")),
                _text(outside.get("roundingDevice")),
            ),
            str(definition["internalParameters"]["planSha256"]),
            [
                {
                    "name": str(d["name"]),
                    "digest": {str(k): str(v) for k, v in d["digest"].items()},
                    "annotations": dict(d["annotations"]),
                }
                for d in definition["resolvedDependencies"]
            ],
        )  # fmt: skip
        said = [(made.asked.recipe_text, str(recipe["sha256"]))]
        if base is not None:
            said.append((str(base["text"]), str(base["sha256"])))
        policy = None if made.asked.rounding is None else made.asked.rounding.policy
        edited = policy is not None and not _is_of(policy[0], str(outside["rounding"]["policy"]["sha256"]))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise SourceError(f"{path}: the attestation is malformed at {str(e)[:60]}") from None
    if edited:
        raise SourceError(f"{path}: the policy's text is not the one whose SHA-256 stands beside it; it was edited")
    if not all(_is_of(text, sha) for text, sha in said):
        raise SourceError(f"{path}: the recipe's text is not the one whose SHA-256 stands beside it; it was edited")
    if not made.subjects:
        raise SourceError(f"{path}: attests no file")
    return made


def _is_of(text: str, sha: str) -> bool:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == sha


def _asked_rounding(said: Any) -> AskedRounding | None:
    if said is None:
        return None
    policy = said.get("policy")
    text = policy and (str(policy["text"]), str(policy["name"]))
    return AskedRounding(str(said["method"]), text, bool(said["byOption"]))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def compare_files(attested: Attested, digests: Mapping[str, str], findings: Findings) -> None:
    """The files are those attested. `digests`: file name -> SHA-256. A renamed file goes by its digest."""
    known = set(attested.subjects.values())
    for name, sha in digests.items():
        want = attested.subjects.get(name)
        if want is None and sha not in known:
            findings.add(Finding("attestation", name, "is not attested", found=f"SHA-256 {sha}"))
        elif want is not None and want != sha:
            findings.add(Finding("attestation", name, "SHA-256", expected=want, found=sha))
    there = set(digests.values())
    for name, sha in attested.subjects.items():
        if name not in digests and sha not in there:
            findings.add(Finding("attestation", name, "is attested, but not here"))


def compare_plan(attested: Attested, tensors: Iterable[Expected], findings: Findings) -> None:
    """The plan made now is the one of the build."""
    found = plan_digest(tensors)
    if found != attested.plan_sha256:
        text = "the plan made now is not the attested one (digest of all names, shapes, types and bytes)"
        findings.add(Finding("attestation", "", text, expected=attested.plan_sha256, found=found))


def compare_sources(attested: Attested, inputs: Inputs, whole: bool, findings: Findings, progress: Progress) -> None:
    """The source, the importance matrix and the covariance given are those of the build, as far as was asked to look:
    of big files the header and the length, and with `whole` every byte. Where the statement lacks a digest that was
    asked for, that is a finding."""

    def of(role: str) -> dict[str, dict[str, Any]]:
        return {d["name"]: d for d in attested.dependencies if d["annotations"].get("role") == role}

    source, imatrix, covariance = inputs
    found: list[dict[str, Any]] = []
    if source is not None:
        found = gather(source, imatrix, progress, covariance).to_json(whole, progress)
    elif imatrix is not None:
        progress.start("source hashes", regular(imatrix.path), "B")
        notes = {"role": "imatrix", "bytes": regular(imatrix.path)}
        sha = file_digest(imatrix.path, progress=progress)
        found = [{"name": imatrix.path.name, "digest": {"sha256": sha}, "annotations": notes}]
    roles = [
        role
        for role, given in (("source", source), ("imatrix", imatrix), ("covariance", covariance))
        if given is not None
    ]
    for role in roles:
        wanted = of(role)
        if role == "covariance" and not wanted and of("text"):
            continue  # computed in the build: the file itself says of which pass
        there = {d["name"]: d for d in found if d["annotations"]["role"] == role}
        if role != "source" and len(wanted) == len(there) == 1:  # of any name
            there = dict(zip(wanted, there.values(), strict=True))
        for name, item in there.items():
            want = wanted.get(name)
            if want is None:
                findings.add(Finding("source", name, f"is no {role} of the build"))
                continue
            _compare_one(name, want, item, findings)
        for name in wanted.keys() - there.keys():
            findings.add(Finding("source", name, f"is a {role} of the build, but not here"))


def _compare_one(name: str, want: Mapping[str, Any], item: Mapping[str, Any], findings: Findings) -> None:
    a, b = want["annotations"].get("bytes"), item["annotations"]["bytes"]
    if a != b:
        findings.add(Finding("source", name, "bytes", expected=str(a), found=str(b)))
    for kind, sha in item["digest"].items():
        given = want["digest"].get(kind, "none: it was not hashed whole")
        if given != sha:
            findings.add(Finding("source", name, kind, expected=given, found=sha))
