"""quantkit's options for types mean what llama-quantize's do, checked against its own dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Tools
from mixture_choices import dry_run
from test_mixtures import QWEN_05B, header_only

from quantkit.model import demo, families
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.recipe.changes import Changes
from quantkit.recipe.load import load

#: for one model: the mixture, and the options
RUNS: list[tuple[str, str, list[str]]] = [
    ("deepseek-v2-lite", "Q4_K_M", ["--tensor-type", "ffn_down=q5_k"]),
    (
        "deepseek-v2-lite",
        "Q4_K_M",
        ["--tensor-type", r"blk\.(1|[3-5])\.ffn_DOWN_exps=Q8_0", "--tensor-type", "ffn=q6_k"],
    ),
    ("deepseek-v2-lite", "Q2_K", ["--tensor-type", r"\.attn_.*=q4_k", "--output-tensor-type", "q8_0"]),
    ("deepseek-v2-lite", "Q3_K_M", ["--token-embedding-type", "q5_0", "--tensor-type", "token_embd=q8_0"]),
    ("deepseek-v2-lite", "Q3_K_M", ["--output-tensor-type", "q4_0", "--tensor-type", "^output=q8_0"]),
    ("deepseek-v2-lite", "Q4_K_S", ["--tensor-type", "attn_norm=q8_0", "--tensor-type", r"blk.\d.ffn_down=q2_k"]),
    ("qwen-tied", "Q4_K_M", ["--output-tensor-type", "q8_0"]),
    ("qwen-tied", "Q4_K_M", ["--output-tensor-type", "q8_0", "--token-embedding-type", "q5_0"]),
    ("qwen-tied", "Q4_K_M", ["--output-tensor-type", "q8_0", "--tensor-type", "token_embd=q4_0"]),
    ("qwen-tied", "Q5_K_M", ["--tensor-type", r"blk\.(0|1|2)\.ffn_down=q8_0", "--tensor-type", "attn_v=q4_k"]),
    ("deepseek-r1-distill-llama-8b", "Q4_K_M", ["--tensor-type", "(?:attn_v|ffn_down)=q5_k"]),
    ("deepseek-r1-distill-llama-8b", "IQ4_XS", ["--tensor-type", "attn_k=q8_0", "--tensor-type", "attn=q5_k"]),
    ("deepseek-r1-distill-llama-8b", "Q4_0", ["--tensor-type", r"blk\.[0-5]\.ffn_down=q8_0"]),
]


def model(name: str) -> Catalogue:
    return families.build("m", QWEN_05B, Options()) if name == "qwen-tied" else open_model(name)


@pytest.mark.tools
@pytest.mark.parametrize(("name", "mixture", "options"), RUNS, ids=[f"{n} {m} {' '.join(o)}" for n, m, o in RUNS])
@pytest.mark.parametrize("with_imatrix", [False, True], ids=["without", "imatrix"])
def test_options_of_llama_quantize(
    tools: Tools, tmp_path: Path, name: str, mixture: str, options: list[str], with_imatrix: bool
) -> None:
    c = model(name)
    file = header_only(c, tmp_path / "model.gguf")
    imatrix = tmp_path / "imatrix.gguf"
    demo.make_imatrix(imatrix, {"blk.0.some.weight": (32,)})
    theirs = dry_run(tools, file, mixture, imatrix if with_imatrix else None, options)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    changes = Changes(
        tensor_types=tuple(v for k, v in pairs if k == "--tensor-type"),
        output_type=next((v for k, v in pairs if k == "--output-tensor-type"), None),
        embedding_type=next((v for k, v in pairs if k == "--token-embedding-type"), None),
    )
    plan = make_plan(c, changes.apply(load(mixture)), NoEntries() if with_imatrix else None)
    assert {t.tensor.name: t.type for t in plan.tensors} == theirs


class NoEntries:
    """An importance matrix that has an entry for no tensor."""

    def __contains__(self, name: str) -> bool:
        return False

    def fits(self, name: str, n_cols: int, n_mats: int) -> bool:
        return False


def test_what_llama_quantize_would_not_say() -> None:
    c = open_model("deepseek-v2-lite")
    changes = Changes(tensor_types=("attn_norm=q8_0", "fnn_down=q4_k", "ffn_down=q6_k"))
    assert make_plan(c, changes.apply(load("Q4_K_M"))).warnings == (
        "--tensor-type attn_norm=q8_0: does nothing: it names only tensors that are never quantized, such as "
        "'blk.0.attn_norm.weight'",
        "--tensor-type fnn_down=q4_k: does nothing: no tensor's name has it",
    )
