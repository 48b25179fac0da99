"""Second moments computed during a build: the same bytes as by two commands, however often it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import making
import pytest
from checking import info_of
from conftest import Run
from small_builds import OPTIONS, plan_of

import quantkit as qk
from quantkit.building import run as builds
from quantkit.building.engines.native import NativeEngine
from quantkit.forward.stream import Options
from quantkit.gguf.header import decode, read_header
from quantkit.imatrix.matrix import open_imatrix
from quantkit.lab.calibration.streamed import Streamed
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan
from quantkit.planning.rounding import with_covariance
from quantkit.recipe.load import parse
from quantkit.rounding.covariance import Covariances

RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rounding: feedback
rules:
  - {match: "*ffn_down_exps.weight", type: Q2_K, why: t}
  - {match: "*shexp.weight", type: Q4_K, rounding: ggml, why: t}
  - {match: "blk.*.{attn_k_b,attn_output}.weight", type: Q8_0, why: t}
  - {match: "*", type: Q4_K, why: t}
"""
N_CHUNKS = 24
THREADS = Options(n_threads=1)


class World:
    """An importance matrix, a covariance and a text of one model, and builds with them."""

    def __init__(self, folder: Path, v3: Path) -> None:
        self.folder, self.v3 = folder, v3
        self.text = making.some_text(folder / "text.txt")
        self.imatrix, self.covariance, self.recipe = folder / "im.gguf", folder / "cov", folder / "r.yaml"
        self.recipe.write_text(RECIPE)
        making.make(v3, self.text, self.imatrix, N_CHUNKS, covariance=self.covariance)
        self.two_steps = folder / "two.gguf"
        build(with_covariance(self.plan(), Covariances(self.covariance)), self.two_steps, self.imatrix)

    def plan(self) -> Plan:
        return plan_of(self.v3, parse(RECIPE, "r.yaml"), self.imatrix)

    def streamed(self) -> Plan:
        made = self.plan()
        chunks = making.chunks_of(self.v3, self.text, N_CHUNKS)
        return with_covariance(made, Streamed(made.catalogue, chunks.tokens, [self.text], THREADS))

    def command(self, out: Path, *more: object) -> list[str]:
        words: list[object] = ["build", self.v3, "-r", self.recipe, "--pre", "deepseek-v3", "--imatrix", self.imatrix]
        words += ["--text", self.text, "-c", making.CTX, "--chunks", N_CHUNKS, "-o", out, "-t", 1, "-q", *more]
        return [sys.executable, "-m", "quantkit", *map(str, words)]


def build(plan: Plan, out: Path, imatrix: Path, n_threads: int = 1) -> None:
    ready = builds.prepare(plan, out, open_imatrix(str(imatrix)), engine=NativeEngine())
    builds.run(ready, NativeEngine(), n_threads, lambda _name, _n: None)


def data(file: Path) -> dict[str, bytes]:
    raw = file.read_bytes()
    return {t.name: raw[t.offset : t.offset + t.nbytes] for t in read_header(file).tensors}


@pytest.fixture(scope="module")
def world(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("streamed"), tiny_v3)


@pytest.fixture(scope="module")
def one_pass(world: World) -> Path:
    out = world.folder / "one.gguf"
    build(world.streamed(), out, world.imatrix, n_threads=2)
    return out


def test_the_bytes_of_the_two_commands(world: World, one_pass: Path) -> None:
    """With experts that saw too few tokens, which only the pass knows."""
    ours, theirs = data(one_pass), data(world.two_steps)
    assert ours == theirs
    lines = [str(line) for line in _listed(world.two_steps)]
    assert any(" but " in line for line in lines), lines
    assert not any(" but " in str(line) for line in _listed(one_pass))
    assert not (one_pass.parent / "one.gguf.partial").exists()


def _listed(file: Path) -> list[object]:
    from gguf import GGUFReader

    return list(GGUFReader(file).fields["quantkit.rounding.tensors"].contents())


def test_from_python(world: World, one_pass: Path, tmp_path: Path) -> None:
    model = qk.open_model(world.v3, pre="deepseek-v3")
    moments = qk.second_moments(model, world.text, making.CTX, N_CHUNKS, options=THREADS)
    made = qk.plan(model, world.recipe, str(world.imatrix), covariance=moments)
    built = qk.build(made, tmp_path / "m.gguf", threads=1)
    assert data(built.files[0]) == data(one_pass)
    again = qk.plan(model, world.recipe, str(world.imatrix), covariance=world.covariance)
    assert qk.verify(tmp_path / "m.gguf", plan=again, sample="5%").ok


def test_what_the_file_says_of_itself(world: World, one_pass: Path) -> None:
    said = {item.key: decode(item) for item in read_header(one_pass).kvs if "rounding" in item.key}
    assert "quantkit.rounding.covariance" not in said
    assert said["quantkit.rounding.pass"] == Covariances(world.covariance).pass_digest
    assert said["quantkit.rounding.tokens"] == N_CHUNKS * making.CTX


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_killed_while_a_layer_is_there_and_gone_on_with(
    n_layers: int, world: World, one_pass: Path, tmp_path: Path
) -> None:
    """By SIGKILL, after this number of layers, while the next layer's second moments are on the disk."""
    # slower kernels, same bytes
    env = os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.01", "QUANTKIT_KERNELS": "ggml"}
    for attempt in range(10):  # this process may be late: then the layer is gone, or the build is done
        out = tmp_path / f"{attempt}.gguf"
        layer = tmp_path / f"{attempt}.gguf.partial" / "pass" / "layers" / f"layer-{n_layers:05d}.json"
        process = subprocess.Popen(world.command(out), env=env, cwd=tempfile.gettempdir())
        while process.poll() is None and not layer.exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and layer.exists():
            break
    assert layer.exists()
    subprocess.run(world.command(out, "--resume"), cwd=tempfile.gettempdir(), check=True)
    assert out.read_bytes() == one_pass.read_bytes()


def test_one_layer_is_on_the_disk_at_a_time(world: World, tmp_path: Path) -> None:
    plan = world.streamed()
    assert plan.rounding is not None
    source = plan.rounding.covariance
    assert isinstance(source, Streamed)
    names = [name for name in plan.rounding.choices if plan.rounding.of(name) is not None]
    seen = []
    for number in source.layers(tmp_path, names, lambda _what: None):
        there = {p.name.split("-")[1].removesuffix(".json") for p in (tmp_path / "layers").iterdir()}
        assert there == {f"{number:05d}"}
        seen.append(number)
    assert seen == [0, 1, 2]
    assert list((tmp_path / "layers").iterdir()) == []
    # a finished layer is computed again when its rows are asked for
    assert list(source.layers(tmp_path, [n for n in names if n.startswith("blk.1.")], lambda _what: None)) == [1]


def test_another_text_or_other_threads_are_another_build(world: World, tmp_path: Path, quantkit: Run) -> None:
    out = tmp_path / "m.gguf"
    process = subprocess.Popen(
        world.command(out), env=os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.01", "QUANTKIT_KERNELS": "ggml"},
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "m.gguf.partial" / "pass" / "layers").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    words = world.command(out)[3:]
    words[words.index("-t") + 1] = "2"
    done = quantkit(*words)
    assert done.returncode == 13, done.stderr
    assert "covariance was the pass over 768 tokens on 1 thread (sha256 " in done.stderr
    assert "is the pass over 768 tokens on 2 threads (sha256 " in done.stderr


LOW = """\
name: low
arch: [deepseek2]
file_type: IQ1_S
rounding: feedback
rules:
  - {match: "*_exps.weight", type: IQ1_S, why: t}
  - {match: "*shexp.weight", type: IQ2_XXS, rounding: ggml, why: t}
  - {match: "*", type: Q4_K, why: t}
"""


@pytest.fixture(scope="module")
def low(world: World) -> Path:
    """By the two commands: types that need importance, and tensors that ggml rounds."""
    plan = with_covariance(plan_of(world.v3, parse(LOW, "low.yaml"), world.imatrix), Covariances(world.covariance))
    build(plan, world.folder / "low.gguf", world.imatrix)
    return world.folder / "low.gguf"


def low_command(world: World, folder: Path, out: Path, *more: object) -> list[str]:
    (folder / "low.yaml").write_text(LOW)
    words = world.command(out, *more)
    at = words.index("--imatrix")
    words[words.index("-r") + 1] = str(folder / "low.yaml")
    return words[:at] + words[at + 2 :]


def test_importance_of_the_same_pass(world: World, low: Path, tmp_path: Path, quantkit: Run) -> None:
    """Without --imatrix: the bytes of the two commands, from a cache too."""
    for name in ("one.gguf", "cached.gguf"):
        done = quantkit(*low_command(world, tmp_path, tmp_path / name, "--cache", tmp_path / "cache")[3:])
        assert done.returncode == 0, done.stderr
        assert data(tmp_path / name) == data(low)
    model = qk.open_model(world.v3, pre="deepseek-v3")
    moments = qk.second_moments(model, world.text, making.CTX, N_CHUNKS, options=THREADS)
    qk.build(qk.plan(model, tmp_path / "low.yaml", covariance=moments), tmp_path / "m.gguf", threads=2)
    assert data(tmp_path / "m.gguf") == data(low)
    given = ("-s", world.v3, "--pre", "deepseek-v3", "--imatrix", world.imatrix, "--covariance", world.covariance, "-q")
    done = quantkit("verify", tmp_path / "m.gguf", *given, "--sample", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    done = quantkit(*low_command(world, tmp_path, tmp_path / "a.gguf", "--attest", tmp_path / "a.json")[3:])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "Error: --attest needs --imatrix FILE here: the statement names the importance matrix"
    )  # fmt: skip


def test_killed_while_importance_is_there(world: World, low: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    layers = tmp_path / "m.gguf.partial" / "pass" / "layers"
    env = os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.01", "QUANTKIT_KERNELS": "ggml"}
    process = subprocess.Popen(low_command(world, tmp_path, out), env=env, cwd=tempfile.gettempdir())
    while process.poll() is None and not (layers / "layer-00001.json").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(low_command(world, tmp_path, out, "--resume"), cwd=tempfile.gettempdir(), check=True)
    assert data(out) == data(low)


def test_an_expert_that_the_text_never_reaches(world: World, tmp_path: Path, quantkit: Run) -> None:
    words = low_command(world, tmp_path, tmp_path / "m.gguf")[3:]
    words[words.index("--chunks") + 1] = "1"
    words[words.index("-c") + 1] = "2"
    done = quantkit(*words)
    assert done.returncode == 6, done.stderr
    assert "or make the matrix from more text; and give it with --imatrix FILE" in done.stderr


def test_verified_with_a_covariance_of_the_same_text(world: World, one_pass: Path, quantkit: Run) -> None:
    given = ("-s", world.v3, "--pre", "deepseek-v3", "--imatrix", world.imatrix, "-q", "-r", world.recipe)
    done = quantkit("verify", one_pass, *given, "--covariance", world.covariance, "--sample", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 14,647 rows" in done.stdout
    assert "were not compared, since" not in done.stdout
    without = quantkit("verify", one_pass, *given, "--sample", "all")
    assert without.returncode == 0
    assert "not ggml's bytes, made by quantkit's feedback rounding" in without.stdout
    assert "second moments of a pass in the build" in without.stdout
    other = world.folder / "other"
    if not other.exists():
        making.make(world.v3, world.text, world.folder / "o.gguf", 3, covariance=other)
    done = quantkit("verify", one_pass, *given, "--covariance", other)
    assert done.returncode != 0
    assert "is not the covariance that the file was rounded by, but another" in done.stderr


def test_attested(world: World, tmp_path: Path, quantkit: Run) -> None:
    """The text's digest is attested; the statement, with the covariance of the same text, verifies the file."""
    out, statement = tmp_path / "m.gguf", tmp_path / "build.json"
    done = quantkit(*world.command(out, "--attest", statement)[3:])
    assert done.returncode == 0, done.stderr
    assert '"role": "text"' in statement.read_text()
    given = ("-s", world.v3, "--imatrix", world.imatrix, "-q", "--attestation", statement)
    for more in ((), ("--covariance", world.covariance)):
        done = quantkit("verify", out, *given, *more)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_byte_is_found(world: World, one_pass: Path, tmp_path: Path, quantkit: Run) -> None:
    copy = tmp_path / "m.gguf"
    raw = bytearray(one_pass.read_bytes())
    raw[info_of(one_pass, "blk.1.ffn_up_exps.weight").offset + 144 * 7 + 20] ^= 1
    copy.write_bytes(raw)
    done = quantkit("verify", copy, "-s", world.v3, "--pre", "deepseek-v3", "--imatrix", world.imatrix, "-q",
                    "--covariance", world.covariance, "--sample", "all")  # fmt: skip
    assert done.returncode == 12
    assert "blk.1.ffn_up_exps.weight" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--chunks", "3"], "--chunks needs --text"),
        (["--device", "cpu"], "--device needs --text"),
        (["--text", "$text", "--covariance", "$covariance"], "--covariance and --text both give second moments"),
        (["--text", "$text", "--rounding", "ggml"], "--text needs a rounding to use it"),
    ],
)
def test_options_that_have_no_use(words: list[str], says: str, world: World, tmp_path: Path, quantkit: Run) -> None:
    of = {"$text": str(world.text), "$covariance": str(world.covariance)}
    given = ("build", world.v3, "-r", world.recipe, "--pre", "deepseek-v3", "-o", tmp_path / "m.gguf")
    done = quantkit(*given, *[of.get(word, word) for word in words])
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_known_before(world: World) -> None:
    made = open_model(str(world.v3), OPTIONS)
    source = Streamed(made, making.chunks_of(world.v3, world.text, N_CHUNKS).tokens, [world.text], THREADS)
    assert source.counts("blk.1.ffn_down_exps.weight") == (768.0,) * 4
    assert source.counts("blk.1.attn_q_a.weight") == (768.0,)
    largest = max(
        sum(f.stat().st_size - 128 for f in world.covariance.glob(f"layer-{layer:05d}-*.npy")) for layer in range(3)
    )
    assert source.scratch_bytes == largest + 3 * 4 * 768 * 256
