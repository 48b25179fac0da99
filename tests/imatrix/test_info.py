"""What `quantkit imatrix info` says of a file: counts, spread and concentration of hand-made entries; the experts that
were hardly seen; JSON with all that the table has; the picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absent import without
from conftest import Run
from factory import legacy_imatrix
from imatrices import F32

from quantkit import imatrix
from quantkit.base.errors import ImatrixError, OutputError
from quantkit.cli import cli
from quantkit.imatrix.coverage import concentrations
from quantkit.imatrix.entries import Sums
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.write import Facts, write_gguf


def entry(name: str, counts: list[int], row: list[float]) -> Sums:
    """Every matrix has the same row of means."""
    return Sums(name, np.outer(counts, row).astype(F32), np.array(counts, float))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    flat, steep = [1.0] * 200, [1.0] * 100 + [100.0] + [0.0] * 99
    entries = [
        entry("output.weight", [50], flat),
        entry("blk.3.attn_output.weight", [1024], flat),
        entry("blk.10.attn_output.weight", [1024], flat),
        *(entry(f"blk.3.ffn_{kind}_exps.weight", [0, 10, 200, 99], steep) for kind in ("up", "gate")),
        entry("blk.10.ffn_up_exps.weight", [100, 400, 300, 200], flat),
    ]
    write_gguf(tmp_path / "im.gguf", Facts(("a.txt", "b.txt"), 4, 256), entries)
    return tmp_path / "im.gguf"


def run(*words: str | Path) -> None:
    cli.main(["imatrix", "info", *map(str, words)], standalone_mode=False)


def test_the_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, "-q")
    said = capsys.readouterr()
    assert said.err == ""
    lines = [re.split(r"  +", line.strip()) for line in said.out.splitlines()]
    assert lines[0] == [f"{file}: 6 entries, 4 chunks of 256 tokens"]
    assert lines[1] == ["datasets: a.txt, b.txt"]
    assert lines[3] == [
        "tensor", "entries", "experts", "columns", "tokens: min", "10 %", "median", "90 %", "max", "max/min", "top 1 %",
        "never", "< 100",
    ]  # fmt: skip
    assert lines[5:9] == [
        ["output.weight", "1", "200", "50", "50", "50", "50", "50", "1.0", "1.0 %", "0", "1"],
        ["blk.*.attn_output.weight", "2", "200", "1,024", "1,024", "1,024", "1,024", "1,024", "1.0", "1.0 %", "0", "0"],
        # the two largest of 200 columns: 101 of 200
        ["blk.3.ffn_gate_exps.weight", "1", "4", "200", "0", "3", "54", "170", "200", "∞", "50.5 %", "1", "2"],
        ["blk.*.ffn_up_exps.weight", "2", "4", "200", "0", "7", "150", "330", "400", "∞", "25.8 %", "1", "2"],
    ]
    assert said.out.splitlines()[10:] == [
        "top 1 %: share of the sum of squares in the largest 1 % of the columns, median over experts",
        "",
        "ffn_gate_exps: tokens of experts",
        "layer  expert 0 to 3",
        "    3  !░██",
        "       from ░ 10  ▒ 21  ▓ 45  █ 95 tokens  ! never",
        "",
        "ffn_up_exps: tokens of experts",
        "layer  expert 0 to 3",
        "    3  !░█▓",
        "   10  ▓███",
        "       from ░ 10  ▒ 25  ▓ 63  █ 159 tokens  ! never",
        "",
        "seen never, or by fewer than 100 tokens (--min-tokens):",
        "  output.weight: 50 tokens",
        "  blk.3: ffn_gate_exps.weight, ffn_up_exps.weight: never 0; rarely 1 (10), 3 (99)",
    ]


def test_a_row_for_each_tensor(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, "-q", "--all", "--min-tokens", "10")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[5:11]] == [
        "output.weight", "blk.3.attn_output.weight", "blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight",
        "blk.10.attn_output.weight", "blk.10.ffn_up_exps.weight",
    ]  # fmt: skip
    assert out.splitlines()[-1] == "  blk.3: ffn_gate_exps.weight, ffn_up_exps.weight: never 0"


def test_nothing_is_rare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "x", Facts((), 0, 512), [entry("w", [100], [1.0])])
    run(tmp_path / "x", "-q")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "datasets: none named"
    assert lines[-1] == "every entry, and every expert, saw 100 tokens or more"


def test_very_many_experts_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [entry(f"blk.{i}.ffn_up_exps.weight", [1 + i] * 30, [1.0]) for i in range(25)]
    write_gguf(tmp_path / "x", Facts((), 0, 512), entries)
    run(tmp_path / "x", "-q")
    lines = capsys.readouterr().out.splitlines()
    first = ", ".join(f"{i} (1)" for i in range(12))
    assert lines[-21] == f"  blk.0: ffn_up_exps.weight: rarely {first} and 18 more"
    assert lines[-1] == "  and 5 more (--all)"
    run(tmp_path / "x", "-q", "--all")
    assert capsys.readouterr().out.splitlines()[-1].startswith("  blk.24: ffn_up_exps.weight: rarely 0 (25), ")


def test_json_has_all_of_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, "-q", "--json")
    said = json.loads(capsys.readouterr().out)
    tensors = said.pop("tensors")
    assert said == {
        "file": str(file), "format": "gguf", "datasets": ["a.txt", "b.txt"], "chunks": 4, "chunk_size": 256,
        "in_sum": False, "entries": 6, "min_tokens": 100, "count_unit": "tokens", "never_seen": 2, "rarely_seen": 5,
    }  # fmt: skip
    (got,) = (t for t in tensors if t["name"] == "blk.3.ffn_up_exps.weight")
    assert got == {
        "name": "blk.3.ffn_up_exps.weight", "layer": 3, "kind": "ffn_up_exps.weight", "matrices": 4, "columns": 200,
        "counts": [0, 10, 200, 99], "min": 0, "max": 200, "spread": None, "p10": pytest.approx(3.0), "p50": 54.5,
        "p90": pytest.approx(169.7), "concentration": 0.505, "concentrations": [None, 0.505, 0.505, 0.505],
        "zero_columns": 3 * 99, "never_seen": [0], "rarely_seen": [1, 3],
    }  # fmt: skip
    assert tensors[0]["layer"] is None
    assert tensors[-1]["spread"] == 4.0
    assert imatrix.info(file).to_json() == {**said, "tensors": tensors}


def test_a_dat_knows_no_experts(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dat = legacy_imatrix(tmp_path / "x.dat", {"blk.0.ffn_up_exps.weight": (3, np.ones(8, F32))}, chunks=3)
    run(dat, "-q")
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{dat}: 1 entry, 3 chunks of a size that a .dat does not say"
    assert "chunks: min" in out
    assert "never" not in out.splitlines()[3]
    assert out.splitlines()[-1] == (
        "a .dat has one count for all experts of a tensor: which were hardly seen, it does not say"
    )
    run(dat, "-q", "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["count_unit"], said["chunk_size"], said["rarely_seen"]) == ("chunks", None, None)
    assert said["tensors"][0]["never_seen"] is None
    with pytest.raises(ImatrixError) as e:
        run(dat, "-q", "--figure", tmp_path / "x.svg")
    assert str(e.value) == f"{dat}: a .dat has no counts of experts, so there is nothing to draw; leave out the figure"
    assert not (tmp_path / "x.svg").exists()


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1.0] * 100], [0.01]),
        ([[1.0] * 101], [2 / 101]),
        ([[0.0] * 99 + [5.0], [0.0] * 100], [1.0, None]),
        ([[3.0]], [1.0]),
        ([[*range(200)]], [(199 + 198) / (199 * 100)]),
    ],
)
def test_concentration(rows: list[list[float]], wanted: list[float | None]) -> None:
    assert concentrations(np.array(rows, F32)) == pytest.approx(tuple(wanted))


@pytest.mark.tools
def test_a_file_of_llama_imatrix(real_imatrices: dict[str, Path]) -> None:
    found = imatrix.info(real_imatrices["a"], min_tokens=384)
    assert (found.n_chunks, found.chunk_size, len(found.datasets)) == (6, 64, 1)
    for t in found.tensors:
        if "_exps" in t.name:
            # a token goes to two of four experts
            assert (t.n_mats, sum(t.counts)) == (4, 2 * 384)
            assert set(t.never()) | set(t.rarely(384)) == {i for i, n in enumerate(t.counts) if n < 384}
        else:
            assert t.counts == (384,)
            assert t.rarely(384) == ()


# ---------------------------------------------------------------- the picture


def test_the_picture(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("svg", "png"):
        out = tmp_path / f"coverage.{suffix}"
        run(file, "-q", "--figure", out)
        with pytest.raises(OutputError) as e:
            run(file, "-q", "--figure", out)
        assert str(e.value) == f"{out}: exists; choose another name, or replace it with --force"
        run(file, "-q", "--figure", out, "--force")
    capsys.readouterr()
    drawn = (tmp_path / "coverage.svg").read_text()
    shown = re.findall(r">([^<>]+)</text>", drawn)
    assert {"im.gguf: tokens that each expert saw", "ffn_gate_exps", "ffn_up_exps", "layer", "expert", "10"} <= set(
        shown
    )
    assert (tmp_path / "coverage.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    # an expert that was never seen is red: one of each panel
    assert len(re.findall(r'aria-label="[^"]*"[^>]*fill="#d62728"', drawn)) == 2
    assert len(re.findall(r'aria-roledescription="rect mark"', drawn)) == 4 + 8


@pytest.mark.parametrize("name", ["coverage.pdf", "coverage", "coverage.svg.gz"])
def test_a_picture_of_another_kind(file: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with pytest.raises(OutputError) as e:
        run(file, "-q", "--figure", out)
    assert str(e.value) == f"{out}: a picture is an .svg or a .png; give a name that ends so"
    assert not out.exists()


def test_nothing_to_draw(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x", Facts((), 0, 512), [entry("w", [100], [1.0])])
    with pytest.raises(ImatrixError) as e:
        run(tmp_path / "x", "-q", "--figure", tmp_path / "x.svg")
    assert str(e.value) == (
        f"{tmp_path / 'x'}: none of its entries counts experts, so there is nothing to draw; leave out the figure"
    )


@pytest.mark.parametrize("name", ["altair", "vl_convert"])
def test_without_the_extra(file: Path, tmp_path: Path, quantkit: Run, name: str) -> None:
    env = without(tmp_path / "site", name)
    out = tmp_path / "x.svg"
    done = quantkit("imatrix", "info", file, "--figure", out, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (
        10, "",
        f"error: {name}, which draws pictures, is not installed; run: pip install 'quantkit[pictures]'\n",
    )  # fmt: skip
    assert not out.exists()
    done = quantkit("imatrix", "info", file, "-q", env=env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_value_that_is_none(file: Path, bad: float) -> None:
    at = open_imatrix(str(file)).entries["output.weight"].offset
    raw = bytearray(file.read_bytes())
    raw[at + 8 : at + 12] = np.array([bad], F32).tobytes()
    file.write_bytes(raw)
    with pytest.raises(ImatrixError) as e:
        imatrix.info(file)
    assert str(e.value) == (
        f"{file}: entry 'output.weight' holds {bad} at 2 of 200 in in_sum2; sums must be finite and not negative: "
        "compute the imatrix again"
    )


def test_the_page_s_commands_can_be_parsed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "imatrix.md").read_text("utf-8")
    lines = re.findall(r"^ {4}quantkit (imatrix .+)$", page, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        group, sub, *words = line.split()
        command: Any = cli.commands[group]
        assert command.commands[sub].make_context(sub, words).params, line


def test_a_coarse_map_for_the_terminal() -> None:
    from quantkit.imatrix.coverage import Coverage, Covered
    from quantkit.imatrix.terminal_map import coverage_map

    def covered(layer: int, kind: str, counts: tuple[int, ...]) -> Covered:
        return Covered(f"blk.{layer}.{kind}.weight", layer, f"{kind}.weight", 256, counts, (None,) * len(counts), 0)

    rows = [(1, 10, 100, 1000), (1000, 0, 30, 10)]
    tensors = [covered(i, kind, counts) for kind in ("a_exps", "b_exps") for i, counts in enumerate(rows)]
    tensors.append(covered(0, "attn_q", (5000,)))
    found = Coverage(Path("x.gguf"), False, (), 1, 512, False, 100, tuple(tensors))
    assert coverage_map(found).split("\n") == [
        "a_exps, b_exps: tokens of experts",
        "layer  expert 0 to 3",
        "    0  ░▒▓█",
        "    1  █!▒▒",
        "       from ░ 1  ▒ 6  ▓ 32  █ 178 tokens  ! never",
    ]
    # of many, a character is the least: 160 experts are 3 a character, 50 layers 3 a line
    many = tuple(covered(i, "a_exps", tuple(0 if (i, j) == (4, 7) else 9 for j in range(160))) for i in range(50))
    lines = coverage_map(Coverage(Path("x.gguf"), False, (), 1, 512, False, 100, many)).split("\n")
    assert lines[0] == "a_exps: tokens of experts, a character the least of 3 layers x 3 experts"
    assert lines[3] == "  3-5  ██!" + "█" * 51
    assert len(lines) == 2 + 17 + 1
    assert coverage_map(Coverage(Path("x.dat"), True, (), 1, None, False, 100, tuple(tensors))) == ""
