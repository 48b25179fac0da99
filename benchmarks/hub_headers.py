"""A plan of DeepSeek-R1 from the Hub: the headers of 163 shards, over a line with latency.

    python benchmarks/hub_headers.py [--latency 0.05] [--mbit 100] [--runs 3]

The checkpoint has R1's 91,991 tensors in 163 shards with none of their data (sparse files), served by the tests' local
server through the real huggingface_hub client. Every answer waits `latency`, a header's twice (the Hub redirects
files of LFS to a second host); all bodies share the line. Connections cost nothing here: over the Internet each of at
most 32 costs two or three times the latency more, all at once. Prints seconds, requests and bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "tools")]

import sparse_r1  # noqa: E402
from hub_server import Hub  # noqa: E402

from quantkit.base.text import markdown_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--mbit", type=float, default=100, help="of the line, a second")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = sparse_r1.make(Path(folder) / "DeepSeek-R1")
        hub = Hub()
        hub.latency, hub.rate = given.latency, given.mbit * 125_000
        hub.add("org/DeepSeek-R1", checkpoint, sha256=lambda path: hashlib.sha256(path.name.encode()).hexdigest())
        for run in range(given.runs):
            hub.log.clear()
            home = Path(folder) / f"home-{run}"
            env = os.environ | hub.environment(home)
            command = [sys.executable, "-m", "quantkit", "plan", "hf://org/DeepSeek-R1", "-r", "UD-IQ1_S", "--json"]
            began = time.monotonic()
            subprocess.run([*command, "--pre", "deepseek-v3"], env=env, cwd=folder, check=True, capture_output=True)
            seconds = time.monotonic() - began
            local = time.monotonic()
            command[4] = str(checkpoint)
            subprocess.run([*command, "--pre", "deepseek-v3"], cwd=folder, check=True, capture_output=True)
            local = time.monotonic() - local
            headers = hub.sent("*.safetensors")
            rows.append(
                [
                    f"{seconds:.1f}", f"{local:.1f}", str(len(hub.log)),
                    str(len([one for one in hub.log if one.path.endswith(".safetensors") and one.host == "cdn"])),
                    f"{hub.sent() / 1e6:.1f}", f"{headers / 1e6:.1f}",
                ]
            )  # fmt: skip
        hub.close()
    head = ["seconds", "of a local folder", "requests", "for headers", "MB", "of headers"]
    print(markdown_table(rows, head))


if __name__ == "__main__":
    main()
