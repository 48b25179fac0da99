"""What the policies for missing importance data cost or save, as KL divergence.

    python benchmarks/imatrix_policies.py MODEL imatrix.gguf TEXT... [--recipe UD-IQ1_S] [--ctx 256] [--chunks 120]

Plants gaps in copies of the importance matrix. `dead`: in every MoE layer the expert that saw most tokens is never
seen, and the second knows its inputs from --tokens tokens only (each column the mean of as many squared normals, times
the value it had). `lost`: only the entry of up_proj has lost the first of them, so that gate_proj still knows its
input. Then builds a GGUF natively for each policy and measures it with llama-perplexity, one thread, against the BF16
file. Beside each mean KLD stands its standard error; then the difference to the build with the whole matrix, with the
standard error of the differences of chunks (what both files find hard cancels out there).
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import quantkit as qk
from quantkit.gguf.header import read_header
from quantkit.llama_cpp import toolchain

_CHUNK = re.compile(r"^\s*(\d+)\s+\S+ ±\s+\S+\s+\S+ ±\s+\S+\s+(\S+) ±")
_MEAN = re.compile(r"^Mean\s+KLD:\s+(\S+) ±\s+(\S+)", re.MULTILINE)
PLANTED = {
    "dead": ("ones", "prior", "shrink:50", "shrink:1000", "raise:IQ2_S"),
    "lost": ("ones", "sibling", "prior"),
}


class Kld(NamedTuple):
    mean: float
    error: float
    chunks: np.ndarray
    """the mean of each chunk"""


def plant(imatrix: Path, out: Path, kind: str, n_tokens: int) -> None:
    """A copy of an importance matrix with gaps."""
    shutil.copyfile(imatrix, out)
    tensors = {t.name: t for t in read_header(out).tensors}
    with open(out, "r+b") as f:
        for name in sorted(n for n in tensors if n.endswith("_exps.weight.counts")):
            sums = tensors[name.removesuffix("counts") + "in_sum2"]
            f.seek(tensors[name].offset)
            counts = np.frombuffer(f.read(tensors[name].nbytes), np.float32).copy()
            f.seek(sums.offset)
            values = np.frombuffer(f.read(sums.nbytes), np.float32).copy().reshape(len(counts), -1)
            first, second = np.argsort(-counts, kind="stable")[:2]
            if kind == "dead" or "ffn_up" in name:
                counts[first], values[first] = 0, 0
            if kind == "dead":
                # gate and up see the same inputs, and so have the same sums
                noise = np.random.default_rng([2, "down" in name, int(name.split(".")[1])])
                values[second] *= noise.chisquare(n_tokens, values.shape[1]) / counts[second]
                counts[second] = n_tokens
            f.seek(tensors[name].offset)
            f.write(counts.tobytes())
            f.seek(sums.offset)
            f.write(values.astype(np.float32).tobytes())


def perplexity(model: Path, text: Path, base: Path, args: argparse.Namespace, compare: bool) -> str:
    """Run llama-perplexity, which now and then ends without its last lines: then again."""
    command: list[str | Path] = [
        toolchain.find("llama-perplexity"), "-m", model, "-c", str(args.ctx), "-t", "1", "--kl-divergence-base", base,
        *(["--chunks", str(args.chunks)] if args.chunks else []),
        *(["--kl-divergence"] if compare else ["-f", text]),
    ]  # fmt: skip
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
        said = done.stdout + done.stderr
        if not compare or _MEAN.search(said):
            return said
    raise SystemExit(f"llama-perplexity gave no mean KLD: {said[-500:]}")


def measure(model: Path, text: Path, base: Path, args: argparse.Namespace) -> Kld:
    said = perplexity(model, text, base, args, compare=True)
    running = np.array([float(m[2]) for line in said.splitlines() if (m := _CHUNK.match(line))])
    total = running * np.arange(1, len(running) + 1)
    found = _MEAN.search(said)
    assert found is not None, said[-500:]
    return Kld(float(found[1]), float(found[2]), np.diff(total, prepend=0))


def apart(a: Kld, b: Kld) -> tuple[float, float]:
    """The difference of two mean KLDs, and its standard error from the differences of chunks."""
    each = a.chunks - b.chunks
    return a.mean - b.mean, float(each.std(ddof=1)) / math.sqrt(len(each))


def difference(a: Kld, b: Kld) -> str:
    by, error = apart(a, b)
    return f"{by:+.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--pre")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=0, help="of each text; 0: all")
    parser.add_argument("--tokens", type=int, default=3, help="that the rarely seen expert saw")
    parser.add_argument("--threads", type=int, default=1, help="of the builds")
    args = parser.parse_args()
    model = qk.open_model(args.model, pre=args.pre)
    with tempfile.TemporaryDirectory(prefix="quantkit-policies-") as name:
        folder = Path(name)
        reference, out = folder / "bf16.gguf", folder / "out.gguf"
        qk.build(qk.plan(model, "BF16"), reference, threads=args.threads)
        bases = [folder / f"{i}.kld" for i in range(len(args.texts))]
        for text, base in zip(args.texts, bases, strict=True):
            perplexity(reference, text, base, args, compare=False)
        columns = "".join(f" mean KLD, {text.name} | difference |" for text in args.texts)
        print(f"| recipe | gaps | policy | bytes |{columns}")
        print("|---|---|---|---|" + "---|---|" * len(args.texts), flush=True)
        for recipe in args.recipe or ["UD-IQ1_S"]:
            whole: list[Kld] = []
            for kind, policies in {"none": ("fail",), **PLANTED}.items():
                gappy = args.imatrix
                if kind != "none":
                    gappy = folder / f"{kind}.gguf"
                    plant(args.imatrix, gappy, kind, args.tokens)
                for policy in policies:
                    plan = qk.plan(model, recipe, gappy, imatrix_policy=policy)
                    made = qk.build(plan, out, threads=args.threads, force=True)
                    found = [measure(out, t, b, args) for t, b in zip(args.texts, bases, strict=True)]
                    whole = whole or found
                    cells = "".join(
                        f" {k.mean:.4f} ± {k.error:.4f} | {difference(k, w) if kind != 'none' else ''} |"
                        for k, w in zip(found, whole, strict=True)
                    )
                    shown = policy if kind != "none" else ""
                    print(f"| {recipe} | {kind} | {shown} | {made.nbytes:,} |{cells}", flush=True)


if __name__ == "__main__":
    main()
