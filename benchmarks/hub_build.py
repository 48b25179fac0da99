"""A build of a source on the Hub with one shard at a time: the same bytes, what is fetched, what is on the disk.

    python benchmarks/hub_build.py CHECKPOINT [--imatrix FILE] [--pre deepseek-v3] [--keep 1] [--shards N]

CHECKPOINT is a folder (the project's tiny-deepseek; `quantkit demo` makes another). The tests' local server has it, the
real huggingface_hub client fetches it. Four builds: from the folder, from the server, from the server ended by kill -9
again and again, and from the server with so many faults (429, 503, bodies cut short, wrong bytes). Peaks are the bytes
of the shards in OUT.partial/source, looked at with every request and every 5 ms. With `--shards` the checkpoint is cut
into so many first.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "tools")]

from hub_server import Fault, Hub  # noqa: E402
from reshard import reshard  # noqa: E402

from quantkit.base.text import markdown_table  # noqa: E402

REPO = "org/Model"
SEED = 18


class Watch:
    """The most bytes and files of shards that are on the disk at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.most_files = folder, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.look()

    def look(self) -> None:
        try:
            sizes = [entry.stat().st_size for entry in os.scandir(self.folder)]
        except OSError:  # not there yet, or just gone
            return
        self.most, self.most_files = max(self.most, sum(sizes)), max(self.most_files, len(sizes))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


class Bench:
    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.hub = given, folder, Hub()
        self.source = folder / "Model"
        if given.shards:
            reshard(given.checkpoint, self.source, given.shards)
        else:
            shutil.copytree(given.checkpoint, self.source)
        self.hub.add(REPO, self.source)
        self.env = os.environ | self.hub.environment(folder / "home") | {"QUANTKIT_COMMIT_SECONDS": "0.2"}
        self.rows: list[list[str]] = []
        self.shards = [path.stat().st_size for path in sorted(self.source.glob("*.safetensors"))]

    def command(self, source: str, out: Path) -> list[str]:
        given = self.given
        more = ["--imatrix", str(given.imatrix.absolute())] if given.imatrix else []
        more += ["--keep", str(given.keep)] if source.startswith("hf:") else []
        start = [sys.executable, "-m", "quantkit", "build", source, "-o", str(out), "-r", given.recipe]
        return [*start, "--pre", given.pre, *more, "-q"]

    def build(self, what: str, source: str, n_kills: int = 0) -> bytes:
        out = self.folder / "m.gguf"
        self.hub.log.clear()
        watch, rng = Watch(self.folder / "m.gguf.partial" / "source"), random.Random(SEED)
        began, kills = time.monotonic(), 0
        while True:
            process = subprocess.Popen(self.command(source, out), env=self.env, cwd=self.folder)
            if kills < n_kills:  # somewhere in the second after the first shard begins to come
                while process.poll() is None and not list(watch.folder.glob("*")):
                    time.sleep(0.01)
                time.sleep(rng.uniform(0.1, 1))
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    kills += 1
                    continue
            if process.wait():
                raise SystemExit(f"{what}: quantkit ended with {process.returncode}")
            break
        watch.end()
        made = out.read_bytes()
        out.unlink()
        left = sorted(path.name for path in self.folder.glob("m.gguf*"))
        if left:
            raise SystemExit(f"{what}: {left} is left")
        self.rows.append(
            [
                what, f"{time.monotonic() - began:.1f}", f"{self.hub.sent('*.safetensors') / 1e6:.2f}",
                str(watch.most_files), f"{watch.most / 1e6:.2f}", str(kills), hashlib.sha256(made).hexdigest()[:12],
            ]
        )  # fmt: skip
        return made

    def faults(self, n: int) -> list[Fault]:
        """So many things that go wrong, shard by shard; the first request for each is for its header. No two wrong
        bodies in a row: the second would be refused."""
        rng, now, found, of = random.Random(SEED), {"Retry-After": "0"}, [], len(self.shards)
        for i in range(n):
            shard, turn = i % of, i // of
            what: dict[str, Any] = {"status": rng.choice([429, 500, 502, 503, 504]), "headers": now}
            if turn % 3 == 2:  # six refusals in a row, without a byte between, would be too many
                what = {"cut": rng.randrange(1, self.shards[shard] // 50)}
            if n - i <= of:  # the last of each shard: the whole body comes, with a byte that is wrong
                what = {"wrong": rng.randrange(self.shards[shard] // 2)}
            found.append(Fault(f"/{REPO}/model-{shard + 1:05d}-*", host="cdn", after=1 + turn, **what))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--recipe", default="UD-IQ1_S")
    parser.add_argument("--pre", default="deepseek-v3")
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--kills", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        local = bench.build("from the folder", str(bench.source))
        there = f"hf://{REPO}"
        same = [bench.build(f"from the server, --keep {given.keep}", there) == local]
        same.append(bench.build("the same, kill -9 and on", there, given.kills) == local)
        faults = bench.faults(given.faults)
        bench.hub.fail(*faults)
        same.append(bench.build(f"the same, {given.faults} faults", there) == local)
        n_hit = sum(fault.hits for fault in faults)
        bench.hub.close()
    print(f"{len(bench.shards)} shards, {sum(bench.shards) / 1e6:.2f} MB, the largest {max(bench.shards) / 1e6:.2f} MB")
    head = ["build", "seconds", "MB fetched", "most shards on the disk", "most MB of them", "kills", "SHA-256"]
    print(markdown_table(bench.rows, head))
    print(f"{n_hit} faults happened; the same bytes: {', '.join('yes' if one else 'NO' for one in same)}")
    if not all(same):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
