"""Studies: their variants, what is kept, and what is said of it."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from factory import gguf_imatrix, poke
from small_builds import OPTIONS
from test_evaluate import ONE, Chunks

from quantkit.base.errors import OutputError, RecipeError, SourceError, WeightError
from quantkit.forward.model import Model
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.policies import Policy, parse_policy
from quantkit.lab.evaluation.scores import Tokens, score
from quantkit.lab.studies.ablate import AblateOptions, ablate
from quantkit.lab.studies.findings import comparable, effects, front
from quantkit.lab.studies.report import show_json, show_text
from quantkit.lab.studies.results import Result, Results
from quantkit.lab.studies.study import Study, load_study, variants
from quantkit.model.open import open_model
from quantkit.recipe.load import parse

STUDY = """\
base: UD-IQ1_S
axes:
  down:
    match: "blk.*.ffn_down_exps.weight"
    types: [Q2_K, Q4_K]
  early:
    match: "blk.*.ffn_{gate,up}_exps.weight"
    type: Q3_K
    layers: ["moe[:1]"]
"""


def study(tmp_path: Path, text: str = STUDY) -> Study:
    (tmp_path / "study.yaml").write_text(text)
    return load_study(tmp_path / "study.yaml")


@pytest.fixture(scope="module")
def reference(tiny_v3: Path) -> Model:
    return Model(open_model(str(tiny_v3), OPTIONS))


@pytest.fixture(scope="module")
def chunks(reference: Model) -> Chunks:
    return Chunks(np.random.default_rng(3).integers(0, reference.family.n_vocab, (4, 32)).astype(np.int32))


def test_one_at_a_time(tmp_path: Path, reference: Model, tiny_imatrix: Path) -> None:
    found = list(variants(study(tmp_path), reference.catalogue, str(tiny_imatrix)))
    assert [v.name for v in found] == ["base", "down=Q2_K", "down=Q4_K", "early=moe[:1]"]
    sizes = [v.file_bytes for v in found]
    assert sizes[0] < sizes[1] < sizes[2]
    of = found[1].plan
    assert of is not None
    assert {t.type for t in of.tensors if t.tensor.name.endswith("ffn_down_exps.weight")} == {"Q2_K"}
    early = found[3].plan
    assert early is not None
    first = reference.catalogue.moe_layers[0]
    q3 = [t.tensor.layer for t in early.tensors if t.type == "Q3_K" and "_exps" in t.tensor.name]
    assert q3 == [first, first]
    assert parse(found[1].recipe_text, "again").name == "study-variant"


def test_types_by_other_spellings(tmp_path: Path) -> None:
    given = study(tmp_path, STUDY.replace("[Q2_K, Q4_K]", "[q2_k, $down]")).given
    assert given.axes["down"].levels == ("Q2_K", "$down")


def test_grid(tmp_path: Path, reference: Model, tiny_imatrix: Path) -> None:
    found = list(variants(study(tmp_path, STUDY + "design: grid\n"), reference.catalogue, str(tiny_imatrix)))
    assert len(found) == 3 * 2
    assert found[-1].name == "down=Q4_K, early=moe[:1]"


def test_variants_that_cannot_be(tmp_path: Path, reference: Model) -> None:
    """Without an importance matrix every variant says why it cannot be; none stops the others."""
    found = list(variants(study(tmp_path), reference.catalogue))
    assert [v.plan for v in found] == [None] * 4
    assert all("imatrix" in v.trouble for v in found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (STUDY.replace("types: [Q2_K, Q4_K]", ""), "an axis varies one thing: types, a list of layers with a type"),
        (STUDY.replace('layers: ["moe[:1]"]', 'layers: "moe[:1]"'), "an axis varies one thing"),
        (STUDY.replace("type: Q3_K", ""), "a list of layers needs a type"),
        (STUDY.replace("base: UD-IQ1_S", "bass: UD-IQ1_S"), "bass"),
        (
            STUDY.replace("base: UD-IQ1_S", "base: UD-IQ1_S\ndesing: grid"),
            "study.yaml:2 desing: unknown key 'desing' (did you mean design?); known are base, design, imatrix, "
            "imatrix_policy, axes",
        ),
        (
            STUDY.replace("types:", "tpyes:"),
            "study.yaml:5 axes.down.tpyes: unknown key 'tpyes' (did you mean types?); known are match, layers, type, "
            "types, imatrices",
        ),
        (
            STUDY.replace("Q4_K]", "Q9_K]"),
            "study.yaml:5 axes.down.types[1]: unknown type 'Q9_K' (did you mean Q6_K?)",
        ),
        (STUDY.replace("type: Q3_K", "type: I32"), "study.yaml:8 axes.early.type: I32 is not a type to quantize to"),
        (
            STUDY.replace("moe[:1]", "mow[:1]"),
            "study.yaml:9 axes.early.layers: unknown layer list 'mow' (did you mean moe?)",
        ),
        (STUDY.replace("[Q2_K, Q4_K]", "Q2_K"), "study.yaml:5 axes.down.types: should be a list, not 'Q2_K'"),
        (
            STUDY.replace('["moe[:1]"]', "{a: b}"),
            'study.yaml:9 axes.early.layers: should be layers, such as "moe[:6]", or a list of such',
        ),
        (
            STUDY.replace('["moe[:1]"]', "[]"),
            'study.yaml:9 axes.early.layers: should be layers, such as "moe[:6]", or a list of such',
        ),
        (
            "imatrix_policy: siblings\n" + STUDY,
            "study.yaml:1 imatrix_policy: 'siblings' is not a policy for an importance matrix (did you mean sibling?)",
        ),
        ("\n", "study.yaml: is empty; a study has a base and axes"),
        ("base: UD-IQ1_S\naxes: {}\n", "axes"),
        ("base: UD-IQ1_S\ndesign: grid\naxes:\n" + "".join(
            f"  a{i}:\n    match: x\n    types: [Q2_K, Q3_K, Q4_K, Q5_K, Q6_K]\n" for i in range(7)),
         "makes more than 4,096 variants"),
    ],
)  # fmt: skip
def test_bad_studies(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as e:
        study(tmp_path, text)
    assert says in str(e.value)
    assert "study.yaml" in str(e.value)


def test_a_study_carried_out(tmp_path: Path, reference: Model, chunks: Chunks, tiny_imatrix: Path) -> None:
    """Results in passes of two are those of one pass, and are not computed twice."""
    one = study(tmp_path)
    every = list(variants(one, reference.catalogue, str(tiny_imatrix)))
    found = {}
    for size in (2, 9):
        with Results(tmp_path / f"{size}.db") as results:
            ablate(one, every, reference, chunks, results, AblateOptions(size, ONE))
            found[size] = list(results.of("study"))
    assert [r.scores for r in found[2]] == [r.scores for r in found[9]]
    assert all(r.scores is not None and r.scores.mean_kld > 0 for r in found[2])
    assert found[2][0].provenance["quantkit"]
    said: list[str] = []
    with Results(tmp_path / "2.db") as results:
        ablate(one, every, reference, chunks, results, AblateOptions(2, ONE), lambda what, a, b: said.append(what))
    assert said == []


def test_one_that_fails(tmp_path: Path, reference: Model, chunks: Chunks, tiny_imatrix: Path) -> None:
    one = study(tmp_path)
    every = list(variants(one, reference.catalogue, str(tiny_imatrix)))
    every[1] = every[1]._replace(plan=None, trouble="cannot be")
    lines: list[str] = []
    with Results(tmp_path / "r.db") as results:
        ablate(one, every, reference, chunks, results, AblateOptions(0, ONE), report=lines.append)
        found = list(results.of())
    assert lines == ["down=Q2_K: cannot be"]
    assert [r.trouble for r in found if r.scores is None] == ["cannot be"]
    assert sum(r.scores is not None for r in found) == 3


def result(levels: dict[str, str], kld: float, nbytes: int) -> Result:
    tokens = Tokens(np.ones((4, 2)), np.full((4, 2), kld), np.zeros((4, 2)), np.ones((4, 2)))
    name = ", ".join(f"{a}={b}" for a, b in levels.items()) or "base"
    of = score(name, (nbytes, 1.0), tokens, np.ones((4, 2)))
    return Result("s", name, levels, of, np.full(4, kld).tobytes(), "", {})


def test_effects_and_front() -> None:
    grid = [
        result({}, 0.5, 100),
        result({"a": "x"}, 0.4, 110),
        result({"b": "y"}, 0.6, 120),
        result({"a": "x", "b": "y"}, 0.3, 130),
    ]
    found = {(e.axis, e.level): e for e in effects(grid)}
    assert found["a", "x"].difference == pytest.approx(-0.2)  # the mean of -0.1 and -0.3
    assert found["b", "y"].difference == pytest.approx(0.0)
    assert found["a", "x"].bytes_difference == 10
    assert [p.name for p in front(grid)] == ["base", "a=x", "a=x, b=y"]
    failed = replace_scores(grid[0])
    assert front([failed]) == []


def replace_scores(r: Result) -> Result:
    assert r.scores is not None
    assert replace(r.scores, ppl=1.0).ppl == 1.0
    return replace(r, scores=None)


def test_other_files(tmp_path: Path) -> None:
    """What is not a file of results is refused as it is: nothing is written to it."""
    (tmp_path / "x.db").write_bytes(b"not a database at all, but long enough to be looked at" * 30)
    with sqlite3.connect(tmp_path / "bookmarks.db") as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    with sqlite3.connect(tmp_path / "about.db") as db:
        db.execute("CREATE TABLE about (key TEXT, value TEXT)")
        db.execute("CREATE TABLE results (time REAL)")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    says = {
        "x.db": "file is not a database",
        "bookmarks.db": "it holds other tables than results",
        "about.db": "it holds other tables than results",
    }
    for name, why in says.items():
        for read_only in (False, True):
            with pytest.raises(SourceError) as e:
                Results(tmp_path / name, read_only)
            assert str(e.value) == f"{tmp_path / name}: is not a file of results: {why}; give another name"
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    with Results(tmp_path / "y.db") as results:
        results.put("1", result({}, 0.5, 100))
    with sqlite3.connect(tmp_path / "y.db") as db:
        db.execute("UPDATE about SET value = '99'")
    with pytest.raises(SourceError) as e:
        Results(tmp_path / "y.db")
    assert str(e.value) == (
        f"{tmp_path}/y.db: has results of version 99, and this quantkit knows version 1; give another file, or use the "
        "quantkit that wrote it"
    )


def test_a_new_file_with_no_results_does_not_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Results(tmp_path / "r.db"):
        raise KeyError
    with Results(tmp_path / "r.db"):
        pass
    assert list(tmp_path.iterdir()) == []
    with Results(tmp_path / "r.db") as results:
        results.put("1", result({}, 0.5, 100))
    with pytest.raises(KeyError), Results(tmp_path / "r.db"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["r.db"]


def test_reading_makes_nothing(tmp_path: Path) -> None:
    """A file is read where it may not be written, also one whose name has what URLs quote."""
    name = tmp_path / "a ?b#c%41.db"
    with pytest.raises(SourceError) as e:
        Results(name, read_only=True)
    assert str(e.value) == f"{name}: cannot be read: No such file or directory; quantkit ablate run makes results"
    assert list(tmp_path.iterdir()) == []
    with Results(name) as results:
        results.put("1", result({}, 0.5, 100))
    before = name.read_bytes()
    with Results(name, read_only=True) as results:
        assert [r.variant for r in results.of()] == ["base"]
        with pytest.raises(OutputError, match="attempt to write a readonly database"):
            results.put("2", result({}, 0.5, 100))
    assert [p.name for p in tmp_path.iterdir()] == [name.name]
    assert name.read_bytes() == before
    (tmp_path / "empty.db").touch()
    with pytest.raises(SourceError, match="is not a file of results: it is empty; give another name"):
        Results(tmp_path / "empty.db", read_only=True)


def test_a_full_disk(tmp_path: Path) -> None:
    """What was kept stays."""
    with Results(tmp_path / "r.db") as results:
        results.put("1", result({}, 0.5, 100))
        results._db.execute("PRAGMA max_page_count = 1")  # as SQLite finds a disk that is full
        with pytest.raises(OutputError) as e:
            results.put("2", result({"a": "x" * 100_000}, 0.5, 100))
        assert str(e.value) == f"{tmp_path}/r.db: results cannot be kept or read: database or disk is full"
    with Results(tmp_path / "r.db", read_only=True) as results:
        assert [r.variant for r in results.of()] == ["base"]


def of_text(made: Result, text: str, n_chunks: int = 4, trouble: str = "") -> Result:
    about = {"source": "s", "text": text, "model": "M", "texts": ["t.txt"], "n_chunks": n_chunks, "n_ctx": 64}
    return replace(made, provenance=about, trouble=trouble, scores=None if trouble else made.scores)


def test_results_of_other_texts_are_not_compared() -> None:
    """Nor are they mixed; of a variant that was measured again, the latest counts, a failure only alone."""
    short = [result({}, 0.5, 100), result({"a": "x"}, 0.1, 90)]
    short = [replace(r, kld_by_chunk=r.kld_by_chunk[:8]) for r in short]
    long = [result({}, 0.5, 100), result({}, 0.4, 100), result({"a": "x"}, 0.3, 110), result({"a": "y"}, 0.3, 110)]
    found = [
        *(of_text(r, "short", 1) for r in short), *(of_text(r, "long") for r in long),
        of_text(long[2], "long", trouble="no"), of_text(long[3], "long", trouble="not now"),
        of_text(result({"a": "z"}, 0, 1), "long", trouble="never"),
    ]  # fmt: skip
    one, four = comparable(found)
    assert one.about == "s: M, 1 chunk of 64 tokens of t.txt"
    assert four.about == "s: M, 4 chunks of 64 tokens of t.txt"
    assert [(r.variant, r.scores.mean_kld if r.scores else r.trouble) for r in four.results] == [
        ("base", 0.4), ("a=x", 0.3), ("a=y", 0.3), ("a=z", "never"),
    ]  # fmt: skip
    text = show_text(found)
    assert text.startswith("s: M, 1 chunk of 64 tokens of t.txt\n\nvariant")
    assert "\n\n\ns: M, 4 chunks of 64 tokens of t.txt\n\nvariant" in text
    assert "one chunk gives none" in text
    assert "\n\nfailed: a=z: never\n\nWhat each level changes" in text
    data = json.loads(json.dumps(show_json(found), allow_nan=False))
    assert [(e["n_chunks"], e["level"], round(e["difference"], 9), e["low"]) for e in data["effects"]] == [
        (1, "x", -0.4, None), (4, "x", -0.1, pytest.approx(-0.1)), (4, "y", -0.1, pytest.approx(-0.1)),
    ]  # fmt: skip
    assert show_text([]) == "no results"


def test_what_a_result_rests_on(tmp_path: Path, reference: Model, chunks: Chunks, tiny_imatrix: Path) -> None:
    """Another importance matrix of the same name is another; the same in another place is not. The same tokens in
    other chunks are another text."""
    one = study(tmp_path, "base: UD-IQ1_S\naxes: {a: {match: output.weight, types: [Q4_K]}}\n")
    shutil.copy(tiny_imatrix, tmp_path / "im.gguf")
    (tmp_path / "there").mkdir()
    shutil.copy(tiny_imatrix, tmp_path / "there" / "other.gguf")

    def computes(imatrix: Path, of: Chunks = chunks) -> bool:
        told: list[str] = []
        every = list(variants(one, reference.catalogue, str(imatrix)))
        how = AblateOptions(0, ONE)
        with Results(tmp_path / "r.db") as results:
            made = ablate(one, every, reference, of, results, how, lambda what, *_: told.append(what))
        assert [(r.variant, r.scores is None) for r in made] == [("base", False), ("a=Q4_K", False)]
        return bool(told)

    assert computes(tmp_path / "im.gguf")
    assert not computes(tmp_path / "there" / "other.gguf")
    weights, entries = open_imatrix(str(tiny_imatrix)), {}
    for name in weights.entries:
        sums = weights.sums(name)
        entries[name] = (np.sqrt(sums.in_sum2), sums.counts[:, None])
    gguf_imatrix(tmp_path / "im.gguf", entries)
    assert computes(tmp_path / "im.gguf")
    assert not computes(tmp_path / "im.gguf")
    assert computes(tmp_path / "im.gguf", Chunks(chunks.tokens.reshape(2, 64), first=32))


def test_a_fault_of_the_reference_ends_a_study(tmp_path: Path, v3: Path, chunks: Chunks) -> None:
    """It is not measured again for every variant, and no variant gets the blame."""
    poke(v3, "model.layers.1.post_attention_layernorm.weight", 0, b"\xc0\x7f")
    broken = Model(open_model(str(v3), OPTIONS))
    one = study(tmp_path, STUDY.replace("UD-IQ1_S", "Q8_0"))
    every = list(variants(one, broken.catalogue))
    with Results(tmp_path / "r.db") as results:
        with pytest.raises(WeightError) as e:
            ablate(one, every, broken, chunks, results, AblateOptions(0, ONE))
        assert str(e.value) == (
            "'blk.1.ffn_norm.weight' (from model-00001-of-00002.safetensors: "
            "'model.layers.1.post_attention_layernorm.weight'), row 0, column 0 is nan; llama-quantize refuses such "
            "weights too: the checkpoint is damaged, download that shard again"
        )
        assert list(results.of()) == []


def test_a_study_none_of_whose_variants_can_be(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    """It is no success, and nothing is made."""
    (tmp_path / "words.txt").write_text("one two three four five " * 300)
    (tmp_path / "study.yaml").write_text(STUDY.replace("UD-IQ1_S", "UD-IQ1_SS"))
    args = ("--pre", "deepseek-v3", "--text", tmp_path / "words.txt", "-o", tmp_path / "r.db")
    out = quantkit("ablate", "run", tmp_path / "study.yaml", tiny_v3, *args)
    assert out.returncode == 3, out.stderr
    assert "no shipped recipe is called 'UD-IQ1_SS' (did you mean UD-IQ1_S?)" in out.stderr
    assert "Traceback" not in out.stderr
    assert not (tmp_path / "r.db").exists()
    shown = quantkit("ablate", "show", tmp_path / "r.db")
    assert shown.returncode == 4
    assert not (tmp_path / "r.db").exists()


def test_a_policy_is_the_studys_or_what_is_given(tmp_path: Path, reference: Model, tiny_imatrix: Path) -> None:
    one = study(tmp_path, "imatrix_policy: sibling,prior\n" + STUDY)

    def policies(given: Policy | None = None) -> set[str]:
        every = variants(one, reference.catalogue, str(tiny_imatrix), given)
        return {v.plan.policy.text for v in every if v.plan is not None}

    assert policies() == {"sibling,prior"}
    assert policies(parse_policy("ones")) == {"ones"}


def test_an_interrupt_tells_what_is_kept(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    study(tmp_path, STUDY.replace("Q4_K]", "Q3_K, Q4_K, Q5_K, Q6_K, Q8_0]"))
    (tmp_path / "words.txt").write_text("one two three four five six seven " * 2000)
    command = [
        sys.executable, "-m", "quantkit", "ablate", "run", "study.yaml", tiny_v3, "--pre", "deepseek-v3", "--imatrix",
        tiny_imatrix, "--text", "words.txt", "-c", "64", "-t", "1", "-o", "r.db", "--at-a-time", "1", "-q",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    n = 0
    while not n and process.poll() is None:
        time.sleep(0.05)
        if (tmp_path / "r.db").exists():
            with suppress(SourceError, OutputError), Results(tmp_path / "r.db", read_only=True) as results:
                n = len(list(results.of()))
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    with Results(tmp_path / "r.db", read_only=True) as results:
        n = len(list(results.of()))
    assert said.strip() == (
        f"interrupted; r.db keeps the results of {n} variant{'s' * (n != 1)}; run the same command again to continue"
    )


def test_command(quantkit: Run, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    study(tmp_path)
    words = tmp_path / "words.txt"
    random = np.random.default_rng(5)
    words.write_text(" ".join("".join(random.choice(list("abcdefgh"), 5)) for _ in range(600)))
    args = (
        "ablate", "run", tmp_path / "study.yaml", tiny_v3, "--pre", "deepseek-v3", "--imatrix", tiny_imatrix,
        "--text", words, "-c", "64",
        "--chunks", "2", "-t", "1", "-o", tmp_path / "r.db",
    )  # fmt: skip
    dry = quantkit(*args, "--dry-run")
    assert "4 variants of UD-IQ1_S, one at a time; 1 pass over the text" in dry.stdout
    planned = json.loads(quantkit(*args, "--dry-run", "--json").stdout)
    assert [v["variant"] for v in planned["variants"]] == ["base", "down=Q2_K", "down=Q4_K", "early=moe[:1]"]
    assert f"{planned['variants'][1]['file_bytes']:,}" in dry.stdout
    assert not (tmp_path / "r.db").exists()
    out = quantkit(*args)
    assert out.returncode == 0, out.stderr
    assert "What each level changes, all else alike:" in out.stdout
    shown = quantkit("ablate", "show", tmp_path / "r.db", "--json")
    data = json.loads(shown.stdout)
    assert [r["variant"] for r in data["results"]] == ["base", "down=Q2_K", "down=Q4_K", "early=moe[:1]"]
    assert {e["axis"] for e in data["effects"]} == {"down", "early"}
    again = json.loads(quantkit(*args, "--json").stdout)
    assert again["results"] == data["results"]
    assert again["front"] == data["front"]
