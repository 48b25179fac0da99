"""`quantkit verify` and attestations of files that ggml did not round."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import factory
import pytest
from checking import info_of, rewrite
from conftest import Run
from small_builds import OPTIONS

import quantkit as qk
from quantkit.base.errors import SourceError
from quantkit.gguf.header import KV, STRING, kv, kv_array
from quantkit.model.open import open_model
from quantkit.recipe.load import parse
from quantkit.rounding.covariance import Covariances
from quantkit.verifying.rounding import headers, recorded

RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "*ffn_down_exps.weight", type: Q2_K, why: t}
  - {match: "blk.*.{attn_k_b,attn_output}.weight", type: Q8_0, why: t}
  - {match: "*", type: Q4_K, why: t}
"""
DOWN, UP = (f"blk.1.ffn_{x}_exps.weight" for x in ("down", "up"))
N_ROWS = 14647
NOTE = "33 tensors are not ggml's bytes, made by quantkit's feedback rounding (33 by feedback; covariance "


class World:
    """A rounded build, what it was made from, and `verify` as a user types it."""

    def __init__(self, folder: Path, v3: Path, imatrix: Path, covariance: Path, quantkit: Run) -> None:
        self.folder, self.v3, self.imatrix, self.covariance = folder, v3, imatrix, covariance
        self.run, self.out, self.recipe = quantkit, folder / "m.gguf", folder / "r.yaml"
        self.attestation = folder / "build.json"
        self.recipe.write_text(RECIPE)
        self.made = ("--pre", "deepseek-v3", "--imatrix", imatrix, "--rounding", "feedback", "-q")
        done = quantkit("build", v3, "-r", self.recipe, "-o", self.out, *self.made, "--covariance", covariance,
                        "--attest", self.attestation)  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.digest = Covariances(covariance).digest

    def verify(self, *more: str | Path, out: Path | None = None, sample: str = "all") -> tuple[int, list[str]]:
        source = ("-s", self.v3, "--pre", "deepseek-v3", "--imatrix", self.imatrix, "--sample", sample)
        done = self.run("verify", out or self.out, "-q", *source, *more)
        return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture(scope="module")
def world(
    tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, tmp_path_factory: pytest.TempPathFactory, quantkit: Run
) -> World:
    return World(tmp_path_factory.mktemp("rounded"), tiny_v3, tiny_imatrix, tiny_covariance, quantkit)


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copy(world.out, tmp_path / "m.gguf"))


def test_alone_it_is_said(world: World) -> None:
    done = world.run("verify", world.out, "-q")
    assert done.returncode == 0
    assert f"note: {NOTE}{world.digest[:12]})\n" in done.stdout


def test_without_the_covariance_the_rest_is_compared(world: World) -> None:
    code, lines = world.verify("-r", world.recipe)
    assert code == 0
    n = re.search(r"checked .*, ([\d,]+) of 14,647 rows", lines[-1])
    assert n is not None
    compared = int(n[1].replace(",", ""))
    assert 1000 < compared < N_ROWS
    assert f"note: {NOTE}{world.digest[:12]})" in lines
    assert (
        f"note: {N_ROWS - compared:,} rows of 33 tensors were not compared, since ggml did not round them: "
        "blk.0.attn_k_b.weight, …; give --covariance DIR"
    ) in lines
    assert "note: quantkit.rounding.* were not compared: give the covariance with --covariance" in lines
    assert (
        "note: what rounds which tensors was taken from the file itself: give --rounding or --rounding-policy to check "
        "it"
    ) in lines


@pytest.mark.parametrize("said", [True, False])
def test_every_row_again(world: World, said: bool) -> None:
    """By the command line's rounding, and by the file's own record."""
    more = ("--rounding", "feedback") if said else ()
    code, lines = world.verify("-r", world.recipe, "--covariance", world.covariance, *more)
    assert (code, lines[-1].rpartition(", ")[2], "metadata" in lines[-1]) == (0, "all 14,647 rows", True)
    assert [line for line in lines if "taken from the file" in line] == ([] if said else [
        "note: what rounds which tensors was taken from the file itself: give --rounding or --rounding-policy to check "
        "it"
    ])  # fmt: skip


def test_a_sample_without_a_recipe(world: World) -> None:
    code, lines = world.verify("--covariance", world.covariance, sample="5%")
    assert code == 0
    assert re.search(r"[\d,]+ of 14,647 rows \(seed 0\)$", lines[-1])
    assert not [line for line in lines if "were not compared, since" in line]


@pytest.mark.parametrize(("name", "maker"), [(UP, "quantkit's feedback rounding"), ("output.weight", "ggml")])
def test_a_changed_byte(world: World, copied: Path, name: str, maker: str) -> None:
    factory.flip(copied, info_of(copied, name).offset + 144 * 7 + 20)
    code, lines = world.verify("--covariance", world.covariance, out=copied)
    assert code == 12, lines
    (finding,) = [line for line in lines if name in line]
    assert f"Q4_K bytes are not what {maker} makes of the source" in finding
    code, lines = world.verify(out=copied)
    assert code == (0 if name == UP else 12)  # without the covariance the damage cannot be noticed


def test_rows_that_are_ggmls_though_feedback_would_be_better(
    world: World, copied: Path, tmp_path: Path, quantkit: Run
) -> None:
    stock = tmp_path / "stock.gguf"
    done = quantkit("build", world.v3, "-r", world.recipe, "-o", stock, *world.made[:4], "-q")
    assert done.returncode == 0, done.stderr
    a, b, raw = info_of(copied, UP), info_of(stock, UP), stock.read_bytes()
    with copied.open("r+b") as f:
        f.seek(a.offset)
        f.write(raw[b.offset : b.offset + b.nbytes])
    code, lines = world.verify("--covariance", world.covariance, out=copied)
    assert code == 12, lines
    assert any("are not what quantkit's feedback rounding makes of the source" in line for line in lines)


def test_another_covariance_is_named(world: World, tiny_v3: Path, tmp_path: Path) -> None:
    other = factory.covariance_for(open_model(str(tiny_v3), OPTIONS), tmp_path / "other", seed=14)
    code, lines = world.verify("-r", world.recipe, "--covariance", other)
    assert (code, lines) == (4, [
        f"error: {other}: is not the covariance that the file was rounded by, but another: the file says "
        f"{world.digest[:12]}, its digest is {Covariances(other).digest[:12]}; give that one, or leave out "
        "--covariance and compare the other tensors"
    ])  # fmt: skip
    shutil.copytree(world.covariance, tmp_path / "cov")
    shutil.copytree(other, tmp_path / "cov" / "held-out")
    code, lines = world.verify("--covariance", tmp_path / "cov")
    assert (code, lines) == (4, [
        f"error: {tmp_path / 'cov'}: is not the held-out covariance that the file was rounded by, but another: the "
        f"file says none, its digest is {Covariances(other).digest[:12]}; give that one, or leave out --covariance "
        "and compare the other tensors"
    ])  # fmt: skip


def test_another_rounding_than_was_asked_for(world: World) -> None:
    code, lines = world.verify(
        "-r", world.recipe, "--rounding", "feedback+gain", "--covariance", world.covariance, sample="none"
    )
    assert code == 12, lines
    (finding,) = [line for line in lines if "quantkit.rounding.tensors" in line]
    assert finding.startswith(
        "m.gguf: key 'quantkit.rounding.tensors': expected 'feedback+gain blk.{0-2}.attn_k_b.weight', found 'feedback "
        "blk.{0-2}.attn_k_b.weight' (byte "
    )
    code, lines = world.verify("-r", world.recipe, "--rounding", "ggml", sample="none")
    assert code == 12, lines
    assert any("quantkit.rounding.version' is not in the plan" in line for line in lines), lines


def key(name: str, value: str | list[str]) -> Callable[[list[KV]], None]:
    full = f"quantkit.rounding.{name}"

    def change(kvs: list[KV]) -> None:
        at = next(i for i, item in enumerate(kvs) if item.key == full)
        kvs[at] = kv(full, STRING, value) if isinstance(value, str) else kv_array(full, STRING, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (key("options", "damp what"), "options"),
        (key("tensors", ["feedback blk.{0-99999999999}.x"]), "numbers '0-99999999999'"),
        (key("tensors", ["best x"]), "tensors 'best x'"),
        (key("tensors", []), "no tensors"),
        (lambda kvs: kvs.pop(next(i for i, k in enumerate(kvs) if k.key.endswith("rounding.version"))),
         "'quantkit.rounding.version'"),
    ],
    ids=["options", "numbers", "method", "none", "version"],
)  # fmt: skip
def test_keys_that_no_build_writes(copied: Path, change: Callable[[list[KV]], None], says: str) -> None:
    rewrite(copied, lambda kvs, _: change(kvs))
    with pytest.raises(SourceError) as e:
        recorded(headers(copied))
    assert str(e.value) == (
        f"m.gguf: its keys quantkit.rounding.* say nothing that a build writes ({says}); it is damaged or of another "
        "version: verify it with --sample none"
    )


def test_claims_that_are_not_true(world: World, copied: Path) -> None:
    """A claim about a tensor that nothing rounds, and a claim that ggml made a tensor that it did not make."""
    rewrite(copied, lambda kvs, _: key("tensors", ["feedback blk.0.ffn_norm.weight"])(kvs))
    code, lines = world.verify("--covariance", world.covariance, out=copied, sample="1%")
    assert (code, lines) == (4, [
        f"error: {world.covariance}: has nothing for 'blk.0.ffn_norm.weight'; it is of another model"
    ])  # fmt: skip
    rewrite(copied, lambda kvs, _: key("tensors", [f"feedback {DOWN}"])(kvs))
    code, lines = world.verify("--covariance", world.covariance, "--findings", "10000", out=copied, sample="1%")
    assert code == 12, lines
    says = "Q4_K bytes are not what ggml makes of the source"
    assert [line for line in lines if line.startswith(f"m.gguf: {UP}: row ") and says in line], lines
    assert [line for line in lines if line.startswith(f"m.gguf: {DOWN}: row ") and "has no inputs" in line], lines


# ---------------------------------------------------------------- attestations


def test_an_attestation_has_the_covariance(world: World, tiny_v3: Path, tmp_path: Path) -> None:
    said = json.loads(world.attestation.read_text())["predicate"]["buildDefinition"]
    assert said["externalParameters"]["rounding"] == {"method": "feedback", "byOption": True}
    (dependency,) = [d for d in said["resolvedDependencies"] if d["annotations"]["role"] == "covariance"]
    assert dependency["digest"] == {"quantkitCovarianceSha256": world.digest}
    code, lines = world.verify("--attestation", world.attestation, "--covariance", world.covariance, sample="1%")
    assert code == 0, lines
    assert lines[-1].endswith("attested digests, attested plan, attested sources")
    code, lines = world.verify("--attestation", world.attestation, "--rounding", "coarse")
    assert code == 2
    assert lines[-1] == (
        "Error: --rounding coarse contradicts the attestation, which records --rounding feedback; leave it "
        "out, or verify without --attestation"
    )


def test_an_attestation_has_the_policy(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "p.yaml").write_text("policy: p\nrules: [{role: routed expert, rounding: feedback}]\n")
    (folder / "r.yaml").write_text(RECIPE.replace("rules:", "rounding: {policy: p.yaml}\nrules:"))
    out, attestation = tmp_path / "m.gguf", tmp_path / "a.json"
    done = world.run("build", world.v3, "-r", folder / "r.yaml", "-o", out, "--pre", "deepseek-v3", "--imatrix",
                     world.imatrix, "--covariance", world.covariance, "--attest", attestation, "-q")  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(attestation.read_text())
    policy = said["predicate"]["buildDefinition"]["externalParameters"]["rounding"]
    assert (policy["method"], policy["byOption"], policy["policy"]["text"]) == (
        "", False, (folder / "p.yaml").read_text()
    )  # fmt: skip
    shutil.rmtree(folder)  # the attestation suffices
    more = ("--attestation", attestation, "--covariance", world.covariance)
    code, lines = world.verify(*more, out=out)
    assert (code, lines[-1].count("all 14,647 rows")) == (0, 1), lines
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(RECIPE)
    code, lines = world.verify("-r", recipe, "--covariance", world.covariance, out=out)  # the file names its policy
    assert (code, lines[-1].count("all 14,647 rows")) == (0, 1), lines
    policy["policy"]["text"] += "# edited\n"
    attestation.write_text(json.dumps(said))
    code, lines = world.verify(*more, out=out)
    assert (code, lines) == (4, [
        f"error: {attestation}: the policy's text is not the one whose SHA-256 stands beside it; it was edited"
    ])  # fmt: skip


# ---------------------------------------------------------------- from Python


def test_from_python(world: World, tmp_path: Path) -> None:
    model = qk.open_model(world.v3, pre="deepseek-v3")
    recipe = parse(RECIPE, "r.yaml")
    plan = qk.plan(model, recipe, world.imatrix, rounding="feedback", covariance=world.covariance)
    assert plan.rounding is not None
    made = qk.build(plan, tmp_path / "m.gguf", threads=1)
    assert made.files[0].read_bytes() == world.out.read_bytes()
    assert qk.verify(world.out, plan=plan, sample="all").ok
    plain = qk.plan(model, recipe, world.imatrix)
    verdict = qk.verify(world.out, plan=plain, sample="all")
    assert verdict.ok
    assert sum("rows of 33 tensors were not compared" in note for note in verdict.notes) == 1
    with pytest.raises(SourceError, match="needs a covariance of their inputs: give --covariance DIR"):
        qk.build(qk.plan(model, recipe, world.imatrix, rounding="feedback"), tmp_path / "n.gguf")
