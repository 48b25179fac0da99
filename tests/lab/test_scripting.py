"""`qk.evaluate`, `qk.Study` and `qk.run_study`: what scripts may give them, and what they get."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small_builds import OPTIONS

import quantkit as qk
from quantkit.base.errors import RecipeError, SourceError, ToolError
from quantkit.forward.stream import Options
from quantkit.lab.evaluation.evaluate import EvalOptions
from quantkit.lab.frames import frame
from quantkit.model.catalogue import Catalogue
from quantkit.model.open import open_model

ONE = EvalOptions(forward=Options(n_threads=1))


@pytest.fixture(scope="module")
def model(tiny_v3: Path) -> Catalogue:
    return open_model(str(tiny_v3), OPTIONS)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join("".join(random.choice(list("abcdefgh"), 5)) for _ in range(300)))
    return path


def test_one_candidate_and_one_text(model: Catalogue, words: Path, sound: Path) -> None:
    """Alone, as in lists of one."""
    a = qk.evaluate(model, str(sound), str(words), n_ctx=64, n_chunks=1, options=ONE)
    b = qk.evaluate(model, [sound], [words], n_ctx=64, n_chunks=1, options=ONE)
    assert a == b
    assert [c.name for c in a.candidates] == [sound.stem]


def test_plans_of_one_recipe_are_told_apart(model: Catalogue, words: Path) -> None:
    plan = qk.plan(model, "Q8_0")
    other = plan.with_types({"output.weight": "Q4_K"})
    found = qk.evaluate(model, [plan, other], words, n_ctx=64, n_chunks=1, options=ONE)
    assert [c.name for c in found.candidates] == ["Q8_0 (1)", "Q8_0 (2)"]
    assert found.pairs[0].a == "Q8_0 (1)"
    assert json.loads(json.dumps(found.to_json()))["candidates"][1]["name"] == "Q8_0 (2)"


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ToolError) as e:
        frame([])
    assert str(e.value) == "pandas is not installed; run: pip install pandas"


def test_a_plan_of_another_model(model: Catalogue, words: Path) -> None:
    with pytest.raises(SourceError) as e:
        qk.evaluate(model, qk.plan("deepseek-r1", "Q8_0"), words, n_ctx=64, n_chunks=1, options=ONE)
    assert str(e.value) == (
        "Q8_0: is a plan of deepseek-r1, not of Tiny-V3: 'output.weight' is 7168x129280 in the plan and 256x384 in "
        "the model; make the plan with that model, in the same layout"
    )


def test_a_study_that_cannot_be_read(model: Catalogue, words: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"base: \xe9\n")
    for name, why in (("none.yaml", "No such file or directory"), ("latin.yaml", "it is not UTF-8 text")):
        with pytest.raises(RecipeError) as e:
            qk.run_study(tmp_path / name, model, words, tmp_path / "r.db")
        assert str(e.value) == f"{tmp_path / name}: cannot be read: {why}"
    assert not (tmp_path / "r.db").exists()


def test_a_study(model: Catalogue, words: Path, tmp_path: Path) -> None:
    """Its paths start at its folder, its base's too; results come in the study's order, also the second time."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text(
        'name: mine\narch: [any]\nfile_type: Q8_0\nrules:\n  - {match: "*", type: Q8_0, why: all}\n'
    )
    (tmp_path / "s.yaml").write_text("base: sub/mine.yaml\naxes: {out: {match: output.weight, types: [Q4_K]}}\n")
    run = [
        qk.run_study(tmp_path / "s.yaml", model, words, tmp_path / "r.db", n_ctx=64, n_chunks=1, threads=1)
        for _ in range(2)
    ]
    assert [r.variant for r in run[0]] == ["base", "out=Q4_K"]
    assert [r.scores for r in run[0]] == [r.scores for r in run[1]]


def test_a_study_of_a_mapping(model: Catalogue, words: Path, tmp_path: Path) -> None:
    """From a mapping, a text and a file alike: priced, measured, and found again."""
    given = {"base": "Q8_0", "axes": {"out": {"match": "output.weight", "types": ["Q4_K"]}}}
    text = "base: Q8_0\naxes: {out: {match: output.weight, types: [Q4_K]}}\n"
    (tmp_path / "study.yaml").write_text(text)
    priced = [
        [(v.name, v.file_bytes) for v in qk.Study(one).resolve(model)] for one in (given, text, tmp_path / "study.yaml")
    ]
    assert priced[0] == priced[1] == priced[2]
    assert [name for name, _ in priced[0]] == ["base", "out=Q4_K"]
    one = qk.Study(given)
    options = qk.StudyOptions(threads=1, cache=tmp_path / "c", files=tmp_path / "built")
    made = one.run(model, words, tmp_path / "r.db", n_ctx=64, n_chunks=2, options=options)
    assert made["out=Q4_K"].scores is not None
    assert made["out=Q4_K"].scores.file_bytes == priced[0][1][1]
    assert (tmp_path / "built" / "study-out=Q4_K.gguf").stat().st_size == priced[0][1][1]
    assert [(e.axis, e.level) for e in made.effects] == [("out", "Q4_K")]
    assert "base" in [p.name for p in made.front]
    (again,) = one.results(tmp_path / "r.db")
    assert [(r.variant, r.scores) for r in again.results] == [(r.variant, r.scores) for r in made.results]
    with pytest.raises(KeyError, match=r"no variant 'out=Q4' \(did you mean out=Q4_K\?\)"):
        _ = made["out=Q4"]
    with pytest.raises(RecipeError) as e:
        qk.Study({"base": "Q8_0", "axis": {}}, name="mine")
    assert str(e.value) == (
        "mine:1 axes: is missing\nmine:2 axis: unknown key 'axis' (did you mean axes?); known are base, design, "
        "imatrix, imatrix_policy, axes"
    )


def test_results_as_frames(model: Catalogue, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = qk.plan(model, "Q8_0")
    found = qk.evaluate(model, plan, words, n_ctx=64, n_chunks=1, options=ONE)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pandas", None)
        with pytest.raises(ToolError, match=r"^pandas is not installed; run: pip install pandas$"):
            found.to_frame()
    assert list(found.to_frame()["mean_kld"]) == [found.candidates[0].mean_kld]
    study = qk.Study("base: Q8_0\naxes: {out: {match: output.weight, types: [Q4_K]}}\n")
    rows = study.run(model, words, tmp_path / "r.db", n_ctx=64, n_chunks=1).to_frame()
    assert list(rows["variant"]) == ["base", "out=Q4_K"]
