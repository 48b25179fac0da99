"""Recipes in a line, plans and builds of small models in this process, and whole files to compare."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from conftest import Tools
from gguf import GGUFReader

from quantkit.building import run as builds
from quantkit.building.engines import Engine
from quantkit.building.engines.native import NativeEngine
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.policies import parse_policy
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe.load import Recipe, parse

#: the tokenizer of the checkpoints that `factory` makes, by name: of a V3, and of the others
OPTIONS, NAMED = Options(pre="deepseek-v3"), Options(pre="llama-bpe")
ARCHS = "[deepseek2, llama, qwen2]"


def rules(*lines: str, head: str = f"arch: {ARCHS}\nfile_type: Q4_K_M", optional: bool = False) -> Recipe:
    """The recipe of these rules, each the inside of a YAML mapping; where `optional`, rules may match nothing."""
    more = ", optional: true" if optional else ""
    return parse(f"name: r\n{head}\nrules:\n" + "".join(f"  - {{{line}{more}, why: t}}\n" for line in lines), "r.yaml")


def uniform(type_: str, file_type: str, imatrix: str = "optional") -> Recipe:
    """One type for all."""
    head = f"arch: {ARCHS}\nfile_type: {file_type}\nimatrix: {imatrix}"
    return rules(f'match: "*", type: {type_}', head=head)


def mixture(name: str) -> Recipe:
    """One of llama.cpp's own mixtures."""
    return parse(f"name: mix\narch: {ARCHS}\nfile_type: {name}\notherwise: mixture {name}\nrules: []\n", "mix.yaml")


def plan_of(
    source: Path, recipe: Recipe, imatrix: Path | None, options: Options = OPTIONS, policy: str | None = None
) -> Plan:
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    chosen = None if policy is None else parse_policy(policy)
    return make_plan(open_model(str(source), options), recipe, weights, policy=chosen)


def build(
    plan: Plan, out: Path, imatrix: Path | None = None, split: int | None = None, engine: Engine | None = None,
    allow_requantize: bool = False, n_threads: int = 2,
) -> Path:  # fmt: skip
    """What `quantkit build` does, in this process: ggml sorts its grids once for all tests. Returns the file or the
    first shard."""
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    ready = builds.prepare(plan, out, weights, split, allow_requantize=allow_requantize)
    builds.run(ready, engine or NativeEngine(), n_threads, lambda _name, _n: None)
    return ready.files[0][0]


def build_named(
    source: Path, out: Path, recipe: Recipe, engine: Engine | None = None, imatrix: Path | None = None
) -> Path:
    """A build of a checkpoint whose tokenizer is NAMED."""
    return build(plan_of(source, recipe, imatrix, NAMED), out, imatrix, engine=engine)


def llama_quantize(
    tools: Tools, source: Path, out: Path, rules: str, base: str, imatrix: Path | None = None, *more: str
) -> Path:
    """A run of the stock binary on a whole model, with rules as a --tensor-type-file."""
    file = out.with_suffix(".types")
    file.write_text(rules)
    command = [str(tools.quantize), *more, "--tensor-type-file", str(file)]
    command += ["--imatrix", str(imatrix)] if imatrix else []
    done = subprocess.run(
        [*command, str(source), str(out), base, "2"], capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return out


def fields(path: Path) -> dict[str, tuple[list[Any], Any]]:
    """All keys of a GGUF as the gguf package reads them: types and value."""
    reader = GGUFReader(path)
    return {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}


def data(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All tensors of a GGUF as the gguf package reads them."""
    return {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape), t.data.tobytes()) for t in GGUFReader(path).tensors
    }
