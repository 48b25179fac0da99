"""Studies whose tensors come from a cache, whose files are built, and which are only estimated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, Tools
from small_builds import OPTIONS, build, plan_of
from test_ablate import STUDY, study
from test_evaluate import ONE, Chunks

from quantkit import text
from quantkit.base.errors import OutputError
from quantkit.building.cache import Cache
from quantkit.building.cached_tensors import CachedTensors
from quantkit.forward.model import Model
from quantkit.lab.calibration.estimate import Rates
from quantkit.lab.evaluation.evaluate import of_plan, score_tokens
from quantkit.lab.evaluation.llama_perplexity import Tool
from quantkit.lab.studies.ablate import AblateOptions, ByTool, ablate
from quantkit.lab.studies.estimate import StudyWork, Text, study_times, study_work
from quantkit.lab.studies.files import StudyFiles
from quantkit.lab.studies.findings import comparable
from quantkit.lab.studies.results import Results
from quantkit.lab.studies.study import variants
from quantkit.model.open import open_model
from quantkit.recipe.load import load

OUTPUT = "base: UD-IQ1_S\naxes: {out: {match: output.weight, types: [Q4_K]}}\n"


@pytest.fixture(scope="module")
def reference(tiny_v3: Path) -> Model:
    return Model(open_model(str(tiny_v3), OPTIONS))


@pytest.fixture(scope="module")
def chunks(reference: Model) -> Chunks:
    return Chunks(np.random.default_rng(3).integers(0, reference.family.n_vocab, (2, 32)).astype(np.int32))


# ------------------------------------------------------------ the cache


def test_tensors_come_from_a_cache(
    tmp_path: Path, tiny_v3: Path, reference: Model, chunks: Chunks, tiny_imatrix: Path
) -> None:
    """To the bit what is quantized on its way; made once; and what is damaged or gone is quantized on its way."""
    from quantkit.imatrix.matrix import open_imatrix
    from quantkit.planning.plan import with_values

    plan = with_values(plan_of(tiny_v3, load("UD-IQ1_S"), tiny_imatrix), open_imatrix(str(tiny_imatrix)))

    def klds(cached: CachedTensors | None) -> np.ndarray:
        candidate = of_plan(reference, plan, "x", cached=cached)
        return score_tokens(reference, [candidate.model], chunks, ONE, lambda what, n, of: None)[1].kld

    direct = klds(None)
    first = CachedTensors(Cache(tmp_path / "c", 10**9), 1)
    assert np.array_equal(klds(first), direct)
    assert first.n_made > 20
    again = CachedTensors(Cache(tmp_path / "c", 10**9), 1)
    before = reference.weights.bytes_read
    assert np.array_equal(klds(again), direct)
    assert again.n_made == 0
    assert again.cache.n_found > 20
    from_cache = reference.weights.bytes_read - before
    klds(None)
    assert from_cache < reference.weights.bytes_read - before
    entries = again.cache.entries()
    for _, _, path in entries[::2]:
        raw = bytearray(path.read_bytes())
        raw[5] ^= 1
        path.write_bytes(raw)
    damaged = CachedTensors(Cache(tmp_path / "c", 10**9), 1)
    assert np.array_equal(klds(damaged), direct)
    assert damaged.cache.n_corrupt > 0
    small = CachedTensors(Cache(tmp_path / "small", 50_000), 1)
    assert np.array_equal(klds(small), direct)
    assert sum(n for _, n, _ in small.cache.entries()) <= 50_000


def test_a_build_takes_what_a_study_has_made(tmp_path: Path, reference: Model, tiny_imatrix: Path) -> None:
    one = study(tmp_path, OUTPUT)
    every = list(variants(one, reference.catalogue, str(tiny_imatrix)))
    cached = CachedTensors(Cache(tmp_path / "c", 10**9), 1)
    for v in every:
        assert v.plan is not None
        of_plan(reference, v.plan, v.name, cached=cached)
    n_made = cached.n_made
    cache = Cache(tmp_path / "c", 10**9)
    files = StudyFiles(tmp_path / "built", one.name, 1, cache)
    made = files.build(every[0])
    assert cache.n_found > 0
    assert every[0].plan is not None
    assert cache.n_found + cache.n_kept == len(every[0].plan.tensors)
    # of the embedding a study needs rows only, and of the variant it has one tensor more
    assert n_made == cache.n_found + 1
    assert made.read_bytes() == build(every[0].plan, tmp_path / "x.gguf", tiny_imatrix).read_bytes()


# ------------------------------------------------------------ files


def test_files_are_built_once(tmp_path: Path, reference: Model, tiny_imatrix: Path) -> None:
    one = study(tmp_path)
    every = list(variants(one, reference.catalogue, str(tiny_imatrix)))
    files = StudyFiles(tmp_path / "built", one.name, 1)
    made = [files.build(v) for v in every[:2]]
    assert [p.name for p in made] == ["study-base.gguf", "study-down=Q2_K.gguf"]
    assert [p.stat().st_size for p in made] == [v.file_bytes for v in every[:2]]
    assert files.path_of("early=moe[:1]").name.startswith("study-early=moe_1-")
    assert files.path_of("early=moe[:1]") != files.path_of("early=moe(:1)")
    were = [p.stat() for p in made]
    again = StudyFiles(tmp_path / "built", one.name, 1)
    assert [again.build(v) for v in every[:2]] == made
    assert [p.stat() for p in made] == were
    record = json.loads((tmp_path / "built" / "files.json").read_text())
    assert {name: of["variant"] for name, of in record["files"].items()} == {
        "study-base.gguf": "base", "study-down=Q2_K.gguf": "down=Q2_K",
    }  # fmt: skip
    made[0].write_bytes(b"mine")
    with pytest.raises(OutputError) as e:
        again.build(every[0])
    assert str(e.value) == f"{made[0]}: exists; choose another name, or replace it with --force"
    forced = StudyFiles(tmp_path / "built", one.name, 1, replace=True)
    assert forced.build(every[0]).stat().st_size == every[0].file_bytes
    (tmp_path / "built" / "files.json").write_text("[]")
    with pytest.raises(OutputError) as e:
        StudyFiles(tmp_path / "built", one.name)
    assert str(e.value) == (
        f"{tmp_path / 'built' / 'files.json'}: is not a record of a study's files; give another folder, or remove it"
    )


@pytest.mark.tools
def test_files_by_llama_perplexity(tools: Tools, tmp_path: Path, reference: Model, tiny_imatrix: Path) -> None:
    """A checkpoint and its variants as files, by the stock tool: nearly the figures of the pass, and kept apart."""
    one = study(tmp_path, OUTPUT)
    random = np.random.default_rng(5)
    words = tmp_path / "words.txt"
    words.write_text(" ".join("".join(random.choice(list("abcdefgh"), 5)) for _ in range(400)))
    some = text.chunks(reference.catalogue, [words], 64, 4)
    every = list(variants(one, reference.catalogue, str(tiny_imatrix)))
    files = StudyFiles(tmp_path / "built", one.name, 1)
    tool = Tool(tools.perplexity, 64, 4, reference.family.n_vocab, 1)
    ways = (AblateOptions(0, ONE), AblateOptions(0, ONE, files=files, by_tool=ByTool(tool, words.read_text())))
    with Results(tmp_path / "r.db") as results:
        for options in (*ways, ways[1]):
            ablate(one, every, reference, some, results, options)
        found = comparable(list(results.of()))
    assert [m.engine for m in found] == ["native", "llama.cpp"]
    assert [m.about.endswith(", engine llama.cpp") for m in found] == [False, True]
    for a, b in zip(found[0].results, found[1].results, strict=True):
        assert a.scores is not None
        assert b.scores is not None
        assert b.scores.mean_kld == pytest.approx(a.scores.mean_kld, rel=0.05)
        assert a.scores.file_bytes == b.scores.file_bytes
    assert {p.name for p in (tmp_path / "built").iterdir()} == {
        "reference.gguf", "study-base.gguf", "study-out=Q4_K.gguf", "files.json",
    }  # fmt: skip


# ------------------------------------------------------------ the estimate


def work(tmp_path: Path, reference: Model, given: str, at_a_time: int = 0) -> StudyWork:
    one = study(tmp_path, given)
    every = list(variants(one, reference.catalogue, values=False))
    return study_work(one, every, reference.catalogue, Text(6400, 64), at_a_time=at_a_time)


def test_an_estimate_counts_what_is_shared_once(tmp_path: Path, reference: Model) -> None:
    together = work(tmp_path, reference, OUTPUT)
    apart = work(tmp_path, reference, OUTPUT, 1)
    assert (together.n_variants, together.n_passes, apart.n_passes) == (2, 1, 2)
    assert apart.bytes_read == 2 * together.bytes_read
    sizes = {t.name: t.n_elements for t in reference.catalogue.tensors}
    head = sizes["output.weight"] * 6400  # two operations a weight, for half of the tokens
    whole = together.flop_apart // 3
    # the base and the variant differ in the output alone: the layers of the reference and of one of them, three heads
    assert together.flop == pytest.approx(2 * (whole - head) + 3 * head, rel=1e-9)
    assert apart.flop == pytest.approx(4 * whole, rel=1e-9)
    assert sum(apart.quantized_once.values()) == sum(together.quantized.values())
    in_each = sum(together.quantized.values()) - sizes["output.weight"]
    assert sum(apart.quantized.values()) == 2 * in_each
    assert together.quantized["Q4_K"] >= sizes["output.weight"]


def test_times_of_a_study(tmp_path: Path, reference: Model) -> None:
    of = work(tmp_path, reference, OUTPUT)
    times = study_times(
        of, Rates(of.flop / 100, of.bytes_read / 7, of.bytes_read / 11), dict.fromkeys(of.quantized, 1.0), 2
    )
    assert times.computing == pytest.approx(100)
    assert times.reading == pytest.approx(11)
    assert times.quantizing == pytest.approx(sum(of.quantized.values()) / 2)
    assert times.total == times.quantizing


def test_r1_is_estimated_from_its_config(quantkit: Run, tmp_path: Path) -> None:
    study(tmp_path)
    args = ("ablate", tmp_path / "study.yaml", "deepseek-r1", "--estimate", "--text-tokens", "51200", "--disk", "5GB/s")
    said = quantkit(*args, "--gpu-tflops", "400", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert (found["n_variants"], found["n_passes"], found["at_a_time"]) == (4, 4, 1)
    # 37 G weights a token, twice; the reference is computed in each pass
    assert found["flop_apart"] == pytest.approx(5 * 2 * 37e9 * 51200, rel=0.15)
    assert found["bytes_read"] == pytest.approx(4 * 672e9, rel=0.03)
    assert found["seconds"]["computing"] == pytest.approx(found["flop"] / 400e12)
    said = quantkit(*args, "--memory", "40G")
    assert "4 variants, 51,200 tokens in chunks of 512, 1 pass of up to 4 beside the reference" in said.stdout
    assert "5.00 GB/s, given" in said.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--text w -o r.db --engine llama.cpp", "--engine llama.cpp measures files: give --files DIR, where they are "
         "built"),
        ("--text w -o r.db --engine llama.cpp --files d --chat", "--engine llama.cpp reads plain text: leave out "
         "--chat and --parse-special"),
        ("--text w -o r.db --llama-bin .", "--llama-bin needs --engine llama.cpp"),
        ("--text w -o r.db --force", "--force needs --files: it is for what is there"),
        ("--estimate", "--estimate needs --text-tokens, or a --text to count"),
        ("--text w -o r.db --disk 5GB/s", "--disk needs --estimate"),
        ("--estimate --text-tokens 1M --disk 5GB", "'5GB' is no rate such as 5GB/s"),
        ("-o r.db", "Missing option '--text'."),
        ("--text w", "Missing option '-o'."),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(quantkit: Run, tmp_path: Path, args: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(STUDY)
    (tmp_path / "w").write_text("words")
    said = quantkit("ablate", "s.yaml", "deepseek-r1", *args.split(), cwd=tmp_path)
    assert said.returncode == 2
    assert says in said.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.yaml", "w"]
