"""Manifests and attestations, and `quantkit verify` on the command line."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import pytest
from checking import GATE, MIX, Silent, assert_found, check, info_of, outcome_of, rules
from conftest import Run
from small_builds import plan_of

from quantkit.base.errors import SourceError
from quantkit.gguf.header import read_header
from quantkit.imatrix.matrix import open_imatrix
from quantkit.llama_cpp import toolchain
from quantkit.planning.plan import Plan
from quantkit.verifying import attestation, manifest
from quantkit.verifying.evidence import gather

MINE = """name: mine
arch: [deepseek2]
file_type: Q8_0
rules:
  - {match: "*", type: Q8_0, why: t}
"""


# ---------------------------------------------------------------- manifests


def test_a_manifest_finds_what_differs(sound: Path, copied: Path, tmp_path: Path) -> None:
    sums = outcome_of(sound, hashing=True)
    given = manifest.make(sums.files.files, sums.digests)
    t = read_header(sound).tensors[3]
    assert given["tensors"][3] == {
        "name": t.name, "file": sound.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes,
        "sha256": sha256(sound.read_bytes()[t.offset : t.offset + t.nbytes]),
    }  # fmt: skip
    assert given["files"] == [{"name": sound.name, "bytes": sound.stat().st_size, "sha256": sha256(sound.read_bytes())}]
    manifest.write_json(tmp_path / "m.json", given)
    given = manifest.read(tmp_path / "m.json")
    assert check(copied, manifest=given).ok
    renamed = copied.rename(copied.with_name("renamed.gguf"))
    assert check(renamed, manifest=given).ok
    factory.flip(renamed, t.offset + 1)
    verdict = check(renamed, manifest=given)
    assert [(f.kind, f.tensor, f.text) for f in verdict.findings.kept()] == [
        ("manifest", "", "SHA-256"), ("manifest", t.name, "SHA-256"),
    ]  # fmt: skip


def sha256(raw: bytes) -> str:
    import hashlib

    return hashlib.sha256(raw).hexdigest()


# ---------------------------------------------------------------- attestations


def attest(plan: Plan, imatrix: Path | None, out: Path, whole: bool = False) -> dict[str, Any]:
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    text = 'name: r\narch: [deepseek2, llama, qwen2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*", type: Q8_0, why: t}\n'
    asked = attestation.Asked("dir/r.yaml", text, pre="deepseek-v3")
    versions = {"ggml": toolchain.GGML_VERSION}
    assert plan.catalogue.source is not None
    evidence = gather(plan.catalogue.source, weights, Silent())
    return attestation.statement(plan, evidence, asked, [out], versions, Silent(), whole)


@pytest.mark.parametrize("whole", [False, True])
def test_an_attestation_names_what_was_built_from_what(
    whole: bool, sound: Path, copied: Path, sound_plan: Plan, v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    value = attest(sound_plan, tiny_imatrix, sound, whole)
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["subject"] == [{"name": sound.name, "digest": {"sha256": sha256(sound.read_bytes())}}]
    built = value["predicate"]["buildDefinition"]
    by_name = {d["name"]: d for d in built["resolvedDependencies"]}
    assert by_name["imatrix.gguf"]["digest"] == {"sha256": sha256(tiny_imatrix.read_bytes())}
    assert by_name["config.json"]["digest"] == {"sha256": sha256((v3 / "config.json").read_bytes())}
    shard = by_name["model-00001-of-00002.safetensors"]
    raw = (v3 / shard["name"]).read_bytes()
    n = 8 + int.from_bytes(raw[:8], "little")
    assert shard["digest"] == {"headerSha256": sha256(raw[:n])} | ({"sha256": sha256(raw)} if whole else {})
    manifest.write_json(tmp_path / "a.json", value)
    attested = attestation.read(tmp_path / "a.json")
    assert (attested.asked.recipe_name, attested.asked.pre) == ("r.yaml", "deepseek-v3")
    verdict = check(copied, sound_plan, tiny_imatrix, None, attested=attested)
    assert verdict.findings.kept() == []
    assert verdict.checked[-3:] == ["attested digests", "attested plan", "attested sources"]
    # change one value of the source
    factory.poke(v3, "model.norm.weight", 0, b"\x11")
    other = plan_of(v3, MIX, tiny_imatrix)
    assert check(copied, other, tiny_imatrix, None, attested=attested).ok
    says = r"safetensors: sha256: expected [0-9a-f]{64}, found" if whole else r"expected none: it was not hashed whole"
    verdict = check(copied, other, tiny_imatrix, None, attested=attested, hash_source=True)
    assert_found(verdict, "source", says)
    assert verdict.findings.count == (1 if whole else 2)
    # and one of the output
    factory.flip(copied, info_of(copied, GATE).offset + 20)
    assert_found(check(copied, attested=attested), "attestation", r"tiny\.gguf: SHA-256: expected")


def test_an_attestation_of_something_else_is_caught(
    sound: Path, sound_plan: Plan, tiny_v3: Path, tiny_imatrix: Path, v3: Path, tmp_path: Path
) -> None:
    manifest.write_json(tmp_path / "a.json", attest(sound_plan, tiny_imatrix, sound))
    attested = attestation.read(tmp_path / "a.json")
    other = plan_of(tiny_v3, rules('match: "*", type: Q8_0'), tiny_imatrix)
    assert_found(check(sound, other, tiny_imatrix, None, attested=attested), "attestation", "the plan made now is not")
    factory.edit_json(v3 / "generation_config.json", lambda c: c.update(top_p=0.5)) if (
        v3 / "generation_config.json"
    ).exists() else factory.edit_json(v3 / "config.json", lambda c: c.update(transformers_version="0"))
    changed = plan_of(v3, MIX, tiny_imatrix)
    assert_found(
        check(sound, changed, tiny_imatrix, None, attested=attested),
        "source",
        r"config\.json: (bytes|sha256): expected",
    )
    imatrix = factory.imatrix_for(sound_plan.catalogue, tmp_path / "other.gguf", seed=1)
    assert_found(
        check(sound, sound_plan, imatrix, None, attested=attested), "source", r"imatrix\.gguf: sha256: expected"
    )


def test_other_sources_than_the_attested_are_no_damage(
    sound: Path, copied: Path, sound_plan: Plan, tiny_imatrix: Path, v3: Path, tmp_path: Path
) -> None:
    """Nor are rows and keys that differ from what other sources would give, since the file matches its attestation."""
    manifest.write_json(tmp_path / "a.json", attest(sound_plan, tiny_imatrix, sound))
    attested = attestation.read(tmp_path / "a.json")
    factory.poke(v3, "model.layers.1.mlp.experts.2.up_proj.weight", 0, bytes(256 * 256))
    factory.edit_json(v3 / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    other = plan_of(v3, MIX, tiny_imatrix)
    verdict = check(sound, other, tiny_imatrix, "all", attested=attested)
    assert {"source", "metadata", "row"} <= verdict.findings.counts().keys()
    assert verdict.exit_code == 1
    assert verdict.line().startswith(
        "BUILT FROM OTHER FILES: it is the file of the attestation, but what was given as its source or importance "
        "matrix is not what it was built from: 1 file, 52 tensors, "
    )
    # a file that is not the attested one still counts as damaged
    factory.flip(copied, copied.stat().st_size - 40)
    damaged = check(copied, other, tiny_imatrix, "all", attested=attested)
    assert damaged.exit_code == 12
    assert damaged.line().startswith("DAMAGED: ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(_type="x"), "is not an in-toto statement of a build"),
        (lambda v: v["predicate"]["buildDefinition"].update(buildType="x"), "attests another kind of build"),
        (lambda v: v.update(subject=[]), "attests no file"),
        (lambda v: v["predicate"].clear(), "malformed at 'buildDefinition'"),
        (
            lambda v: v["predicate"]["buildDefinition"]["externalParameters"]["recipe"].update(text="name: x\n"),
            "it was edited",
        ),
    ],
)
def test_an_edited_attestation_is_refused(
    change: Callable[[Any], Any], says: str, sound: Path, sound_plan: Plan, tiny_imatrix: Path, tmp_path: Path
) -> None:
    value = attest(sound_plan, tiny_imatrix, sound)
    change(value)
    manifest.write_json(tmp_path / "a.json", value)
    with pytest.raises(SourceError, match=says):
        attestation.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"quantkit_manifest": 1, "files": [1], "tensors": []}', b"[" * 9999]
)
def test_what_is_no_manifest_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(raw)
    with pytest.raises(SourceError, match="is not a manifest"):
        manifest.read(tmp_path / "m.json")


# ---------------------------------------------------------------- the command line


def test_the_command_line(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    """Build, verify by recipe, by plan and by manifest; then with a flipped bit."""
    out, written = tmp_path / "out.gguf", tmp_path / "m.json"
    common = ("-r", "Q4_K_M", "--pre", "deepseek-v3")
    done = quantkit("build", tiny_v3, "-o", out, "-q", *common)
    assert done.returncode == 0, done.stderr
    done = quantkit("verify", out, "-s", tiny_v3, *common, "--write-manifest", written, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"note: wrote the manifest .*\nOK: 1 file, 52 tensors, [\d,]+ bytes; checked structure, plan, metadata, "
        r"scales, \d+ of [\d,]+ rows \(seed 0\)\n",
        done.stdout,
    ), done.stdout
    plan = tmp_path / "plan.json"
    plan.write_text(quantkit("plan", tiny_v3, *common, "--json").stdout)
    at = info_of(out, "blk.1.attn_output.weight").offset + 60
    factory.flip(out, at)
    done = quantkit("verify", out, "--plan", plan, "--manifest", written, "--json", "-q")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["ok"], verdict["counts"]) == (12, False, {"manifest": 2})
    assert {f.get("tensor") for f in verdict["findings"]} == {None, "blk.1.attn_output.weight"}
    again = tmp_path / "again.json"
    done = quantkit("verify", out, "-s", tiny_v3, *common, "--sample", "all", "-q", "--write-manifest", again)
    assert done.returncode == 12
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("DAMAGED: 1 finding (1 row) in 1 file")
    assert re.search(r"blk\.1\.attn_output\.weight: row 0, block 2 of 4: Q5_0 bytes are not what ggml", lines[-2])
    assert f"(byte {at:,})" in lines[-2]
    assert not again.exists()


def test_build_attests_and_verify_derives_again_from_that(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(MINE.replace("type: Q8_0,", "type: $down,") + "vars: {down: Q8_0}\n")
    out, file = tmp_path / "out.gguf", tmp_path / "a.json"
    common = ("-r", recipe, "--set", "down=Q5_K", "--pre", "deepseek-v3")
    done = quantkit("build", tiny_v3, "-o", out, *common, "--attest", file, "--split-max-size", "1M", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    statement = json.loads(file.read_text())
    assert len(statement["subject"]) == 3
    assert statement["predicate"]["runDetails"]["builder"]["version"].keys() == {"quantkit", "ggml"}
    recipe.unlink()
    first = tmp_path / "out-00001-of-00003.gguf"
    done = quantkit("verify", first, "--attestation", file, "-s", tiny_v3, "-q")
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"^OK: 3 files, .*plan, metadata, .* rows .*attested digests, attested plan, attested sources$", done.stdout
    )
    last = tmp_path / "out-00003-of-00003.gguf"
    factory.flip(last, last.stat().st_size - 1)
    done = quantkit("verify", first, "--attestation", file, "-q")
    assert done.returncode == 12
    assert "out-00003-of-00003.gguf: SHA-256: expected" in done.stdout


@pytest.mark.parametrize(
    ("attest", "says"),
    [
        ("out.gguf", "is given to --output and --attest both; give each a name of its own"),
        ("none/a.json", "there is no directory"),
        (".", "is a directory"),
    ],
)
def test_an_attestation_that_cannot_be_written_is_found_before_the_build(
    quantkit: Run, tiny_v3: Path, tmp_path: Path, attest: str, says: str
) -> None:
    common = ("-r", "Q8_0", "--pre", "deepseek-v3", "-o", "out.gguf", "--attest", attest)
    done = quantkit("build", tiny_v3, *common, cwd=tmp_path)
    assert done.returncode == 7
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_edited_while_it_is_built_is_stated_as_it_was_used(
    quantkit: Run, v3: Path, tmp_path: Path
) -> None:
    """The recipe and its base are both edited while the plan is printed to a pipe that holds no more than its first
    page. The base is stated too, so the statement alone says what was built."""
    recipe, base = tmp_path / "r.yaml", tmp_path / "base.yaml"
    base.write_text(MINE.replace("why: t", f"why: {'long ' * 4000}"))
    recipe.write_text('name: r\nbase: base.yaml\nrules:\n  - {match: "output.weight", type: Q6_K, why: t}\n')
    used = (recipe.read_text(), base.read_text())
    out, file = tmp_path / "out.gguf", tmp_path / "a.json"
    words = ["build", v3, "-o", out, "-r", recipe, "--pre", "deepseek-v3", "--attest", file]
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 4096)
    with (
        subprocess.Popen([sys.executable, "-m", "quantkit", *map(str, words)], stdout=theirs, cwd=tmp_path) as process,
        open(ours, "rb") as printed,
    ):
        os.close(theirs)
        assert printed.read(1)
        recipe.write_text(used[0].replace("Q6_K", "Q2_K"))
        base.write_text(used[1].replace("Q8_0", "Q2_K"))
        printed.read()
    assert process.returncode == 0
    stated = json.loads(file.read_text())["predicate"]["buildDefinition"]["externalParameters"]["recipe"]
    assert (stated["text"], stated["base"]["text"]) == used
    assert stated["base"] == {"name": "base.yaml", "sha256": sha256(used[1].encode()), "text": used[1]}
    recipe.unlink()
    base.unlink()
    done = quantkit("verify", out, "--attestation", file, "-s", v3, "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^OK: 1 file, .*attested digests, attested plan, attested sources$", done.stdout)
    value = json.loads(file.read_text())
    value["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["base"]["text"] += "#"
    file.write_text(json.dumps(value))
    done = quantkit("verify", out, "--attestation", file, "-q")
    says = f"error: {file}: the recipe's text is not the one whose SHA-256 stands beside it; it was edited\n"
    assert (done.returncode, done.stderr) == (4, says)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "imatrix.gguf"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_written_to_while_it_is_built_from_is_not_attested(
    v3: Path, tiny_imatrix: Path, tmp_path: Path, sound: Path, name: str, whole: bool
) -> None:
    imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "imatrix.gguf"))
    plan = plan_of(v3, MIX, imatrix)
    assert plan.catalogue.source is not None
    evidence = gather(plan.catalogue.source, open_imatrix(str(imatrix)), Silent())
    path = imatrix if name == "imatrix.gguf" else v3 / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(SourceError) as e:
        attestation.statement(plan, evidence, attestation.Asked("r", "x"), [sound], {}, Silent(), whole)
    assert str(e.value) == (
        f"{path}: was written to since the build began, so what was built from cannot be attested; put it back as it "
        "was, and build again"
    )


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("--layout", "kv_b", "--layout k_b+v_b"),
        ("--mixture-version", "2025", "--mixture-version current"),
        ("--pre", "llama-bpe", "--pre deepseek-v3"),
        ("--pad-token", "1", "none"),
    ],
)
def test_an_option_that_contradicts_the_attestation_is_refused(
    quantkit: Run, sound: Path, sound_plan: Plan, tiny_imatrix: Path, tmp_path: Path, option: str, value: str, was: str
) -> None:
    file = tmp_path / "a.json"
    manifest.write_json(file, attest(sound_plan, tiny_imatrix, sound))
    done = quantkit("verify", sound, "--attestation", file, "-q", option, value)
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"Error: {option} {value} contradicts the attestation, which records {was}; leave it out, or verify "
        "without --attestation\n"
    )
    if was != "none":  # set to what it already is
        done = quantkit("verify", sound, "--attestation", file, "-q", *was.split())
        assert (done.returncode, done.stderr) == (0, "")


def test_what_is_said_explicitly_without_an_attestation_wins(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    common = ("-r", "Q8_0", "--pre", "deepseek-v3", "-q")
    assert quantkit("build", tiny_v3, "-o", out, *common, "--layout", "kv_b").returncode == 0
    assert quantkit("verify", out, "-s", tiny_v3, *common, "--layout", "kv_b").returncode == 0
    assert quantkit("verify", out, "-s", tiny_v3, *common).returncode == 12


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-r", "Q4_K_M"), 2, "--recipe needs --source"),
        (("--sample", "1%"), 2, "--sample needs --source"),
        (("--set", "down=Q2_K"), 2, "--set needs --recipe"),
        (("-s", "deepseek-r1", "--sample", "half"), 2, "'half' is not a sample such as 1%"),
        (("-s", "deepseek-r1", "--sample", "1%"), 4, "rows can only be compared with weights"),
        (("--hash-source",), 2, "--hash-source needs --attestation"),
        (("--manifest", "nowhere.json"), 4, "nowhere.json: cannot be read"),
    ],
)
def test_wrong_usage(quantkit: Run, sound: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = quantkit("verify", sound, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_there_is_an_error_not_a_finding(quantkit: Run, tmp_path: Path) -> None:
    assert quantkit("verify", tmp_path / "none.gguf").returncode == 4
    assert "is a directory" in quantkit("verify", tmp_path).stderr
