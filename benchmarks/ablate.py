"""A study of 24 variants in one command, against building each and measuring it with llama-perplexity.

    python benchmarks/ablate.py CHECKPOINT --imatrix imatrix.gguf --text seen.txt --ctx 256 --chunks 60

Processor seconds of every process, one thread each. The stock way is measured on four of the variants, and multiplied:
llama-quantize from a BF16 GGUF, with the variant's types, and llama-perplexity's KL divergence against saved logits;
the BF16 file and the logits of the reference are made once. Beside it
the same with quantkit's own build in place of llama-quantize. The mean KLDs of both ways are printed side by side, and
must agree. The study is run twice more with --cache: once to fill it, once from it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from quantkit.base.text import markdown_table
from quantkit.gguf.header import read_header
from quantkit.lab.studies.study import load_study, recipe_text
from quantkit.llama_cpp import toolchain

STUDY = """\
base: UD-IQ1_S
design: one at a time
axes:
  down: {match: "blk.*.ffn_down_exps.weight", types: [IQ1_S, IQ2_XS, Q2_K, IQ3_XXS, Q3_K, Q4_K]}
  gate_up: {match: "blk.*.ffn_{gate,up}_exps.weight", types: [IQ1_M, IQ2_XXS, IQ2_S, Q2_K, Q3_K]}
  embedding: {match: token_embd.weight, types: [Q2_K, Q3_K, Q5_K, Q6_K]}
  output: {match: output.weight, types: [Q4_K, Q8_0]}
  attention: {match: "blk.*.attn_{q_a,q_b,output}.weight", types: [Q2_K, Q3_K, Q6_K]}
  shared: {match: "blk.*.ffn_{gate,up,down}_shexp.weight", types: [Q3_K, Q8_0]}
  early: {match: "blk.*.ffn_{gate,up,down}_exps.weight", type: Q3_K, layers: ["moe[:1]", "moe[:2]"]}
"""
MEASURED, TRIES = 4, 5


def run(*command: str | Path) -> tuple[str, float]:
    """What a command prints, and its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--pre", default="deepseek-v3")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=60)
    given = parser.parse_args()
    me = (sys.executable, "-m", "quantkit")
    text = ("-c", str(given.ctx), "--chunks", str(given.chunks))
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "study.yaml").write_text(STUDY)
        study = load_study(here / "study.yaml")
        ablate = (
            *me, "ablate", "run", here / "study.yaml", given.checkpoint, "--pre", given.pre, "--imatrix", given.imatrix,
            "--text", given.text, *text, "-t", "1", "-q",
        )  # fmt: skip

        def results(name: str) -> dict[str, dict[str, float]]:
            shown = json.loads(run(*me, "ablate", "show", here / name, "--json")[0])
            return {r["variant"]: r["scores"] for r in shown["results"]}

        _, ours = run(*ablate, "-o", here / "results.db")
        found = results("results.db")
        kept = ("--cache", here / "cache")
        cached = [run(*ablate, *kept, "-o", here / name)[1] for name in ("fills.db", "reads.db")]
        assert results("fills.db") == results("reads.db") == found

        bf16 = "name: BF16\narch: [deepseek2]\nfile_type: BF16\nrules: [{match: '*', type: BF16, why: as it is}]\n"
        (here / "bf16.yaml").write_text(bf16)
        build = (*me, "build", given.checkpoint, "--pre", given.pre, "-t", "1", "-q")
        run(*build, "-r", here / "bf16.yaml", "-o", here / "bf16.gguf")
        tool = (toolchain.find("llama-perplexity"), "-f", given.text, *text, "-t", "1")
        _, base = run(*tool, "-m", here / "bf16.gguf", "--save-all-logits", here / "logits")
        stock, own, rows = [], [], []
        quantize = (toolchain.find("llama-quantize"), "--imatrix", given.imatrix, "--tensor-type-file")
        every = list(study.levels())
        for number in range(0, len(every), -(-len(every) // MEASURED)):
            levels = every[number]
            name = ", ".join(f"{a}={b}" for a, b in levels.items()) or "base"
            (here / "variant.yaml").write_text(recipe_text(study, levels))
            out, types = here / "variant.gguf", here / "types.txt"
            _, built = run(*build, "-r", here / "variant.yaml", "--imatrix", given.imatrix, "-o", out, "--force")
            run(
                *me, "recipe", "export", here / "variant.yaml", "--format", "tensor-types", "-m", here / "bf16.gguf",
                "-o", types, "--force",
            )  # fmt: skip
            theirs = here / "theirs.gguf"
            _, quantized = run(*quantize, types, here / "bf16.gguf", theirs, "Q2_K", "1")
            assert {t.name: t.type for t in read_header(out).tensors} == {
                t.name: t.type for t in read_header(theirs).tensors
            }
            for _ in range(TRIES):  # it can end with code 0 and its summary cut off
                said, measured = run(*tool, "-m", out, "--kl-divergence", "--kl-divergence-base", here / "logits")
                if "\nSame top p:" in said:
                    break
            stock.append(quantized + measured)
            own.append(built + measured)
            line = next((line for line in said.splitlines() if "Mean    KLD:" in line), "Mean    KLD: nan")
            kld = float(line.split(":")[1].split("±")[0])
            seconds = [f"{s:.1f}" for s in (quantized, built, measured)]
            rows.append([name, *seconds, f"{found[name]['mean_kld']:.5f}", f"{kld:.5f}"])
            assert abs(kld / found[name]["mean_kld"] - 1) < 0.05, (name, kld, found[name]["mean_kld"])
        head = ["variant", "llama-quantize s", "quantkit build s", "llama-perplexity s", "KLD here", "KLD there"]
        print(markdown_table(rows, head, (1, 2, 3, 4, 5)))
        print(f"\n{len(found)} variants: {ours:.1f} processor seconds in one command")
        print(f"with --cache: {cached[0]:.1f} while it fills, {cached[1]:.1f} from it, with the same results")
        for way, seconds_of in (("llama-quantize", stock), ("quantkit build", own)):
            each = sum(seconds_of) / len(seconds_of)
            total = base + each * len(found)
            print(f"{way}: {base:.1f} + {len(found)} x {each:.1f} = {total:.1f}; ratio {total / ours:.1f}")
        assert len(found) >= 24


if __name__ == "__main__":
    main()
