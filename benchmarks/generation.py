"""What `quantkit eval generate` finds in files of one small model, from nearly whole to far too small.

    python benchmarks/generation.py SmolLM2-135M-Instruct.Q4_1.gguf

Builds the files from the GGUF, and has each write: two prompts, seeds 3407 and 3408 for 160 tokens, and 3407 for 320.
The tables are in docs/generate.md. The reference, and the first candidate, is the model as Q8_0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPTS = ("Write a short story about a dog who finds a map.", "Explain why the sky is blue.")
#: name -> rules of its recipe; rows of 576 fit few types
RECIPES = {
    "q8": ['{match: "*.weight", type: Q8_0, why: all alike}'],
    "mixed": [
        '{match: "blk.[012].ffn_*.weight", type: Q8_0, why: first layers}',
        '{match: "*ffn_gate.weight", type: Q2_0, why: the rest}',
        '{match: "*ffn_up.weight", type: Q4_0, why: the rest}',
        '{match: "*.weight", type: Q8_0, why: the rest}',
    ],
    "naive": ['{match: "*.weight", type: Q2_0, why: all alike}'],
    "mild": [
        '{match: "blk.*.ffn_gate.weight", layers: "all[4:20]", type: Q2_0, why: the middle}',
        '{match: "*.weight", type: Q8_0, why: the rest}',
    ],
    "plain4": ['{match: "*.weight", type: Q4_0, why: all alike}'],
}
RUNS = ((("q8", "mixed", "naive"), "3407,3408", "160"), (("q8", "mild", "plain4"), "3407", "320"))


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, command)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        for name, rules in RECIPES.items():
            text = f"name: {name}\narch: [any]\nfile_type: Q2_K\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules)
            (here / f"{name}.yaml").write_text(text)
            out = here / f"{name}.gguf"
            run("build", given.model, "-r", here / f"{name}.yaml", "-o", out, "--allow-requantize", "-q")
            print(f"{name}: {out.stat().st_size:,} bytes")
        for names, seeds, n in RUNS:
            files = [here / f"{name}.gguf" for name in names]
            print(f"\nseeds {seeds}, {n} tokens at most:\n", flush=True)
            options = ("-t", "1", "--chat", "--reference", files[0], "--seeds", seeds, "--n-predict", n, "-q")
            print(run("eval", "generate", *files, "--prompts", here / "prompts.txt", *options))


if __name__ == "__main__":
    main()
