"""Publishing: which files are published, and the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import factory
import pytest
import yaml
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from quantkit.authoring.publishing import evaluation
from quantkit.authoring.publishing.card import card_text
from quantkit.authoring.publishing.front_matter import LICENSES, front_of
from quantkit.authoring.publishing.markdown import code, plain, table
from quantkit.authoring.publishing.parcel import LIMIT, Parcel, gather
from quantkit.base.errors import OutputError, SourceError
from quantkit.gguf.header import STRING, U32, kv
from quantkit.hub.address import Address

TO = Address("me/Tiny-GGUF", None, "")


def gguf(path: Path, **said: str) -> Path:
    kvs = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]
    kvs += [kv(key.replace("__", "."), STRING, text) for key, text in said.items()]
    return factory.gguf_file(path, {"output.weight": ((256, 2), "Q8_0", bytes(2 * 8 * 34))}, kvs)


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def card_of(parcel: Parcel, license_: str | None = None, base_model: str | None = None) -> str:
    return card_text(parcel, front_of(parcel.models, license_, base_model), None, TO)


def test_a_set_with_its_papers(sound_set: Path, quantkit: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound_set, tmp_path / "set"))
    shards = sorted(folder.glob("*.gguf"))
    assert len(shards) > 1
    done = quantkit("verify", shards[0], "--write-manifest", folder / "sha.json", "-q")
    assert done.returncode == 0, done.stderr
    (folder / "other.json").write_text('{"quantkit_manifest": 1, "files": [{"name": "x.gguf", "sha256": "0"}]}')
    (folder / "broken.json").write_text('{"quantkit_manifest": 1,')
    for given_as in ([folder], [shards[0]], [shards[-1]], shards):
        parcel = gather(given_as)
        assert list(parcel.files) == [*(p.name for p in shards), "sha.json"]
        assert parcel.models[0].nbytes == sum(p.stat().st_size for p in shards)
    text = card_of(gather([folder]))
    total = sum(p.stat().st_size for p in shards)
    assert "weights), published with quantkit." in text
    assert f"`{shards[0].name}` and {len(shards) - 1} more | {len(shards)} | {total:,} bytes" in text
    assert f"quantkit verify {shards[0].name} --manifest sha.json" in text
    assert "| routed expert | " in text
    assert "Importance matrix: `imatrix.gguf`" in text
    os.remove(shards[1])
    with pytest.raises(SourceError, match="is missing; get it and put it beside the first"):
        gather([folder])


def test_the_recipe_of_an_attestation_with_its_reasons(
    tiny_v3: Path, tiny_imatrix: Path, quantkit: Run, tmp_path: Path
) -> None:
    out = tmp_path / "a.gguf"
    args = ["-r", "UD-IQ1_S", "--imatrix", tiny_imatrix, "--pre", "deepseek-v3", "--attest", tmp_path / "a.json", "-q"]
    assert quantkit("build", tiny_v3, "-o", out, *args).returncode == 0
    done = quantkit("publish", out, "me/T", "--dry-run", "--json", "--license", "mit", "--base-model", "a/B")
    said = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert [f["name"] for f in said["files"]] == ["README.md", "a.gguf", "a.json"]
    assert (said["repo"], said["public"], said["dry_run"]) == ("me/T", False, True)
    assert "The recipe `UD-IQ1_S`" in said["card"]
    assert "weights), made with quantkit." in said["card"]
    assert gather([out]).titles == ["a", "a", "UD-IQ1_S"]
    assert "why: embeddings are looked up, not multiplied" in said["card"]
    found = front(said["card"])
    assert (found["license"], found["base_model"], found["tags"]) == ("mit", "a/B", ["gguf", "quantkit"])


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ({"general__license": "MIT"}, {"license": "mit"}),
        (
            {"general__license": "other", "general__license__name": "DeepSeek License"},
            {"license": "other", "license_name": "deepseek-license"},
        ),
        (
            {"general__license": "a: [b\n", "general__license__link": "https://x.org/L"},
            {"license": "other", "license_name": "a-b", "license_link": "https://x.org/L"},
        ),
        (
            {"general__license": "my", "general__license__link": "javascript:x"},
            {"license": "other", "license_name": "my"},
        ),
        ({"general__base_model__0__repo_url": "https://huggingface.co/a/B"}, {"base_model": "a/B"}),
        (
            {"general__source__repo_url": "https://huggingface.co/a/C", "general__base_model__0__repo_url": "x"},
            {"base_model": "a/C", "base_model_relation": "quantized"},
        ),
        ({"general__base_model__0__repo_url": "https://evil.org/a/B"}, {}),
    ],
)
def test_the_front(tmp_path: Path, said: dict[str, str], fields: dict[str, str]) -> None:
    found = front(card_of(gather([gguf(tmp_path / "m.gguf", **said)])))
    assert found == fields | {"library_name": "gguf", "tags": ["gguf", "quantkit"]}
    assert found.get("license", "other") in LICENSES


def test_licences_that_differ_need_an_answer(tmp_path: Path) -> None:
    gguf(tmp_path / "a.gguf", general__license="mit")
    gguf(tmp_path / "b.gguf", general__license="apache-2.0")
    parcel = gather([tmp_path])
    with pytest.raises(SourceError, match=r"different licences \(mit, apache-2.0\); give one with --license"):
        card_of(parcel)
    assert front(card_of(parcel, "mit"))["license"] == "mit"


EVIL = (
    "</td><script>alert(1)</script> [x](http://e.vil) ![i](//e) `c` |cell| https://e.vil @you www.e.vil #1 &lt;\n"
    "# H\n---\n"
)


def test_what_a_stranger_wrote_is_only_text(tmp_path: Path) -> None:
    keys = ["general__name", "quantize__imatrix__file", "quantize__imatrix__dataset", "quantkit__imatrix__policy"]
    keys += ["quantkit__rounding__options", "quantkit__rounding__covariance", "general__license"]
    path = gguf(tmp_path / "m.gguf", **dict.fromkeys(keys, EVIL))
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m.gguf", "digest": {"sha256": "0"}}],
        "predicate": {
            "buildDefinition": {"externalParameters": {"recipe": {"name": EVIL, "text": f"```\n{EVIL}````\n"}}},
            "runDetails": {"builder": {"version": {EVIL: EVIL}}},
        },
    }
    (tmp_path / "m.json").write_text(json.dumps(statement))
    text = card_of(gather([path]))
    assert list(front(text)) == ["license", "license_name", "library_name", "tags"]
    shown, fence = [], ""
    for line in text.split("---\n", 2)[2].splitlines():
        mark = re.match("`{3,}", line)
        if not fence and mark:
            fence = mark[0]
        elif fence and line == fence:
            fence = ""
        elif not fence:
            shown.append(line)
    assert not fence
    outside = "\n".join(shown)
    for bad in ("<script", "</td", "](http", "![", "https:", "www.", " @you", " #1", "\n# H", "\n---"):
        assert bad not in outside, bad
    assert "alert" in outside


@given(st.text())
def test_plain_text_has_no_markup(text: str) -> None:
    for shown in (plain(text), code(text)):
        assert not {"\n", "<"} & set(shown)
        row = table([[shown, "b"]], ["x", "y"]).splitlines()[2]
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
        if not shown.startswith("`") or shown != f"`{text}`":
            bare = re.sub(r"\\[!-/:-@\[-`{-~]|&(lt|gt|amp);", "", shown)
            assert not re.search(r"[*_`\[\]()!|~$#@:.&<>\\]", bare)


def test_what_the_hub_does_not_take(tmp_path: Path) -> None:
    path = gguf(tmp_path / "big.gguf")
    os.truncate(path, LIMIT)
    gather([path])
    os.truncate(path, LIMIT + 1)
    with pytest.raises(OutputError) as e:
        gather([path])
    assert str(e.value) == (
        f"{path}: has 50,000,000,001 bytes, and the Hub takes 50,000,000,000 a file; make shards of it: "
        f"quantkit split {path} {path.with_suffix('')} --max-size 49G"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty").mkdir()
    os.truncate(path, 4096)
    other = gguf(tmp_path / "sub" / "big.gguf")
    with pytest.raises(OutputError, match="both would be one file; rename one of them"):
        gather([path, other])
    with pytest.raises(SourceError, match="there is no GGUF in it"):
        gather([tmp_path / "empty"])


EVAL = {
    "quantkit_eval": 1,
    "engine": "native",
    "reference": {"name": "ref", "ppl": 5.0, "n_tokens": 512},
    "texts": ["wiki.txt"],
    "candidates": [
        {
            "name": name, "bpw": 2.0, "ppl": 6.0, "ppl_se": 0.5, "mean_kld": 0.25, "mean_kld_se": 0.01, "kld_99": 1.0,
            "same_top": 0.75, "same_top_se": 0.02,
        }
        for name in ("m", "other")
    ],
}  # fmt: skip


def test_quality_has_intervals(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(EVAL))
    measured = evaluation.read(path)
    parcel = gather([gguf(tmp_path / "m.gguf")])
    evaluation.check_names(measured, parcel.titles, path)
    text = card_text(parcel, front_of(parcel.models, None, None), measured, TO)
    assert "| m | 2.00 | 6.0000 ± 0.9800 | 0.25000 ± 0.01960 | 1.0000 | 75.00 ± 3.92 % |" in text
    assert "| other (not here) |" in text
    assert "on 512 tokens of `wiki.txt`" in text
    with pytest.raises(SourceError, match="measures m, other, and none of the files is called so"):
        evaluation.check_names(measured, ["x"], path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"quantkit_eval": 1}', json.dumps(EVAL).replace("6.0", "NaN")])
def test_what_is_no_evaluation(tmp_path: Path, text: str) -> None:
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=r"is not what `quantkit eval … --json` prints|is damaged at"):
        evaluation.read(path)
