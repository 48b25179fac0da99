"""Published files sorted by the name of their quantization, for every way that repositories lay them out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.gguf.quant_names import published, quant_name
from quantkit.gguf.shards import shard_name
from quantkit.recipe.named import shipped


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("DeepSeek-R1-UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00001-of-00003.gguf", "UD-IQ1_S"),
        ("UD-Q2_K_XL/DeepSeek-R1-0528-UD-Q2_K_XL-00001-of-00006.gguf", "UD-Q2_K_XL"),
        ("DeepSeek-R1.BF16/DeepSeek-R1.BF16-00001-of-00030.gguf", "BF16"),
        ("DeepSeek-R1-Q4_K_M/model-00001-of-00009.gguf", "Q4_K_M"),
        ("DeepSeek-R1-Distill-Qwen-7B.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("deepseek-r1-distill-llama-8b-q8_0.gguf", "Q8_0"),
        ("Q2_K_XS/x.GGUF", "Q2_K_XS"),
        ("model-fp16.gguf", "F16"),
        ("DeepSeek-V3-ud_iq2_m.gguf", "UD-IQ2_M"),
        ("gpt-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("DeepSeek-R1.gguf", None),
        ("a/b/Q4KM.gguf", None),
    ],
)
def test_names(path: str, name: str | None) -> None:
    assert quant_name(path) == name


@given(st.sampled_from(sorted(n for n in shipped() if not n.startswith("NAIVE"))), st.booleans(), st.integers(1, 4))
def test_every_shipped_recipe_is_found_by_its_name(name: str, in_folder: bool, n_shards: int) -> None:
    prefix = "model" if in_folder else f"DeepSeek-R1-{name}"
    files = [shard_name(prefix, i, n_shards) if n_shards > 1 else f"{prefix}.gguf" for i in range(n_shards)]
    found = published({f"{name}/{file}": 10 + i for i, file in enumerate(files)})
    assert [(p.name, p.nbytes, p.missing, len(p.files)) for p in found] == [
        (name, sum(10 + i for i in range(n_shards)), 0, n_shards)
    ]


def test_a_repository() -> None:
    files = {
        "README.md": 5000, ".gitattributes": 100, "config.json": 900,
        "R1-UD-IQ1_S/R1-UD-IQ1_S-00002-of-00002.gguf": 60, "R1-UD-IQ1_S/R1-UD-IQ1_S-00001-of-00002.gguf": 50,
        "Q8_0/R1-Q8_0-00001-of-00003.gguf": 200, "Q8_0/R1-Q8_0-00003-of-00003.gguf": 200,
        "R1.gguf": 7, "imatrix_R1_Q4_K_M.gguf": 3, "mmproj-F16.gguf": 4,
        "a-Q4_K_M.gguf": 100, "b-Q4_K_M.gguf": 90,
    }  # fmt: skip
    assert [(p.name, p.nbytes, p.missing) for p in published(files)] == [
        ("R1", 7, 0), ("b-Q4_K_M", 90, 0), ("a-Q4_K_M", 100, 0), ("UD-IQ1_S", 110, 0), ("Q8_0", 400, 1),
    ]  # fmt: skip
    (first,) = (p for p in published(files) if p.name == "UD-IQ1_S")
    assert first.files[0].endswith("00001-of-00002.gguf")
