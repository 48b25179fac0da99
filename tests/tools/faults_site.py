"""Where builds are disturbed: a small FP8 checkpoint, its undisturbed builds, and the checks of every case."""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from faults_child import events
from faults_journal import claim_of
from gguf import GGUFReader

from quantkit.model import demo
from quantkit.model.families.options import Options
from quantkit.model.open import open_model

RECIPE = (
    'name: r\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*_exps.weight", type: IQ2_XXS, why: t}\n'
    '  - {match: "*", type: IQ4_XS, why: t}\n'
)
#: a build of about a second on one thread
CONFIG = {**demo.CONFIG, "num_hidden_layers": 4, "n_routed_experts": 8, "vocab_size": 4096}
#: some tenths of a second
SMALL = {**demo.CONFIG, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "hidden_size": 256,
         "intermediate_size": 512, "vocab_size": 384, "num_nextn_predict_layers": 0}  # fmt: skip
ERROR = re.compile(r"error: [^\n]+\n(?:[\d,]+ of [\d,]+ bytes are kept in [^\n]+\n)?")
KEPT = re.compile(r"([\d,]+) of [\d,]+ weights were kept from before")


class FaultError(Exception):
    """Something is not as it should be after a disturbance."""


class SkipError(Exception):
    """The case cannot be tried here; says why."""


class Done(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def kept(self) -> int:
        """Weights that it says were kept from before."""
        found = KEPT.search(self.out)
        return int(found[1].replace(",", "")) if found else 0


class Way(NamedTuple):
    """How a build is asked for: options, and whether several files come of it."""

    name: str
    options: tuple[str, ...] = ()


ONE = Way("one file", ("-t", "1"))
SHARDS = Way("shards", ("-t", "2", "--split-max-size", "400K"))
#: HERE is the output's folder
CACHED = Way("shards with a cache", (*SHARDS.options, "--cache", "HERE/cache"))


@dataclass
class Row:
    """What a case found, for the table."""

    case: str
    what: str
    times: int
    came_of_it: str
    failures: list[str] = field(default_factory=list)
    kept: int = 0
    """weights that reruns did not quantize again: all that the journals had"""


class Forked:
    """A build in a process forked by a Server: what is needed of subprocess.Popen."""

    def __init__(self, answers: IO[bytes]) -> None:
        self.answers = answers
        self.pid = int(answers.readline())
        self.returncode: int | None = None
        try:
            self.fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self.fd = -1

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("quantkit", timeout or 0)
            self.returncode = int(self.answers.readline())
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.fd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.fd, number)

    def communicate(self) -> None:
        self.wait()


class Server:
    """A process of faults_child.py."""

    def __init__(self, cwd: Path) -> None:
        script = Path(__file__).with_name("faults_child.py")
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", str(script)], cwd=cwd, bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self.folder = Path(tempfile.mkdtemp(dir=cwd, prefix="server-"))

    def run(self, args: list[str], env: Mapping[str, str], **watch: Any) -> Done:
        """Run `quantkit ARGS` in a fork; `watch` as in the request."""
        code = self.start(args, env, **watch).wait()
        said = [(self.folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")]
        return Done(code, *said)

    def start(self, args: list[str], env: Mapping[str, str], **watch: Any) -> Forked:
        """The same, at work when this returns; one at a time."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        request = {"args": args, "env": dict(env), "stdout": str(out), "stderr": str(err), **watch}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return Forked(self.process.stdout)

    def close(self) -> None:
        self.process.communicate()


class Site:
    """A checkpoint with its importance matrix and recipe, and a place for outputs."""

    def __init__(self, folder: Path, config: Mapping[str, Any], seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.source = folder / "checkpoint"
        self.source.mkdir(parents=True)
        demo.make_checkpoint(self.source, config, seed)
        model = open_model(str(self.source), Options(pre=demo.PRE))
        self.imatrix, self.recipe = folder / "imatrix.gguf", folder / "r.yaml"
        self.other_imatrix = folder / "other.gguf"
        shapes = {t.name: t.shape for t in model.tensors if t.quantizable and t.layer is not None}
        demo.make_imatrix(self.imatrix, shapes)
        demo.make_imatrix(self.other_imatrix, shapes, seed + 1)
        self.recipe.write_text(RECIPE)
        self.cols = {t.name: t.n_cols for t in model.tensors}
        self.n_weights = sum(t.n_elements for t in model.tensors)
        self.shards = sorted(self.source.glob("*.safetensors"))
        self.env = {"QUANTKIT_COMMIT_SECONDS": "0.02"}
        self._n = 0
        self._expected: dict[tuple[str, ...], dict[str, bytes]] = {}
        self._offsets: dict[tuple[str, ...], dict[str, tuple[str, int]]] = {}
        self._server: Server | None = None

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = Server(self.folder)
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def place(self) -> Path:
        """An output's name in an empty folder of its own."""
        self._n += 1
        folder = self.folder / f"o{self._n}"
        folder.mkdir()
        return folder / "m.gguf"

    def args(self, out: Path, way: Way, *more: str) -> list[str]:
        args: list[Any] = ["build", self.source, "-o", out, "-r", self.recipe, "--imatrix", self.imatrix]
        args += ["--pre", demo.PRE, *way.options, *more]
        return [str(a).replace("HERE", str(out.parent)) for a in args]

    def start(
        self, out: Path, way: Way, *more: str, env: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """A build in a process of its own, as a user runs it."""
        return subprocess.Popen(
            [sys.executable, "-m", "quantkit", *self.args(out, way, *more)], cwd=self.folder, text=True,
            env={**os.environ, **self.env, **(env or {})}, preexec_fn=before,  # noqa: PLW1509
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, out: Path, way: Way, *more: str, **how: Any) -> Done:
        process = self.start(out, way, *more, **how)
        said, err = process.communicate(timeout=600)
        return Done(process.returncode, said, err)

    def fork(self, out: Path, way: Way, *more: str, **watch: Any) -> Done:
        """The same in a process forked from one that has imported everything."""
        return self.server.run(self.args(out, way, *more), self.env, **watch)

    def put_half_a_cache(self, out: Path) -> None:
        """A cache beside an output that has every second tensor."""
        made = self.folder / "half a cache"
        if not made.exists():
            self.check_finished(first := self.place(), CACHED, self.fork(first, CACHED, "-q"))
            for path in sorted((first.parent / "cache" / "objects").glob("??/*"))[::2]:
                path.unlink()
            (first.parent / "cache").rename(made)
        shutil.copytree(made, out.parent / "cache")

    def expected(self, way: Way) -> dict[str, bytes]:
        """The files of an undisturbed build."""
        key = self._key(way)
        if key not in self._expected:
            out = self.place()
            done = self.run(out, Way(way.name, key), "-q")
            require(done.code == 0, f"the undisturbed build failed: {done.err}")
            self._expected[key] = files_of(out)
            self._offsets[key] = {
                t.name: (path.name, int(t.data_offset))
                for path in out.parent.glob("*.gguf") for t in GGUFReader(path).tensors
            }  # fmt: skip
            shutil.rmtree(out.parent)
        return self._expected[key]

    def _key(self, way: Way) -> tuple[str, ...]:
        """The options on which bytes depend."""
        return tuple(o for o in way.options if "cache" not in o)

    # ------------------------------------------------------------ checks

    def claimed(self, out: Path) -> int:
        """Weights whose rows the journal has."""
        claim = claim_of(out)
        return 0 if claim is None else sum(len(rows) * self.cols[name] for name, rows in claim.rows().items())

    def check_names(self, out: Path, way: Way, older: Mapping[str, bytes] | None = None) -> None:
        """No name of the output has anything but the whole file (or the `older` one that it had)."""
        for name, raw in files_of(out).items():
            right = self.expected(way).get(name)
            require(raw == right or (older is not None and raw == older.get(name)),
                    f"{name} has its name and is not as it should be")  # fmt: skip

    def check_finished(self, out: Path, way: Way, done: Done) -> None:
        """A build that says that it is done has made just what an undisturbed one makes."""
        require(done.code == 0, f"rerun: exit {done.code}: {done.err[-500:]}")
        require("Traceback" not in done.err, f"rerun: {done.err[-500:]}")
        require(files_of(out) == self.expected(way), "rerun: other bytes than the undisturbed build's")
        there = {p.name for p in out.parent.iterdir()} - {"cache"}
        require(there == set(self.expected(way)), f"rerun: left {sorted(there)}")

    def check_rerun(
        self, out: Path, way: Way, *more: str, forked: bool = True, watched: bool = False
    ) -> tuple[int, int]:  # fmt: skip
        """Run the build again: the right bytes, and every row that the journal had was kept; `watched`: not one byte
        of them was written. Returns the weights claimed and kept. Where the build was whole and only its folder was
        still to go, it may be refused."""
        claimed, whole = self.claimed(out), files_of(out) == self.expected(way)
        journal_there = claim_of(out) is not None
        had, log = self._places_of_claimed(out, way) if watched else {}, self.folder / "log"
        watch = {"root": str(out.parent), "log": str(log)} if watched else {}
        done = self.fork(out, way, *more, **watch) if forked else self.run(out, way, *more)
        if whole and not journal_there and done.code == 7 and "exists; choose another name" in done.err:
            require(files_of(out) == self.expected(way), "the finished output was changed")
            return 0, 0
        self.check_finished(out, way, done)
        require(done.kept == claimed, f"rerun: kept {done.kept:,} weights, the journal had {claimed:,}")
        for e in events(log) if watched else ():
            for begin, end in had.get(Path(e.path).name, ()) if e.what == "write" else ():
                require(e.offset >= end or e.offset + len(e.data) <= begin,
                        f"rerun: wrote {e.path} at {e.offset:,}, rows that the journal had")  # fmt: skip
        return claimed, done.kept

    def _places_of_claimed(self, out: Path, way: Way) -> dict[str, list[tuple[int, int]]]:
        """The bytes of files whose rows the journal has: begins and ends."""
        claim, places = claim_of(out), self._offsets[self._key(way)]
        had: dict[str, list[tuple[int, int]]] = {}
        if claim is None:
            return had
        for tensor, row, n_rows in claim.records:
            name, row_bytes = claim.tensors[tensor]
            file, begin = places[name]
            had.setdefault(file, []).append((begin + row * row_bytes, begin + (row + n_rows) * row_bytes))
        return had


def files_of(out: Path) -> dict[str, bytes]:
    """The files beside an output's folder of unfinished work, by name."""
    return {p.name: p.read_bytes() for p in out.parent.glob("*.gguf") if p.is_file()}


def require(holds: bool, what: str) -> None:
    if not holds:
        raise FaultError(what)


def check_said(done: Done, *codes: int, says: str = "") -> None:
    """The process ended with one of the codes and one clear sentence (and where the unfinished build is kept)."""
    require(done.code in codes, f"exit {done.code}, not {' or '.join(map(str, codes))}: {done.err[-500:]}")
    lines = [line for line in re.split(r"[\r\n]+", done.err) if line and "w/s]" not in line]  # without the progress bar
    require(ERROR.fullmatch("\n".join([*lines, ""])) is not None, f"said: {done.err[-700:]}")
    require(says in done.err, f"'{says}' is not in: {done.err[-500:]}")
