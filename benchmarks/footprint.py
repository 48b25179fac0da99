"""Memory and disk of a build: peak RSS, bytes written, and every file that appears beside the output.

    python benchmarks/footprint.py [--experts 16] [--engine native] [--threads 2]

Makes a checkpoint with rows of R1's real sizes (7168 x 2048 experts), builds UD-IQ1_S from it in a
process of its own, and watches that process and the folder. The bound to hold: under 1 GiB at any
model size, and not a byte written but the output's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantkit.model import demo
from quantkit.model.families.options import Options
from quantkit.model.open import open_model

CONFIG = {
    **demo.CONFIG,
    "first_k_dense_replace": 1,
    "hidden_size": 7168,
    "intermediate_size": 2048,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def status(pid: int, file: str, key: str) -> int:
    """A number from /proc/PID/<file>, 0 once the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--engine", default="native")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantkit-footprint-") as name:
        folder = Path(name)
        (folder / "checkpoint").mkdir()
        (folder / "out").mkdir()
        config = {**CONFIG, "n_routed_experts": args.experts}
        demo.make_checkpoint(folder / "checkpoint", config, n_shards=max(3, args.experts // 16))
        catalogue = open_model(str(folder / "checkpoint"), Options(pre=demo.PRE))
        demo.make_imatrix(
            folder / "imatrix.gguf",
            {t.name: t.shape for t in catalogue.tensors if t.quantizable and t.layer is not None},
        )
        out = folder / "out" / "model.gguf"
        command = [sys.executable, "-m", "quantkit", "build", str(folder / "checkpoint"), "-o", str(out), "--recipe"]
        command += ["UD-IQ1_S", "--imatrix", str(folder / "imatrix.gguf"), "--pre", demo.PRE, "-q"]
        command += ["--engine", args.engine, "--threads", str(args.threads)]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=folder)
        peak = written = 0
        most_on_disk = 0
        seen: set[str] = set()
        while process.poll() is None:
            peak = max(peak, status(process.pid, "status", "VmHWM:") * 1024)
            written = max(written, status(process.pid, "io", "wchar:"))
            files = [p for p in (folder / "out").rglob("*") if p.is_file()]
            seen |= {p.name for p in files}
            most_on_disk = max(most_on_disk, sum(os.stat(p).st_blocks * 512 for p in files if p.exists()))
            time.sleep(0.02)
        if process.returncode:
            sys.exit(process.returncode)
        stored = sum(os.path.getsize(p) for p in (folder / "checkpoint").glob("*.safetensors"))
        result = {
            "engine": args.engine,
            "threads": args.threads,
            "checkpoint_bytes": stored,
            "largest_tensor_bytes_f32": max(4 * t.n_elements for t in catalogue.tensors),
            "output_bytes": out.stat().st_size,
            "bytes_written_by_the_process": written,
            "most_bytes_on_disk_at_once": most_on_disk,
            "files_seen_beside_the_output": sorted(seen),
            "peak_rss_bytes": peak,
            "seconds": round(time.monotonic() - start, 1),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
