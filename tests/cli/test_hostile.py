"""Hostile inputs: what the fuzzers once found, replayed; and files made to cost much, through the command line: the
exit code, one plain sentence, in bounded time and memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz_inputs
import fuzz_readers
import pytest
from factory import edit_json, write_safetensors
from fuzz_readers import Reader

from quantkit.base.errors import QuantkitError, RecipeError, SourceError, listed
from quantkit.gguf.header import ARRAY, STRING, U8, read_header
from quantkit.recipe.load import parse

CORPUS = sorted((Path(__file__).parent.parent / "data" / "fuzz").iterdir())
NAMES = (
    "gguf", "imatrix_gguf", "imatrix_dat", "shard", "config", "recipe", "lock", "index", "checkpoint", "tokenizer",
    "tokenizer_config",
)  # fmt: skip
#: two where nothing else runs
MAX_CPU_SECONDS = 3.0
#: of addresses, most of which Python and its libraries take
MAX_MEMORY = 400 << 20


# ---------------------------------------------------------------- the fuzzers


@pytest.fixture(scope="module")
def readers() -> Iterator[dict[str, Reader]]:
    with tempfile.TemporaryDirectory(dir=fuzz_readers.in_memory()) as folder:
        yield fuzz_readers.readers(Path(folder))


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_what_was_once_a_finding(readers: dict[str, Reader], file: Path) -> None:
    """The name says the reader, the seed and the case it was."""
    with fuzz_inputs.strictly():
        outcome = fuzz_inputs.attempt(readers[file.name.split("-")[0]], file.read_bytes())
    assert outcome.what in ("accepted", "refused"), outcome


@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs(readers: dict[str, Reader], name: str) -> None:
    """A short run of the fuzzer: some are accepted, some refused, and nothing else happens."""
    came = set()
    with fuzz_inputs.strictly():
        for number in range(60):
            outcome = fuzz_inputs.attempt(readers[name], fuzz_inputs.case(name, readers[name], 1, number))
            assert outcome.what in ("accepted", "refused"), f"{name} seed 1 case {number}: {outcome}"
            came.add(outcome.what)
    assert came == {"accepted", "refused"}


def test_every_reader_is_in_the_short_run(readers: dict[str, Reader]) -> None:
    assert set(readers) == set(NAMES)
    assert sum(reader.share for reader in readers.values()) == 1000


def attempt(read: Callable[[bytes], object]) -> fuzz_inputs.Outcome:
    with fuzz_inputs.strictly():
        return fuzz_inputs.attempt(Reader("", lambda _: b"", read, 1), b"")


def test_the_fuzzer_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(e: BaseException) -> Callable[[bytes], object]:
        def read(_: bytes) -> None:
            raise e

        return read

    def spins(_: bytes) -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    monkeypatch.setattr(fuzz_inputs, "MAX_SECONDS", 0.05)
    assert attempt(lambda _: None).what == "accepted"
    assert attempt(fails(SourceError("x: is wrong"))).what == "refused"
    assert attempt(fails(SourceError("x:\nis wrong"))).what == "2 lines"
    assert attempt(fails(RecipeError("x:1 is wrong\nx:2 too"))).what == "refused"
    assert attempt(fails(SourceError())).what == "empty or not printable"
    assert attempt(fails(MemoryError())).what == "MemoryError"
    assert attempt(fails(KeyError("x"))).what == "KeyError"
    assert attempt(spins).what == "too slow"


def test_a_process_that_is_ended_is_found(tmp_path: Path) -> None:
    """And so is a case that takes too much memory; those after it are still run."""
    code = f"""\
import os, sys
from pathlib import Path
import fuzz_inputs
from fuzz_readers import Reader
def read(raw):
    if raw == b"3": os.abort()
    if raw == b"5": bytearray(2 * fuzz_inputs.MAX_MEMORY)
fuzz_inputs.case = lambda name, reader, seed, number: str(number).encode()
where = Path({str(tmp_path)!r})
tally = fuzz_inputs.Tally("x", where / "found")
fuzz_inputs.run(tally, Reader(".bin", None, read, 1), 1, range(8), where)
print(dict(tally.came), sorted(tally.alike))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == ["x-1-3.bin", "x-1-5.bin"]
    said = done.stdout.splitlines()[-1]
    assert said.startswith("{'lost with an ended process': 3, 'findings': 2, 'accepted': 3} [('MemoryError', ")
    assert said.endswith("('process', 'ended by SIGABRT')]")


# ---------------------------------------------------------------- messages


def test_a_message_is_safe_to_show() -> None:
    assert str(SourceError("x: '\x1b[31m\u202e\ud800\ufeff\t' is é \U0001f600")) == (
        "x: '\\x1b[31m\\u202e\\ud800\\ufeff\\t' is é \U0001f600"
    )
    assert str(RecipeError("a\nb")) == "a\nb"


def test_a_message_without_end_is_shortened_in_the_middle() -> None:
    as_it_is = f"x: {'y' * 1700}: download it again"
    assert str(SourceError(as_it_is)) == as_it_is
    endless = SourceError(f"x: {'y' * 70_000}: download it again")
    assert str(endless) == f"x: {'y' * 1197}…{'y' * 581}: download it again"


def test_many_mistakes_are_counted() -> None:
    assert listed([f"{i}" for i in range(20)]) == "\n".join(map(str, range(20)))
    assert listed([f"{i}" for i in range(1021)]) == "\n".join(map(str, range(20))) + "\nand 1,001 mistakes more"
    with pytest.raises(RecipeError) as e:
        parse("".join(f"k{i}: 1\n" for i in range(9_000)), "r.yaml")
    assert str(e.value).endswith("\nand 8,984 mistakes more")


# ---------------------------------------------------------------- through the command line


def refused(code: int, says: str, *args: str | Path) -> None:
    """The command ends with this exit code and sentence, soon, and without much memory."""
    limited = ["sh", "-c", f'ulimit -v {MAX_MEMORY >> 10}; exec "$@"', "sh"]
    command = [*limited, sys.executable, "-m", "quantkit", *map(str, args)]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, env=env, cwd=tempfile.gettempdir(), stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        assert (process.returncode, out.read(), err.read().decode()) == (code, b"", f"error: {says}\n")
    # of the processor, since the machine may have other things to do
    assert used.ru_utime + used.ru_stime < MAX_CPU_SECONDS


@pytest.mark.parametrize("to", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "..\\x.safetensors"])
def test_a_path_that_leaves_the_checkpoint(v3: Path, to: str) -> None:
    index = v3 / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({"lm_head.weight": to}))
    says = f"{index}: weight_map names '{to}', which is outside the checkpoint directory"
    refused(4, says, "plan", v3, "-r", "Q4_K_M", "--pre", "deepseek-v3")


def test_a_path_that_is_none(v3: Path) -> None:
    index = v3 / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({"lm_head.weight": "x\0y\x1b[2J"}))
    says = f"{index}: weight_map names 'x\\x00y\\x1b[2J', which is not a file name"
    refused(4, says, "plan", v3, "-r", "Q4_K_M", "--pre", "deepseek-v3")


LAUGHS = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
)
RULE = '  - {match: "*", type: Q4_K, why: t}\n'
BOMBS = {
    "the billion laughs": (
        LAUGHS,
        "bomb.yaml:2 not valid YAML: '*a0' is an alias, which recipes do without; a pattern that begins with * needs "
        "quotes",
    ),
    "nested": ("[" * 500_000, "bomb.yaml: nested too deeply for a recipe"),
    "a million values": (
        "[" + "[]," * 349_000 + "]",
        "bomb.yaml:1 not valid YAML: more than 20,000 keys and values are too many for a recipe",
    ),
    "rules without end": (
        "rules:\n" + RULE * 27_000,
        "bomb.yaml:2858 not valid YAML: more than 20,000 keys and values are too many for a recipe",
    ),
    "braces": (
        'name: x\narch: [llama]\nfile_type: Q4_K_M\nrules:\n  - {match: "' + "{a,b}" * 190 + '", type: Q4_K, why: t}\n',
        f"bomb.yaml:5 rules[0].match: '{'{a,b}' * 12}' has more than 256 alternatives",
    ),
    "large": ("#" * (1 << 20) + "\n", "{path}: has more bytes than a recipe may have (1,048,576)"),
}


@pytest.mark.parametrize(("text", "says"), BOMBS.values(), ids=BOMBS.keys())
def test_a_yaml_bomb(tmp_path: Path, text: str, says: str) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(text)
    refused(3, says.replace("{path}", str(bomb)), "plan", "deepseek-r1", "-r", bomb)


def test_a_yaml_bomb_for_a_sizes_lock(tmp_path: Path) -> None:
    bomb = tmp_path / "sizes.yaml"
    bomb.write_text(LAUGHS)
    again = "restore it, or write it again with `quantkit sizes update -r RECIPE -m MODEL`"
    says = f"{bomb}:1: has a YAML alias, which a sizes lock does without; {again}"
    refused(4, says, "sizes", "check", bomb)


def head(n_tensors: int, n_kv: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv)


def array(element: int, count: int) -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", ARRAY, element, count)


#: header, length of the (sparse) file, what is wrong with it
CLAIMS = {
    "2^60 tensors": (
        head(1 << 60, 0), 24,
        "it claims 1,152,921,504,606,846,976 tensors, more than its 24 bytes can hold",
    ),
    "2^60 tensors in a large file": (
        head(1 << 60, 0), 1 << 40,
        "it claims 1,152,921,504,606,846,976 tensors, more than its 1,099,511,627,776 bytes can hold",
    ),
    "2^30 tensors in a large file": (head(1 << 30, 0), 1 << 40, "it claims 1,073,741,824 tensors (at most 262,144)"),
    "2^30 keys in a large file": (head(0, 1 << 30), 1 << 40, "it claims 1,073,741,824 keys (at most 65,536)"),
    "2^60 bytes": (
        head(0, 1) + array(U8, 1 << 60), 1 << 40,
        "the value of 'a' needs 1,152,921,504,606,846,976 bytes at 49, but the file ends at 1,099,511,627,776; it is "
        "truncated or its header is corrupt: get it again",
    ),
    "strings": (
        head(0, 1) + array(STRING, 1 << 23), 1 << 40,
        "the value of 'a' brings the elements of arrays to 8,388,608 (at most 2,097,152)",
    ),
    "arrays": (
        head(0, 1) + array(ARRAY, 1 << 22), 1 << 40,
        "the value of 'a' brings the elements of arrays to 4,194,304 (at most 2,097,152)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "size", "says"), CLAIMS.values(), ids=CLAIMS.keys())
def test_a_gguf_that_claims_much(tmp_path: Path, raw: bytes, size: int, says: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    os.truncate(path, size)
    refused(4, f"{path}: not a usable GGUF file: {says}", "inspect", path)
    with pytest.raises(QuantkitError):
        read_header(path)


def one_tensor(shape: tuple[int, ...], type_: int = 0, offset: int = 0) -> bytes:
    name = struct.pack("<Q", 1) + b"t"
    return head(1, 0) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_, offset) + bytes(64)


OVERFLOWS = {
    "product": (one_tensor((1 << 32, 1 << 32)), "tensor 't' has the impossible shape [4294967296, 4294967296]"),
    "wraps to nothing": (
        one_tensor((1 << 62, 4)), "tensor 't' has the impossible shape [4611686018427387904, 4]",
    ),
    "negative": (one_tensor((32, (1 << 64) - 1)), "tensor 't' has the impossible shape [32, 18446744073709551615]"),
    "bytes": (
        one_tensor((1 << 61,)),
        "the data of 't' should end at 9,223,372,036,854,775,872, but the file ends at 121; the file is truncated: get "
        "it again",
    ),
    "offset": (
        one_tensor((32,), 0, (1 << 64) - 32),
        "the data of 't' should end at 18,446,744,073,709,551,776, but the file ends at 121; the file is truncated: "
        "get it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "says"), OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_a_gguf_whose_sizes_overflow(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    refused(4, f"{path}: not a usable GGUF file: {says}", "inspect", path)


@pytest.mark.parametrize(
    ("shape", "nbytes", "want"),
    [
        ([1 << 61, 4], 0, "18,446,744,073,709,551,616"),
        ([1 << 32, 1 << 31, 2], 0, "36,893,488,147,419,103,232"),
        ([(1 << 62) - 1], 64, "9,223,372,036,854,775,806"),
    ],
    ids=["2^64", "2^65", "2^63"],
)
def test_a_checkpoint_whose_sizes_overflow(tmp_path: Path, shape: list[int], nbytes: int, want: str) -> None:
    """Of BF16; the wrapped product is that of the offsets."""
    shard = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(fuzz_readers.CONFIG))
    write_safetensors(shard, {"t": {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}, bytes(nbytes))
    says = f"{shard}: 't' is BF16 {shape}, {want} bytes, but its offsets span {nbytes:,}; download it again"
    refused(4, says, "plan", tmp_path, "-r", "Q4_K_M")


def test_an_importance_matrix_whose_size_overflows(tmp_path: Path) -> None:
    """4 * n is 0 in 32 bits."""
    path = tmp_path / "x.dat"
    path.write_bytes(struct.pack("<ii", 1, 1) + b"t" + struct.pack("<ii", 1, 1 << 30) + bytes(64))
    says = (
        f"{path}: neither a GGUF nor a whole legacy importance matrix: the values of 't' needs 4,294,967,296 bytes at "
        "17 of 81; get it again"
    )
    refused(6, says, "plan", "deepseek-r1", "-r", "UD-IQ1_S", "--imatrix", path)
