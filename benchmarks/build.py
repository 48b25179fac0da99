"""A whole build from FP8 against the stock way: convert_hf_to_gguf.py to BF16, then llama-quantize. A B A B, medians.

    python benchmarks/build.py [--experts 32] [--recipe UD-IQ1_S] [--threads 2] [--rounds 2]

Both begin with the same checkpoint (rows of R1's sizes, seeded weights) and importance matrix and must end with
the same bytes, which is checked before any figure is printed. Wall and processor time, peak memory, and the
bytes of every file written on the way.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from footprint import CONFIG, status

from quantkit.base.text import markdown_table
from quantkit.llama_cpp import toolchain
from quantkit.llama_cpp.tensor_types import tensor_type_file
from quantkit.model import demo
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load


class Run(NamedTuple):
    wall: float
    cpu: float
    rss: int
    written: int


def measure(commands: list[list[str]], outputs: list[Path], env: dict[str, str]) -> Run:
    """Run commands one after the other; what they took together."""
    start, cpu, rss = time.monotonic(), 0.0, 0
    for command in commands:
        with open(outputs[-1].with_suffix(".log"), "w+b") as log:
            # not in the repository: there `quantkit` would be the source folder, without its compiled module
            where = tempfile.gettempdir()
            process = subprocess.Popen(command, cwd=where, env=env, stdout=log, stderr=subprocess.STDOUT)
            peak = 0
            while True:
                peak = status(process.pid, "status", "VmHWM:") * 1024 or peak  # not ru_maxrss: that has our own in it
                done, code, usage = os.wait4(process.pid, os.WNOHANG)
                if done:
                    break
                time.sleep(0.02)
            if code:
                log.seek(0)
                sys.exit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-2000:]}")
        cpu += usage.ru_utime + usage.ru_stime
        rss = max(rss, peak)
    return Run(time.monotonic() - start, cpu, rss, sum(p.stat().st_size for p in outputs))


def sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--recipe", default="UD-IQ1_S")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    quantize = toolchain.find("llama-quantize")
    (python, script), extra = toolchain.converter_command()
    with tempfile.TemporaryDirectory(prefix="quantkit-build-") as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        demo.make_checkpoint(checkpoint, {**CONFIG, "n_routed_experts": args.experts})
        model = open_model(str(checkpoint), Options(pre=demo.PRE))
        imatrix = folder / "imatrix.gguf"
        demo.make_imatrix(imatrix, {t.name: t.shape for t in model.tensors if t.quantizable and t.layer is not None})
        recipe = load(args.recipe)
        types = folder / "types.txt"
        planned = make_plan(model, recipe).tensors
        types.write_text(tensor_type_file((t.tensor.name, t.type) for t in planned if t.tensor.quantizable))
        # the converter does not know the demo's tokenizer by its hash
        convert = (
            "import runpy, sys, pathlib; script = sys.argv[1]; sys.argv = sys.argv[1:];"
            "sys.path[0] = str(pathlib.Path(script).parent); import conversion.base;"
            f"conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {demo.PRE!r};"
            "runpy.run_path(script, run_name='__main__')"
        )
        bf16, stock, ours = folder / "bf16.gguf", folder / "stock.gguf", folder / "ours.gguf"
        threads = str(args.threads)
        ways = {
            "stock": (
                [
                    [python, "-c", convert, script, str(checkpoint), "--outtype", "bf16", "--outfile", str(bf16)],
                    [str(quantize), "--imatrix", str(imatrix), "--tensor-type-file", str(types), str(bf16), str(stock),
                     recipe.file_type, threads],
                ],
                [bf16, stock],
                os.environ | extra | {"OMP_NUM_THREADS": threads},
            ),
            "quantkit": (
                [
                    [sys.executable, "-m", "quantkit", "build", str(checkpoint), "-o", str(ours), "--recipe",
                     args.recipe, "--imatrix", str(imatrix), "--pre", demo.PRE, "--threads", threads, "--force", "-q"],
                ],
                [ours],
                dict(os.environ),
            ),
        }  # fmt: skip
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, (commands, outputs, env) in ways.items():
                runs[way].append(measure(commands, outputs, env))
            if sha(ours) != sha(stock):
                sys.exit("the two ways gave different files")
        weights = sum(t.n_elements for t in model.tensors)
        print(f"{weights:,} weights, {args.recipe}, {threads} threads, {args.rounds} rounds each; the same bytes")
        head = ["way", "wall, s", "processor, s", "peak RSS, bytes", "bytes written", "beside the output"]
        medians, rows = {}, []
        for way, some in runs.items():
            medians[way] = statistics.median(r.wall for r in some)
            cpu = statistics.median(r.cpu for r in some)
            beside = some[0].written - ours.stat().st_size
            rss, written = max(r.rss for r in some), some[0].written
            rows.append([way, f"{medians[way]:.1f}", f"{cpu:.1f}", f"{rss:,}", f"{written:,}", f"{beside:,}"])
        print(markdown_table(rows, head))
        print(f"ratio of wall times: {medians['stock'] / medians['quantkit']:.1f}")


if __name__ == "__main__":
    main()
