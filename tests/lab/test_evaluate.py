"""Candidates beside their reference: never built against built, the stock tool against ours, the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import factory
import numpy as np
import pytest
from conftest import Run, Tools
from factory import gguf_imatrix
from small_builds import OPTIONS, build

from quantkit.base.errors import SourceError, TextError
from quantkit.forward.model import Model
from quantkit.forward.stream import Options
from quantkit.gguf.header import STRING, U32, kv
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.policies import parse_policy
from quantkit.lab.evaluation.evaluate import (
    EvalOptions,
    about_reference,
    agreement,
    evaluate,
    of_file,
    of_plan,
    score_tokens,
)
from quantkit.lab.evaluation.llama_perplexity import Printed, Tool, evaluate_files, figures_of, gguf_file
from quantkit.lab.evaluation.logits_file import LogitsFile, expected_bytes
from quantkit.lab.evaluation.report import markdown
from quantkit.lab.evaluation.scores import Evaluation, Scored, Tokens, compare, interval, pairs_of, score
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan, with_values
from quantkit.recipe.load import load

ONE = Options(n_threads=1)


class Chunks(NamedTuple):
    """As quantkit.text makes them."""

    tokens: np.ndarray
    names: tuple[str, ...] = ("some text",)
    first: int = 16

    @property
    def targets(self) -> np.ndarray:
        return self.tokens[:, self.first + 1 :]


@pytest.fixture(scope="module")
def reference(tiny_v3: Path) -> Model:
    return Model(open_model(str(tiny_v3), OPTIONS))


@pytest.fixture(scope="module")
def chunks(reference: Model) -> Chunks:
    random = np.random.default_rng(3)
    return Chunks(random.integers(0, reference.family.n_vocab, (6, 32)).astype(np.int32))


def test_never_built_equals_built(
    reference: Model, chunks: Chunks, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """A recipe in memory and its file give the same predictions, to the bit, and the same size."""
    weights = open_imatrix(str(tiny_imatrix))
    plan = with_values(make_plan(reference.catalogue, load("UD-IQ1_S"), weights), weights)
    build(plan, tmp_path / "built.gguf", tiny_imatrix, n_threads=1)
    built = of_file(open_model(str(tmp_path / "built.gguf")), "built")
    in_memory = of_plan(reference, plan, "in memory")
    found = evaluate(reference, [built, in_memory], chunks, EvalOptions(forward=ONE))
    a, b = found.candidates
    assert a.file_bytes == (tmp_path / "built.gguf").stat().st_size == b.file_bytes
    assert (a.mean_kld, a.ppl, a.kld_max, a.same_top) == (b.mean_kld, b.ppl, b.kld_max, b.same_top)
    assert a.mean_kld > 0
    assert abs(a.bpw - b.bpw) < 1e-12
    (pair,) = found.pairs
    assert (pair.difference, pair.verdict, pair.bytes_ratio) == (0, "cannot tell", 1)
    assert json.loads(json.dumps(found.to_json()))["reference"]["n_tokens"] == 6 * 15


def lacking(imatrix: Path, out: Path) -> Path:
    """The same importance matrix, with an expert that was never seen in each tensor of experts."""
    weights, entries = open_imatrix(str(imatrix)), {}
    for name in weights.entries:
        sums = weights.sums(name)
        if "_exps" in name:
            sums.in_sum2[1], sums.counts[1] = 0, 0
        entries[name] = (sums.in_sum2, sums.counts[:, None])
    return gguf_imatrix(out, entries)


def test_what_stands_in_for_missing_data_is_used(
    quantkit: Run, reference: Model, chunks: Chunks, tiny_v3: Path, tiny_imatrix: Path, words: Path, tmp_path: Path
) -> None:
    """A plan's policy is a candidate's too, as it is its file's."""
    file = lacking(tiny_imatrix, tmp_path / "lacking.gguf")
    weights = open_imatrix(str(file))
    plans = {
        text: with_values(
            make_plan(reference.catalogue, load("UD-IQ1_S"), weights, policy=parse_policy(text)), weights
        )
        for text in ("ones", "prior")
    }  # fmt: skip
    build(plans["prior"], tmp_path / "built.gguf", file, n_threads=1)
    several = [
        of_plan(reference, plans["ones"], "ones"), of_plan(reference, plans["prior"], "prior"),
        of_file(open_model(str(tmp_path / "built.gguf")), "built"),
    ]  # fmt: skip
    ones, prior, built = evaluate(reference, several, chunks, EvalOptions(forward=ONE)).candidates
    assert prior.mean_kld == built.mean_kld
    assert prior.file_bytes == built.file_bytes == (tmp_path / "built.gguf").stat().st_size
    assert ones.mean_kld != prior.mean_kld
    args = (
        "eval",
        tiny_v3,
        "--pre",
        "deepseek-v3",
        "-r",
        "UD-IQ1_S",
        "--text",
        words,
        "-c",
        "64",
        "--chunks",
        "1",
        "-q",
    )
    refused = quantkit(*args, "--imatrix", file)
    assert refused.returncode == 6
    assert "--imatrix-policy" in refused.stderr
    said = quantkit(*args, "--imatrix", file, "--imatrix-policy", "prior", "-t", "1")
    assert said.returncode == 0, said.stderr
    alone = quantkit(*args, "--imatrix-policy", "prior")
    assert alone.returncode == 2
    assert "Error: --imatrix-policy needs --imatrix FILE" in alone.stderr


def test_one_importance_matrix_is_one_for_all_candidates(reference: Model, tiny_imatrix: Path) -> None:
    """Tensors of the same type and weights are quantized once for all candidates; of another policy they are not."""
    weights = open_imatrix(str(tiny_imatrix))

    def key(recipe: str, policy: str) -> object:
        plan = make_plan(reference.catalogue, load(recipe), weights, policy=parse_policy(policy))
        return of_plan(reference, plan, "a candidate").model.key_of("blk.2.ffn_up_exps.weight")

    assert key("UD-IQ1_S", "fail") == key("NAIVE-IQ1_S", "fail")
    assert key("UD-IQ1_S", "fail") != key("UD-IQ1_S", "prior")


def test_a_model_of_another_vocabulary_is_refused(
    tiny_v3: Path, reference: Model, chunks: Chunks, tmp_path: Path
) -> None:
    """As many tokens, but others."""
    shutil.copytree(tiny_v3, tmp_path / "Other")
    file = tmp_path / "Other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    names = sorted(vocab, key=vocab.get)
    a, b = names[40], names[41]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(tokenizer))
    other = of_file(open_model(str(tmp_path / "Other"), OPTIONS), "other")
    same = chunks._replace(tokens=np.where(np.isin(chunks.tokens, (40, 41)), 50, chunks.tokens))
    seen = same.tokens.copy()
    seen[0, 5] = 40
    with pytest.raises(SourceError) as e:
        evaluate(reference, [other], same._replace(tokens=seen), EvalOptions(forward=ONE))
    n = len(np.unique(seen))
    assert str(e.value) == (
        f"other: has another vocabulary than {reference.name}: token 40 is {b!r}, not {a!r}, and 1 of the text's {n} "
        "tokens differ; compare models of one vocabulary"
    )


def test_chunks_in_which_nothing_is_scored(reference: Model) -> None:
    with pytest.raises(TextError) as e:
        score_tokens(reference, [], Chunks(np.zeros((2, 2), np.int32), first=1), ONE, lambda *_: None)
    assert str(e.value) == "a chunk of 2 tokens has none that is scored: give --ctx 3 or more"


def test_one_chunk_gives_no_interval() -> None:
    tokens = Tokens(*(np.ones((1, 3)) for _ in range(4)))
    a, b = (score(name, (8, 1.0), tokens, tokens.nll) for name in ("a|b", "b"))
    found = Evaluation("r", 2.0, 1, 8, ("t",), (a, b), pairs_of((a, b), [tokens.kld, tokens.kld]))
    text = markdown(found)
    assert "1 chunk of 8, of t; engine native" in text
    assert "| one chunk gives none |" in text
    assert "inf" not in text
    assert r"| a\|b " in text
    (row,) = (line for line in text.splitlines() if line.startswith("| b "))
    assert row.count("|") == 16
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["pairs"][0]["low"] is None


def test_the_reference_against_itself(reference: Model, chunks: Chunks) -> None:
    base, same = score_tokens(reference, [reference], chunks, ONE, lambda *_: None)
    assert np.array_equal(base.nll, same.nll)
    assert not same.kld.any()
    assert not same.dp.any()
    assert same.same_top.all()


def test_more_bits_are_closer(reference: Model, chunks: Chunks, tiny_imatrix: Path) -> None:
    weights = open_imatrix(str(tiny_imatrix))
    names = ("NAIVE-IQ1_S", "Q4_K_M", "Q8_0")
    plans = [with_values(make_plan(reference.catalogue, load(name), weights), weights) for name in names]
    found = evaluate(reference, [of_plan(reference, p, n) for p, n in zip(plans, names, strict=True)], chunks)
    klds = [c.mean_kld for c in found.candidates]
    assert klds[0] > klds[1] > klds[2] > 0
    assert found.pairs[1].verdict == "Q8_0 is better"


def test_greedy_agreement(reference: Model, chunks: Chunks, tiny_imatrix: Path) -> None:
    """The reference's continuation is what one token at a time gives, and the reference agrees with itself."""
    weights = open_imatrix(str(tiny_imatrix))
    plan = with_values(make_plan(reference.catalogue, load("NAIVE-IQ1_S"), weights), weights)
    options = EvalOptions(n_prompts=4, forward=ONE)
    same, other = agreement(
        reference, [reference, of_plan(reference, plan, "naive").model], chunks, options, lambda *_: None
    )
    assert (same.identical, same.mean_first_difference, same.n_prompts) == (1, 16, 4)
    assert other.mean_first_difference < 16


def test_chunks_too_short_for_prompts(reference: Model, chunks: Chunks) -> None:
    """What is called 32 tokens is 32 tokens."""
    with pytest.raises(TextError) as e:
        evaluate(reference, [], chunks, EvalOptions(1, ONE))
    assert str(e.value) == (
        "a prompt, half of a chunk, is continued for 32 tokens, and half of 32 are fewer: give --ctx 64 or more, or "
        "leave out --prompts"
    )


def test_a_reference_that_is_quantized_itself(reference: Model, sound: Path) -> None:
    assert about_reference(reference) is None
    says = about_reference(Model(open_model(str(sound)), "sound"))
    assert says is not None
    assert says.startswith("the reference sound is quantized itself (IQ2_XXS, Q2_K, Q4_K, Q5_0, Q6_K, Q8_0): ")
    assert says.endswith("beside the model that it was made of, and recipes quantize it a second time")


def test_figures_by_hand() -> None:
    kld = np.array([[0.0, 0.2], [0.1, 0.5]])
    nll = np.array([[1.0, 2.0], [3.0, 2.0]])
    of = Tokens(nll + 0.1, kld, np.full((2, 2), -0.5), np.array([[1.0, 0.0], [1.0, 1.0]]))
    found = score("x", (1000, 2.5), of, nll)
    assert found.mean_kld == pytest.approx(0.2)
    assert found.ppl == pytest.approx(np.exp(2.1))
    assert found.ppl_ratio == pytest.approx(np.exp(0.1))
    assert found.kld_max == 0.5
    assert found.rms_dp == 0.5
    assert found.same_top == 0.75
    assert found.mean_kld_se == pytest.approx(kld.std() / np.sqrt(3))


def test_verdicts() -> None:
    def one(name: str, nbytes: int) -> Scored:
        tokens = Tokens(*(np.ones((4, 2)) for _ in range(4)))
        return score(name, (nbytes, 1.0), tokens, np.ones((4, 2)))

    random = np.random.default_rng(0)
    low = random.uniform(0.1, 0.2, (50, 8))
    assert compare(one("a", 100), one("b", 110), low, low + 0.01).verdict == "a is better"
    assert compare(one("a", 100), one("b", 110), low + 0.01, low).verdict == "b is better"
    assert compare(one("a", 100), one("b", 110), low, random.permutation(low)).verdict == "cannot tell"
    assert compare(one("a", 100), one("b", 110), low, low).bytes_ratio == 1.1
    assert interval(np.array([0.5])) == (-np.inf, np.inf)


def test_another_model_is_refused(reference: Model, chunks: Chunks, tiny_dense: Model) -> None:
    with pytest.raises(SourceError, match="they are not the same model"):
        score_tokens(reference, [tiny_dense], chunks, ONE, lambda *_: None)


@pytest.fixture(scope="module")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    import factory

    folder = factory.dense_checkpoint(tmp_path_factory.mktemp("dense"), factory.TINY_LLAMA)
    return Model(open_model(str(folder), OPTIONS))


# ------------------------------------------------------------ llama-perplexity's files


def logits_bytes(n_ctx: int = 8, n_vocab: int = 5, n_chunks: int = 2, seed: int = 0) -> bytes:
    """A file as llama-perplexity writes it, and log probabilities in it that can be told."""
    random = np.random.default_rng(seed)
    head = b"_logits_" + np.array([n_ctx, n_vocab, n_chunks], "<i4").tobytes()
    tokens = random.integers(0, n_vocab, n_chunks * n_ctx).astype("<i4").tobytes()
    n_rows, n_row = n_chunks * (n_ctx - 1 - n_ctx // 2), 2 * ((n_vocab + 1) // 2) + 4
    rows = random.integers(0, 65536, (n_rows, n_row)).astype("<u2")
    rows[:, :4] = np.array([[1e-4, -8.0]] * n_rows, "<f4").view("<u2")
    return head + tokens + rows.tobytes()


def test_logits_file(tmp_path: Path) -> None:
    raw = logits_bytes()
    path = tmp_path / "logits"
    path.write_bytes(raw)
    assert len(raw) == expected_bytes(8, 5, 2)
    found = LogitsFile(path)
    assert (found.n_ctx, found.n_vocab, found.n_chunks, found.n_scored) == (8, 5, 2, 3)
    codes = np.frombuffer(raw, "<u2", offset=20 + 4 * 16).reshape(2, 3, 10)[1, :, 4:9]
    assert np.array_equal(found.log_probs(1), codes.astype(np.float32) * np.float32(1e-4) + np.float32(-8))
    assert np.array_equal(found.targets, found.tokens[:, 5:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw[:-2], "has 202 bytes of 204; llama-perplexity did not finish it: run it again"),
        (lambda raw: raw + b"\0", "has 205 bytes of 204"),
        (lambda raw: b"_logitz_" + raw[8:], "is not a file of llama-perplexity --save-all-logits"),
        (lambda raw: raw[:12], "is not a file of llama-perplexity --save-all-logits"),
        (lambda raw: raw[:12] + b"\xff" * 4 + raw[16:], "says 2 chunks of 8 tokens of -1: damaged"),
    ],
)
def test_damaged_logits_file(tmp_path: Path, change: Callable[[bytes], bytes], says: str) -> None:
    path = tmp_path / "logits"
    path.write_bytes(change(logits_bytes()))
    with pytest.raises(SourceError) as e:
        LogitsFile(path)
    assert says in str(e.value)


# ------------------------------------------------------------ both engines, and the command line


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join("".join(random.choice(list("abcdefgh"), 5)) for _ in range(1500)))
    return path


@pytest.mark.tools
def test_both_engines(
    tools: Tools, reference: Model, tiny_bf16: Path, tiny_v3: Path, tiny_imatrix: Path, words: Path, tmp_path: Path
) -> None:
    """llama-perplexity's log probabilities give nearly the same figures: its products round activations."""
    from quantkit import text

    weights = open_imatrix(str(tiny_imatrix))
    plan = with_values(make_plan(reference.catalogue, load("NAIVE-IQ1_S"), weights), weights)
    build(plan, tmp_path / "built.gguf", tiny_imatrix, n_threads=1)
    chunks = text.chunks(reference.catalogue, [words], 64, 8)
    ours = evaluate(reference, [of_plan(reference, plan, "built")], chunks, EvalOptions(forward=ONE))
    files = [gguf_file(str(tiny_bf16), "bf16"), gguf_file(str(tmp_path / "built.gguf"), "built")]
    tool = Tool(tools.perplexity, 64, 8, reference.family.n_vocab, 1)
    theirs = evaluate_files(files[0], files[1:], (words.read_text(), (str(words),)), tool, folder=tmp_path)
    a, b = ours.candidates[0], theirs.candidates[0]
    assert theirs.noise_kld == 0
    assert theirs.n_tokens == ours.n_tokens
    assert a.file_bytes == b.file_bytes
    assert b.mean_kld == pytest.approx(a.mean_kld, rel=0.05)
    assert theirs.reference_ppl == pytest.approx(ours.reference_ppl, rel=0.005)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("quantkit-eval-")]
    # the tool itself: what has the reference alone is the same in every digit, and so is what is taken from its words;
    # the candidate's logits it has in full, not as codes of 16 bits
    common = ("-f", words, "-c", "64", "--chunks", "8", "-t", "1")
    kept = tmp_path / "logits"
    first = (tools.perplexity, *common, "-m", files[0].path, "--save-all-logits", kept)
    subprocess.run(first, check=True, capture_output=True)
    second = (tools.perplexity, *common, "-m", files[1].path, "--kl-divergence", "--kl-divergence-base", kept)
    lines: list[str] = []
    while not any(line.startswith("Same top p") for line in lines):  # it can end with code 0 before all is written
        lines = subprocess.run(second, check=True, capture_output=True, text=True).stdout.splitlines()
    said = {k.strip(): v.split("±")[0].strip() for k, _, v in (line.partition(":") for line in lines)}
    assert f"{theirs.reference_ppl:.6f}" == said["Mean PPL(base)"]
    assert f"{b.tool_mean_kld:.6f}" == said["Mean    KLD"]
    assert f"{b.tool_ppl:.6f}" == said["Mean PPL(Q)"]
    assert b.mean_kld == pytest.approx(float(said["Mean    KLD"]), abs=1.3e-4)
    assert np.log(b.ppl / float(said["Mean PPL(Q)"])) == pytest.approx(0, abs=1.3e-4)
    assert f"{100 * b.same_top:.3f}" == said["Same top p"]
    assert "| mean KLD, the tool's |" in markdown(theirs)
    quick = evaluate_files(files[0], files[1:], (words.read_text(), (str(words),)), replace(tool, figures=False))
    assert quick.candidates == (replace(b, tool_ppl=None, tool_mean_kld=None),)


def test_a_file_without_a_tokenizer_is_not_for_the_tool(tmp_path: Path) -> None:
    kvs = [kv("general.architecture", STRING, "llama"), kv("llama.block_count", U32, 1)]
    factory.gguf_file(tmp_path / "m.gguf", {"output.weight": ((256, 2), "F32", bytes(2048))}, kvs)
    with pytest.raises(SourceError) as e:
        gguf_file(str(tmp_path / "m.gguf"), "m")
    assert str(e.value) == (
        f"{tmp_path / 'm.gguf'}: has no tokenizer, which llama.cpp needs; give a GGUF with one, or leave out --engine"
    )


@pytest.mark.parametrize("cut", ["Same top p", "Mean    KLD"])
def test_a_summary_that_is_cut_off(cut: str) -> None:
    whole = (
        "Mean PPL(Q)                   :  13.799474 ±   0.899684\n"
        "Mean PPL(base)                :   9.803293 ±   0.616356\n"
        "Mean PPL(Q)/PPL(base)         :   1.407637 ±   0.033387\nMean    KLD:   0.338391 ±   0.009281\n"
        "Same top p: 67.795 ± 1.312 %\n"
    )
    assert figures_of(whole) == Printed(13.799474, 9.803293, 0.338391)
    assert figures_of(whole[: whole.index(cut) + 4]) is None


def test_command(quantkit: Run, tiny_v3: Path, tiny_imatrix: Path, words: Path, tmp_path: Path) -> None:
    out = quantkit(
        "eval", tiny_v3, "--pre", "deepseek-v3", "-r", "Q8_0", "-r", "NAIVE-IQ1_S", "--imatrix", tiny_imatrix,
        "--text", words, "-c", "64",
        "--chunks", "3", "-t", "1", "--json", "--csv", tmp_path / "a.csv", "-o", tmp_path / "a.md", "-q",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert [c["name"] for c in found["candidates"]] == ["Q8_0", "NAIVE-IQ1_S"]
    assert found["pairs"][0]["verdict"] in ("Q8_0 is better", "cannot tell")
    assert "| NAIVE-IQ1_S |" in (tmp_path / "a.md").read_text()
    assert (tmp_path / "a.csv").read_text().startswith("name,file_bytes,bpw,ppl,")
    again = quantkit(
        "eval", tiny_v3, "--pre", "deepseek-v3", "-r", "Q8_0", "--text", words, "-c", "64", "-o", tmp_path / "a.md"
    )
    assert again.returncode == 7
    for twice in (("-r", "Q8_0", "-r", "Q8_0"), (tiny_v3, f"{tiny_v3}/")):
        out = quantkit("eval", tiny_v3, *twice, "--pre", "deepseek-v3", "--text", words, "-c", "64")
        assert out.returncode == 2
        assert f"Error: {twice[-1]} is given twice; give each candidate once" in out.stderr
    nothing = quantkit("eval", tiny_v3, "--pre", "deepseek-v3", "--text", words)
    assert "give a CANDIDATE, or --recipe" in nothing.stderr
    checkpoint = quantkit(
        "eval", tiny_v3, tmp_path / "a.md", "--engine", "llama.cpp", "--text", words, "--pre", "deepseek-v3"
    )
    assert checkpoint.returncode == 4
    assert f"error: {tiny_v3}: llama.cpp runs GGUFs; make one with quantkit build" in checkpoint.stderr
    plain = ("--pre", "deepseek-v3", "--engine", "llama.cpp", "--text", words)
    built = quantkit("eval", tiny_v3, "-r", "Q8_0", *plain)
    assert "build the recipes first, with quantkit build" in built.stderr
