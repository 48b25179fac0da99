"""Command lines of the programs that run a GGUF. llama.cpp's are tested with its own tools; those of ik_llama.cpp and
KoboldCpp follow their documentation and were not run."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from .advice import CacheTypes, Sampling, is_quantized
from .placement import Placement

HOST, PORT = "127.0.0.1", "8080"
#: KoboldCpp's numbers for types of the KV cache
_QUANTKV = {"f16": "0", "q8_0": "1", "q4_0": "2"}


@dataclass(frozen=True)
class Line:
    """A program with its arguments. `program` is its display name."""

    program: str
    argv: tuple[str, ...]

    @property
    def shell(self) -> str:
        """The line as typed into a shell."""
        return " ".join(map(shell_word, self.argv))


@dataclass(frozen=True)
class Run:
    """The settings that every program gets, in its own flags."""

    model: str
    context: int
    cache: CacheTypes
    sampling: Sampling
    placement: Placement
    is_deepseek: bool


def lines(run: Run) -> tuple[Line, ...]:
    """Lines for llama-cli, llama-server, ik_llama.cpp's llama-server and KoboldCpp; --exec looks for them in this
    order."""
    server = ("--host", HOST, "--port", PORT)
    common = ("-m", run.model, "-c", str(run.context), *run.cache.flags, *run.placement.flags, *_sampling(run.sampling))
    return (
        Line("llama-cli", ("llama-cli", *common, "--jinja")),
        Line("llama-server", ("llama-server", *common, "--jinja", *server)),
        Line("ik_llama.cpp", ("llama-server", *_ik(run), *server)),
        Line("KoboldCpp", ("koboldcpp", *_koboldcpp(run))),
    )


def _sampling(s: Sampling) -> tuple[str, ...]:
    temp = () if s.temp is None else ("--temp", f"{s.temp:g}")
    return (*temp, "--min-p", f"{s.min_p:g}", "-s", str(s.seed))


def _ik(run: Run) -> tuple[str, ...]:
    """Arguments for ik_llama.cpp. Its MLA keeps one K cache for any layout, of f16 or q8_0; flash attention and fused
    experts are its defaults."""
    cache = run.cache.flags
    if run.is_deepseek:
        key = "q8_0" if is_quantized(run.cache.key) else run.cache.key
        cache = ("-ctk", key, "-mla", "3", "-amb", "512")
    return (
        "-m", run.model, "-c", str(run.context), *cache, *run.placement.flags, *_sampling(run.sampling),
    )  # fmt: skip


def _koboldcpp(run: Run) -> tuple[str, ...]:
    p, s = run.placement, run.sampling
    out = ["--model", run.model, "--contextsize", str(run.context), "--gpulayers", str(p.n_gpu_layers)]
    if p.tensor_split:
        out += ["--tensor_split", *map(str, p.tensor_split)]
    if p.n_cpu_moe:
        out += ["--moecpu", str(p.n_cpu_moe)]
    if p.override:
        out += ["--overridetensors", p.override]
    if number := _QUANTKV.get(run.cache.key if run.cache.key != "f16" else "", ""):
        out += ["--flashattention", "--quantkv", number]
    defaults: dict[str, float] = {} if s.temp is None else {"temperature": s.temp}
    out += ["--gendefaults", json.dumps({**defaults, "min_p": s.min_p, "sampler_seed": s.seed})]
    return tuple(out)


def shell_word(word: str) -> str:
    """Quote a word for a shell, whatever it contains. Unprintable characters need bash or zsh."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(ch if ch.isprintable() and ch not in "\\'" else _as_bytes(ch) for ch in word)
    return f"$'{escaped}'"


def _as_bytes(ch: str) -> str:
    return "".join(f"\\x{b:02x}" for b in ch.encode("utf-8", "surrogateescape"))
