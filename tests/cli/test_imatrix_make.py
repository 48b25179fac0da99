"""quantkit imatrix make on the command line: what it prints, JSON, usage, errors in one sentence, signals, no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import factory
import making
import pytest
from conftest import Run

import quantkit as qk
from quantkit.gguf.header import read_header
from quantkit.imatrix.matrix import open_imatrix

ENV = {"OMP_NUM_THREADS": "1"}
PRE = ("--pre", "deepseek-v3", "-t", "1", "-c", "32")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.some_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_what_it_prints_and_what_python_makes(quantkit: Run, tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    out, cov = tmp_path / "a.gguf", tmp_path / "cov"
    how = (*PRE, "--text", file, "--chunks", "2")
    done = quantkit("imatrix", "make", tiny_v3, *how, "-o", out, "--covariance", cov, env=ENV)
    assert done.returncode == 0, done.stderr
    n, entries = out.stat().st_size, len(open_imatrix(str(out)).entries)
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        re.escape(f"{cov}: covariance of ") + r"[\d,]+ bytes = [\d.]+ MiB = [\d.]+ MB: .* of experts' ffn_down",
        lines[0],
    )
    assert lines[1:4] == [
        f"Tiny-V3: {file.stat().st_size:,} bytes of text, 2 chunks of 32 tokens",
        f"{out}  {n:,} bytes, {entries} entries, 2 chunks",
        "0 of 8 experts were chosen by no token",
    ]
    assert re.fullmatch(
        r"64 tokens in [\d.]+ s, [\d,]+ tokens/s, [\d,]+ bytes of weights read, engine native", lines[5]
    )
    model = qk.open_model(tiny_v3, pre="deepseek-v3")
    made = qk.imatrix.make(model, [file], tmp_path / "b.gguf", 32, 2, options=qk.imatrix.ImatrixOptions(threads=1))
    assert (made.n_entries, made.n_chunks, made.n_experts, made.n_unseen) == (entries, 2, 8, 0)
    assert (tmp_path / "b.gguf").read_bytes() == out.read_bytes()


def test_json(quantkit: Run, tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    how = (*PRE, "--text", file, "--chunks", "4", "--target-coverage", "50%:10", "--json")
    done = quantkit("imatrix", "make", tiny_v3, *how, "-o", out, env=ENV)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["bytes_read"] > 100_000
    assert said["coverage"] >= 0.5
    assert said | {"seconds": 0, "bytes_read": 0, "coverage": 0} == {
        "file": str(out), "bytes": out.stat().st_size, "entries": 35, "chunks": said["chunks"], "chunk_size": 32,
        "tokens": 32 * said["chunks"], "bytes_read": 0, "experts": 8, "never_seen": 0, "coverage": 0,
        "target": [0.5, 10], "engine": "native", "seconds": 0,
    }  # fmt: skip


@pytest.mark.tools
def test_the_stock_tool_by_name(quantkit: Run, tiny_bf16: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    how = ("--engine", "llama-imatrix", "-t", "1", "-c", "32", "--text", file, "--chunks", "3", "--json")
    done = quantkit("imatrix", "make", tiny_bf16, *how, "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["engine"], said["chunks"], said["entries"]) == ("llama-imatrix", 3, 35)
    assert open_imatrix(str(out)).datasets == (str(file),)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--text x", "Missing option '-o'."),
        ("-o x.gguf", "Missing option '--text'."),
        ("-o x.gguf --text x --pooled-experts", "--pooled-experts needs --covariance"),
        ("-o x.gguf --text x --fisher", "--fisher needs --covariance"),
        ("-o x.gguf --text x --covariance c --fisher --device cuda", "--fisher needs --device cpu"),
        ("-o x.gguf --text x --disk 5GB", "--disk SIZE needs --covariance"),
        ("-o x.gguf --text x --disk 5GB/s", "--disk RATE needs --estimate"),
        ("-o x.gguf --text x --gpu-tflops 5", "--gpu-tflops needs --estimate"),
        ("-o x.gguf --text x --via Q8_0", "--via needs --engine llama-imatrix"),
        ("-o x.gguf --text x --engine llama-imatrix --chat", "--chat needs --engine native"),
        ("--estimate", "--estimate needs --text-tokens, or a --text to count"),
        (
            "-o x.gguf --text x --target-coverage 120%:3",
            "Invalid value for '--target-coverage': '120%:3' is not a share of experts and a number of tokens such as "
            "99%:100",
        ),
    ],
)
def test_options_that_do_not_go_together(args: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from quantkit.cli import cli

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["imatrix", "make", "deepseek-r1", *args.split()])
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == f"Error: {says}"


def test_errors_in_one_sentence(quantkit: Run, tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    out = tmp_path / "x.gguf"
    for args, code, says in (
        ((tiny_v3, "--text", empty), 14, f"error: {empty}: has 0 bytes of text; give a longer one"),
        (("deepseek-r1", "--text", file), 4, "error: deepseek-r1: "),
        ((tiny_v3, "--text", file, "--device", "cuda"), 9, "error: torch "),
        ((tiny_v3, "--text", tiny_v3 / "config.json", "-c", "9999"), 14, f"error: {tiny_v3 / 'config.json'}: "),
    ):
        done = quantkit("imatrix", "make", *args, "--pre", "deepseek-v3", "-o", out, "-q", env=ENV)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith(says)
        assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.tools
def test_a_gguf_of_another_vocabulary(quantkit: Run, tiny_bf16: Path, file: Path, tmp_path: Path) -> None:
    """Its embedding has fewer rows than its tokenizer has tokens: the header says 64, and the text has more."""
    from gguf import GGUFReader

    header = read_header(tiny_bf16)
    tensors = {
        t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, t.data.tobytes())
        for t in GGUFReader(tiny_bf16).tensors
    }
    for name in ("token_embd.weight", "output.weight"):
        (n_cols, n_rows), type_, data = tensors[name]
        tensors[name] = (n_cols, 64), type_, data[: len(data) * 64 // n_rows]
    model = tmp_path / "other.gguf"
    factory.gguf_file(model, tensors, list(header.kvs))
    done = quantkit("imatrix", "make", model, "--text", file, "-c", "32", "-o", tmp_path / "x.gguf", "-q", env=ENV)
    assert done.returncode == 4, done.stderr
    assert re.fullmatch(
        r"error: .+: token \d+ is not one of its 64; was the text tokenized with another model's tokenizer\?\n",
        done.stderr,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["other.gguf"]


def test_interrupted_it_says_what_is_kept(tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    """SIGINT while the pass computes; the same command goes on to the same bytes."""
    out = tmp_path / "x.gguf"
    command = [
        sys.executable, "-m", "quantkit", "imatrix", "make", str(tiny_v3), *PRE, "--text", str(file), "-o", str(out),
    ]  # fmt: skip
    # a second's sleep after each layer
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys, time\n"
        "def hook(event, args):\n"
        "    if event == 'os.rename' and str(args[1]).endswith('state'):\n"
        "        print('kept', file=sys.stderr, flush=True)\n"
        "        time.sleep(1)\n"
        "sys.addaudithook(hook)\n"
    )
    env = (
        os.environ | ENV | {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}
    )
    with subprocess.Popen(
        command, env=env, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        before: list[str] = []
        while before.count("kept\n") < 2:
            before.append(process.stderr.readline())
            assert before[-1], before
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130
    kept = f"interrupted; what is finished is kept in {out}.partial; the same command goes on there\n"
    assert said.endswith(kept)
    assert not out.exists()
    shutil.rmtree(site)
    done = subprocess.run(command, env=os.environ | ENV, capture_output=True, cwd=tempfile.gettempdir(), check=False)
    assert done.returncode == 0, done.stderr
    making.make(tiny_v3, file, tmp_path / "whole.gguf", n_chunks=None)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.gguf", "x.gguf"]


def test_without_torch(quantkit: Run, tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))}
    done = quantkit("imatrix", "make", tiny_v3, *PRE, "--text", file, "-o", tmp_path / "x.gguf", env=env)
    says = "error: torch, which computes models, is not installed; run: pip install 'quantkit[lab]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (9, "", says)
    # an estimate needs none
    done = quantkit("imatrix", "make", "deepseek-r1", "--estimate", "--text-tokens", "1M", env=env)
    assert done.returncode == 0, done.stderr


def test_an_estimate(quantkit: Run, tmp_path: Path) -> None:
    rates = ("--gpu-tflops", "400", "--disk", "5GB/s", "--text-tokens", "1M")
    done = quantkit("imatrix", "make", "deepseek-r1", "--estimate", *rates, "--threads", "3")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert ", measured here on one thread, times 3  " in lines[8]
    assert lines[:3] == [
        "deepseek-r1: 999,936 tokens, 1,953 chunks of 512, through 61 layers, in one pass",
        "669.2 G weights in matrices, 35.7 G of them for each token",
        "14,848 experts; 14,848 are read, where tokens choose evenly: 31,248 tokens each",
    ]
    assert lines[6].split()[:4] == ["computing", "75.75", "PFLOP", "400.00"]
    assert lines[7].split()[:5] == ["reading", "671.51", "GB", "5.00", "GB/s,"]
    said = json.loads(
        quantkit(
            "imatrix", "make", "deepseek-r1", "--estimate", *rates, "--json", "--covariance", tmp_path / "c"
        ).stdout
    )
    assert said["flop_weights"] == 2 * 35_697_917_952 * 999_936
    assert said["seconds"]["computing"] == pytest.approx(said["flop"] / 400e12)
    assert round(said["covariance_bytes"] / 1e9, 2) == 177.08
    assert not list(tmp_path.iterdir())
