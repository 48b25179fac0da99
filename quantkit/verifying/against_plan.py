"""Compares a file with a plan: the tensors, with their order, shapes, types and bytes; and the keys.

A plan comes from a recipe and a model, or from the output of `quantkit plan --json`, which has no keys. The expected
keys are derived here a second time. Source: src/llama-quant.cpp, tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import SourceError
from ..base.first_bytes import ENOUGH, not_the_file
from ..gguf.types import FILE_TYPES, QTYPES
from ..imatrix.matrix import Imatrix
from ..imatrix.policies import Policy, parse_policy
from ..planning.plan import Plan
from ..rounding.options import VERSION as ROUNDING_VERSION
from .gguf import Gguf, Key, regular
from .rounding import PREFIX, first_difference
from .structure import SHARD_NAME, SPLIT_KEYS
from .verdict import Finding, Findings, Verdict

_MAX_PLAN = 1 << 28
#: bytes that llama-quantize keeps of a text in a key
_MOST_NOTED = 127
#: the key for the policy that filled gaps in the importance matrix, if it changed anything
_POLICY_KEY = "quantkit.imatrix.policy"
_U32, _F32, _BOOL, _STR, _ARR = 4, 6, 7, 8, 9


class Expected(NamedTuple):
    """A tensor according to the plan."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


def expected_of(plan: Plan) -> list[Expected]:
    return [Expected(t.tensor.name, trimmed(t.tensor.shape), t.type, t.nbytes) for t in plan.tensors]


def read_plan(path: Path) -> list[Expected]:
    """Read the tensors of a plan printed by `quantkit plan --json`. Raises SourceError."""
    try:
        if regular(path) > _MAX_PLAN:
            raise SourceError(f"{path}: too large for a plan (at most {_MAX_PLAN:,} bytes)")
        raw = path.read_bytes()
        if says := not_the_file(raw[:ENOUGH]):
            raise SourceError(f"{path}: {says}")
        tensors = json.loads(raw)["tensors"]
        made = [_entry(path, t["name"], t["shape"], t["type"], t["bytes"]) for t in tensors]
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SourceError(f"{path}: is not a plan; make one with: quantkit plan SOURCE --recipe R --json") from None
    if not made or len({t.name for t in made}) != len(made):
        raise SourceError(f"{path}: the plan has no tensors, or one of them twice")
    return made


def _entry(path: Path, name: Any, shape: Any, type_: Any, nbytes: Any) -> Expected:
    ok = isinstance(name, str) and isinstance(shape, list) and shape and isinstance(nbytes, int)
    if not ok or not all(isinstance(n, int) and n > 0 for n in shape) or type_ not in QTYPES:
        raise SourceError(f"{path}: is not a plan: the entry of {name!r:.80} is malformed")
    return Expected(name, trimmed(tuple(shape)), type_, nbytes)


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove trailing ones, which ggml does not count."""
    n = len(shape)
    while n > 1 and shape[n - 1] == 1:
        n -= 1
    return shape[:n]


def check_tensors(files: Iterable[Gguf], whole: bool, expected: list[Expected], findings: Findings) -> None:
    """Check that the file has every tensor of the plan and no other, in the plan's order. If a shard is missing
    (`whole` is False), missing tensors are not reported."""
    wanted = {t.name: t for t in expected}
    place = {t.name: i for i, t in enumerate(expected)}
    seen: set[str] = set()
    last = -1
    name_of_file = ""
    for g in files:
        name_of_file = name_of_file or g.name
        for t in g.tensors:
            want = wanted.get(t.name)
            if want is None:
                findings.add(Finding("plan", g.name, "the plan has no such tensor", t.name, t.start))
                continue
            seen.add(t.name)
            for what, a, b in (
                ("type", want.type, t.type.name),
                ("shape", _shape(want.shape), _shape(trimmed(t.shape))),
                ("bytes", f"{want.nbytes:,}", f"{t.nbytes:,}"),
            ):
                if a != b:
                    findings.add(Finding("plan", g.name, what, t.name, t.start, expected=a, found=b))
            if place[t.name] < last:
                findings.add(
                    Finding("plan", g.name, f"comes after '{expected[last].name}', not before it", t.name, t.start)
                )
            last = max(last, place[t.name])
    if whole:
        for want in expected:
            if want.name not in seen:
                findings.add(
                    Finding("plan", name_of_file, "is missing", want.name, expected=f"{want.type} {_shape(want.shape)}")
                )


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


# ---------------------------------------------------------------- keys


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _expected_keys(plan: Plan, imatrix: Imatrix | None) -> dict[str, tuple[int, bytes]]:
    """The keys of the output in order: name -> (type, bytes of the value). Setting an existing key moves it to the
    end."""
    keys = {
        item.key: (item.type, item.payload)
        for item in plan.catalogue.kvs
        if item.key not in (*SPLIT_KEYS, _POLICY_KEY) and not item.key.startswith(PREFIX)
    }
    if keys.get("general.alignment", (_U32, struct.pack("<I", 32))) != (_U32, struct.pack("<I", 32)):
        del keys["general.alignment"]  # builds align to 32, whatever the source's alignment

    def put(name: str, type_: int, raw: bytes) -> None:
        keys.pop(name, None)
        keys[name] = (type_, raw)

    put("general.quantization_version", _U32, struct.pack("<I", 2))
    put("general.file_type", _U32, struct.pack("<I", FILE_TYPES[plan.recipe.file_type]))
    for item in plan.recipe.metadata:
        if item.type == "str":
            put(item.key, _STR, _text(str(item.value).encode()))
        else:
            type_, form = {"int": (_U32, "<I"), "float": (_F32, "<f"), "bool": (_BOOL, "<?")}[item.type]
            put(item.key, type_, struct.pack(form, item.value))
    if imatrix is not None:
        put("quantize.imatrix.file", _STR, _text(imatrix.path_as_given.encode()[:_MOST_NOTED]))
        if imatrix.datasets:
            put("quantize.imatrix.dataset", _STR, _text(imatrix.datasets[0].encode()[:_MOST_NOTED]))
        put("quantize.imatrix.entries_count", _U32, struct.pack("<I", len(imatrix.entries)))
        if imatrix.n_chunks > 0:
            put("quantize.imatrix.chunks_count", _U32, struct.pack("<I", imatrix.n_chunks))
        if plan.applied:
            put(_POLICY_KEY, _STR, _text(plan.applied.encode()))
    rounding = plan.rounding
    listed = [] if rounding is None else rounding.listed()
    if rounding is not None and listed:
        put(PREFIX + "version", _U32, struct.pack("<I", ROUNDING_VERSION))
        put(PREFIX + "options", _STR, _text(rounding.options.encode()))
        policy = rounding.policy
        said = rounding.recorded_policy if policy is None else f"{policy.name} (sha256 {policy.digest})"
        if said:
            put(PREFIX + "policy", _STR, _text(said.encode()))
        if rounding.device is not None:
            put(PREFIX + "device", _STR, _text(rounding.device.text.encode()))
        if rounding.covariance is not None:
            name, digest = rounding.digest()
            put(PREFIX + name, _STR, _text(digest.encode()))
            if rounding.covariance.held_out is not None:
                put(PREFIX + "held_out", _STR, _text(rounding.covariance.held_out.digest.encode()))
            if rounding.covariance.weighting:
                put(PREFIX + "weights", _STR, _text(rounding.covariance.weighting.encode()))
            put(PREFIX + "tokens", _U32, struct.pack("<I", rounding.covariance.n_tokens))
        texts = b"".join(_text(line.encode()) for line in listed)
        put(PREFIX + "tensors", _ARR, struct.pack("<IQ", _STR, len(listed)) + texts)
    return keys


def check_keys(
    files: Iterable[Gguf], plan: Plan, imatrix: Imatrix | None, ignored: Collection[str], verdict: Verdict
) -> None:
    """Check that the keys of the first file are the plan's, in its order, and that later shards have only split keys.

    The path in quantize.imatrix.* is not compared, since it is as the builder typed it. Without an `imatrix`, none of
    these keys is compared, nor a recorded policy. For a plan from a config alone, only `<arch>.*` and the file type are
    known.
    """
    findings = verdict.findings
    wanted = _expected_keys(plan, imatrix)
    if not plan.catalogue.kvs_complete:
        sure = ("general.architecture", "general.quantization_version", "general.file_type")
        wanted = {k: v for k, v in wanted.items() if k in sure or k.startswith(plan.catalogue.arch + ".")}
        verdict.notes.append("the tokenizer's and general keys were not compared: only the config is known")
    for g in files:
        m = SHARD_NAME.match(g.name)
        if m is not None and int(m["no"]) > 1:
            for key in g.keys.values():
                if key.name not in SPLIT_KEYS:
                    text = f"key '{key.name}' belongs in the first shard"
                    findings.add(Finding("metadata", g.name, text, offset=key.offset, found=key.shown()))
            continue
        _check_first(g, wanted, plan, imatrix, ignored, verdict)


def _check_first(
    g: Gguf, wanted: dict[str, tuple[int, bytes]], plan: Plan, imatrix: Imatrix | None, ignored: Collection[str],
    verdict: Verdict,
) -> None:  # fmt: skip
    complete, rounding = plan.catalogue.kvs_complete, plan.rounding
    # without the covariance, neither its digest nor the fallbacks without it are known
    is_rounded = rounding is not None and rounding.covariance is None

    def skip(name: str) -> bool:
        of_imatrix = name.startswith("quantize.imatrix.") or name == _POLICY_KEY
        return name in ignored or (of_imatrix and imatrix is None) or (is_rounded and name.startswith(PREFIX))

    def wrong(text: str, key: Key | None, expected: str, found: str) -> None:
        offset = key.offset if key else None
        verdict.findings.add(Finding("metadata", g.name, text, offset=offset, expected=expected, found=found))

    if is_rounded and any(name.startswith(PREFIX) for name in g.keys):
        verdict.notes.append(f"{PREFIX}* were not compared: give the covariance with --covariance")
    if imatrix is None and any(name.startswith("quantize.imatrix.") for name in g.keys):
        verdict.notes.append("quantize.imatrix.* were not compared: give the importance matrix with --imatrix")
    for name, (type_, raw) in wanted.items():
        if skip(name):
            continue
        key = g.keys.get(name)
        want = Key(name, type_, raw, 0)
        if key is None:
            wrong(f"key '{name}' is missing", None, want.shown(), "nothing")
        elif key.type != type_ or (key.raw != raw and name != "quantize.imatrix.file"):
            expected, found = want.shown(), key.shown()
            if name == PREFIX + "tensors":
                expected, found = first_difference(raw, key.raw)
            elif expected == found:
                at = next(i for i, (a, b) in enumerate(zip(raw + b"\0", key.raw + b"\1", strict=False)) if a != b)
                expected, found = f"{expected}, {raw[at : at + 8].hex()} at {at:,}", key.raw[at : at + 8].hex()
            wrong(f"key '{name}'", key, expected, found)
        elif key.raw != raw:
            verdict.notes.append(
                f"{name} is {key.shown()} in {g.name}; the one given is {imatrix.path_as_given if imatrix else ''}"
            )
    if not complete:
        return
    for name, key in g.keys.items():
        if name not in wanted and name not in SPLIT_KEYS and not skip(name):
            wrong(f"key '{name}' is not in the plan", key, "nothing", key.shown())
    common = [name for name in wanted if name in g.keys and not skip(name)]
    there = [name for name in g.keys if name in wanted and not skip(name)]
    for a, b in zip(common, there, strict=True):
        if a != b:
            wrong("the order of the keys", g.keys[b], f"'{a}'", f"'{b}'")
            break


def recorded_policy(files: Iterable[Gguf]) -> Policy | None:
    """The policy for gaps in the importance matrix that the file records; None if it records none, or an unknown
    one."""
    for g in files:
        key = g.keys.get(_POLICY_KEY)
        if key is not None and key.type == _STR:
            try:
                return parse_policy(key.raw[8:].decode().partition(": ")[0])
            except ValueError:
                return None
    return None


def uses_imatrix(files: Iterable[Gguf]) -> str | None:
    """The importance matrix that the file says it was made with, or None."""
    for g in files:
        key = g.keys.get("quantize.imatrix.file")
        if key is not None:
            return key.shown(limit=200)
    return None
