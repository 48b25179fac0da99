"""What fits on GPUs: the published table, sizes against llama.cpp's own assignment of tensors, flags, messages."""

from __future__ import annotations

import itertools
import json
import random
import re
import struct
import subprocess
from bisect import bisect_right
from pathlib import Path

import factory
import pytest
from click.testing import CliRunner
from conftest import Tools
from hypothesis import given
from hypothesis import strategies as st

from quantkit.base.errors import UnsupportedError
from quantkit.base.text import GIB
from quantkit.cli.fit import GpuList, fit
from quantkit.gguf.header import I32, STRING, U32, kv, kv_array
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.fit import (
    Layer,
    PlacedBytes,
    answer,
    cache_bytes,
    experts_in_ram,
    numbers_regex,
    published_rule,
    published_size,
    weigh,
    whole_layers,
)
from quantkit.planning.gpus import Gpus
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe.load import load

#: the table of the R1 dynamic quants' guide, January 2025: recipe -> (size in GB, layers on 24, 80 and 2x80 GB)
PUBLISHED = {
    "UD-IQ1_S": (131, (7, 33, 61)),
    "UD-IQ1_M": (158, (5, 26, 57)),
    "UD-IQ2_XXS": (183, (4, 22, 49)),
    "UD-Q2_K_XL": (212, (2, 19, 32)),
}
GPUS = (Gpus("24", (24,)), Gpus("80", (80,)), Gpus("2x80", (80, 80)))


@pytest.fixture(scope="module")
def r1_plans() -> dict[str, Plan]:
    catalogue = open_model("deepseek-r1", Options("kv_b"))
    return {name: make_plan(catalogue, load(name)) for name in PUBLISHED}


def weights_of(plan: Plan, context: int = 8192, cache_type: str = "f16") -> PlacedBytes:
    return weigh(plan.catalogue, plan, context, cache_type)


# ---------------------------------------------------------------- the published rule


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table(r1_plans: dict[str, Plan], name: str) -> None:
    gb, layers = PUBLISHED[name]
    w = weights_of(r1_plans[name])
    assert published_size(w.tensor_bytes) == gb
    for gpus, published in zip(GPUS, layers, strict=True):
        found = answer(w, gpus, GIB, ())
        if (name, gpus.text) == ("UD-Q2_K_XL", "2x80"):
            # the one cell that does not follow the guide's own rule
            assert (found.rule, published) == (42, 32)
            assert found.note == "the published guide says 32 layers there; its own rule gives 42"
        else:
            assert (found.rule, found.note) == (published, "")


def test_the_rule_at_its_ends() -> None:
    assert published_rule(24, 183, 61) == 4
    # 8 in whole numbers, a little less in floating point
    assert int(8 / 49 * 49) == 7
    assert published_rule(8, 49, 49) == 4
    assert published_rule(8, 212, 61) == 0
    assert published_rule(1000, 131, 61) == 61


# ---------------------------------------------------------------- KV cache


@pytest.mark.parametrize(
    ("layout", "cache_type", "per_token"),
    [
        ("k_b+v_b", "f16", 576 * 2),  # kv_lora_rank 512 + rope 64, V is a view
        ("k_b+v_b", "q8_0", 576 // 32 * 34),
        ("k_b+v_b", "q4_0", 576 // 32 * 18),
        ("kv_b", "f16", 128 * (192 + 128) * 2),
        ("kv_b", "q8_0", 128 * (192 + 128) // 32 * 34),
    ],
)
def test_cache_of_r1(layout: str, cache_type: str, per_token: int) -> None:
    catalogue = open_model("deepseek-r1", Options(layout))
    assert cache_bytes(catalogue, 8192, cache_type) == [8192 * per_token] * 61
    # llama.cpp pads the context to 256
    assert cache_bytes(catalogue, 8193, cache_type) == [8448 * per_token] * 61


def gqa_gguf(path: Path, **change: object) -> Path:
    """Two layers of grouped-query attention: 4 heads of 64, 2 of them for keys and values; tied embeddings."""
    keys = {
        "general.architecture": kv("general.architecture", STRING, "llama"),
        "block_count": kv("llama.block_count", U32, 2),
        "embedding_length": kv("llama.embedding_length", U32, 256),
        "head_count": kv("llama.attention.head_count", U32, 4),
        "head_count_kv": kv("llama.attention.head_count_kv", U32, 2),
    }
    kept = [item for item in (keys | change).values() if item is not None]
    shape = {"token_embd.weight": (256, 8), "output_norm.weight": (256,)}
    shape |= {f"blk.{i}.{n}.weight": (256, 4) for i in (0, 1) for n in ("attn_q", "ffn_up")}
    data = {}
    for name, ne in shape.items():
        n = ne[0] * (ne[1] if len(ne) > 1 else 1)
        data[name] = (ne, "F32", struct.pack(f"<{n}f", *[0.5] * n))
    return factory.gguf_file(path, data, kept)  # type: ignore[arg-type]


def test_a_gguf_as_it_is(tmp_path: Path) -> None:
    catalogue = open_model(str(gqa_gguf(tmp_path / "m.gguf")))
    w = weigh(catalogue, None, 256, "f16")
    layer = Layer(2 * 256 * 4 * 4, 0, 256 * 2 * (64 + 64) * 2)
    # without output.weight, llama.cpp loads token_embd a second time, as the output head
    assert w.layers == (layer, layer, Layer(256 * 4 + 256 * 8 * 4, 0, 0))
    assert w.input == 256 * 8 * 4
    assert experts_in_ram(w, [GIB]) is None


def test_heads_that_differ_by_layer(tmp_path: Path) -> None:
    some = kv_array("llama.attention.head_count_kv", I32, [2, 0])
    catalogue = open_model(str(gqa_gguf(tmp_path / "m.gguf", head_count_kv=some)))
    assert cache_bytes(catalogue, 256, "f16") == [256 * 2 * 128 * 2, 0]


def test_metadata_that_does_not_do(tmp_path: Path) -> None:
    def error(cache_type: str = "f16", **change: object) -> str:
        catalogue = open_model(str(gqa_gguf(tmp_path / "m.gguf", **change)))
        with pytest.raises(UnsupportedError) as e:
            cache_bytes(catalogue, 256, cache_type)
        return str(e.value)

    assert error(head_count=None) == ("m: the metadata has no llama.attention.head_count, so its KV cache is not known")
    short = kv_array("llama.attention.head_count_kv", I32, [2])
    assert error(head_count_kv=short) == "m: llama.attention.head_count_kv is [2], not a number for 2 layers"
    odd = kv("llama.attention.key_length", U32, 40)
    assert error("q8_0", key=odd) == (
        "m: a q8_0 cache has blocks of 32 values, which do not divide a head of 40; take --cache-type f16"
    )


# ---------------------------------------------------------------- against llama.cpp's assignment


def llama_cpp_places(plan: Plan, flags: tuple[str, ...], n_gpus: int) -> list[int]:
    """Bytes of tensors on each GPU, and last in RAM, for these flags, as in load_tensors of src/llama-model.cpp, single
    precision included."""

    def f32(x: float) -> float:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])

    options = dict(zip(flags[::2], flags[1::2], strict=True))
    n = plan.catalogue.n_layers
    n_gpu_layers = int(options["-ngl"])
    shares = [float(x) for x in options.get("-ts", "1").split(",")]
    sums = list(itertools.accumulate(shares))
    splits = [f32(s / sums[-1]) for s in sums]
    first = max(n + 1 - n_gpu_layers, 0)
    active = min(n_gpu_layers, n + 1)

    def device(layer: int) -> int:
        if layer < first or layer - first >= active:
            return n_gpus
        return bisect_right(splits, f32((layer - first) / active))

    pattern, _, where = options.get("-ot", "=CPU").rpartition("=")
    assert where == "CPU"
    assert "," not in pattern
    used = [0] * (n_gpus + 1)
    for t in plan.tensors:
        name, layer = t.tensor.name, t.tensor.layer
        at = n_gpus if name == "token_embd.weight" else device(n if layer is None else layer)
        if pattern and re.search(pattern, name):
            at = n_gpus
        used[at] += t.nbytes
    return used


@pytest.mark.parametrize("vram", [(24,), (48,), (80,), (80, 80), (24, 24, 24), (16, 48), (80,) * 4, (12,) * 16, (1,)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_put_there_what_was_counted(r1_plans: dict[str, Plan], name: str, vram: tuple[int, ...]) -> None:
    plan = r1_plans[name]
    w = weights_of(plan, 1024)
    cache = w.layers[0].cache
    found = answer(w, Gpus("", vram), GIB // 2, ())
    for each in (found.whole, found.split):
        if each is not None:
            *on_gpus, in_ram = llama_cpp_places(plan, each.flags, len(vram))
            layers = min(int(each.flags[1]), 62) - 1
            assert sum(each.used) - sum(on_gpus) == max(layers, 0) * cache
            assert all(0 <= u - t <= 61 * cache for u, t in zip(each.used, on_gpus, strict=True))
            assert all(u <= (v * GIB - GIB // 2 if u else u) for u, v in zip(each.used, vram, strict=True))
            assert each.ram == in_ram + (61 - max(layers, 0)) * cache
    assert found.whole.n_layers == max(int(found.whole.flags[1]) - 1, 0)


def test_one_layer_more_does_not_fit(r1_plans: dict[str, Plan]) -> None:
    w = weights_of(r1_plans["UD-IQ1_S"])
    found = answer(w, Gpus("80", (80,)), GIB, ())
    n = found.whole.n_layers
    assert found.whole.used[0] == sum(x.total for x in w.layers[61 - n :])
    assert found.whole.used[0] + w.layers[60 - n].total > 79 * GIB
    assert found.split is not None
    off = [x.experts for x in w.layers if x.experts]
    assert found.split.used[0] + min(off) > 79 * GIB


def some_weights(rng: random.Random) -> PlacedBytes:
    layers = [Layer(rng.randint(1, 4), rng.choice([0, 3, 5, 9]), rng.randint(0, 2)) for _ in range(5)]
    return PlacedBytes("m", "r", (*layers, Layer(2, 0, 0)), 1, 60)


def test_experts_are_dealt_out_as_well_as_can_be() -> None:
    rng = random.Random(3)
    for _ in range(300):
        w, room = some_weights(rng), [rng.randint(5, 25), rng.randint(5, 25)]
        best = None
        for cut in range(7):
            n = 0
            for layers, space in ((w.layers[:cut], room[0]), (w.layers[cut:], room[1])):
                left = space - sum(x.rest + x.cache for x in layers)
                experts = [x.experts for x in layers if x.experts]
                picks = [
                    k for k in range(len(experts) + 1) for c in itertools.combinations(experts, k) if sum(c) <= left
                ]
                n = n + max(picks) if picks and n >= 0 else -1
            best = max(best or 0, n) if n >= 0 else best
        found = experts_in_ram(w, room)
        has_experts = any(x.experts for x in w.layers)
        assert (None if found is None else found.n_layers) == (best if has_experts else None)


def test_whole_layers_are_as_many_as_can_be() -> None:
    rng = random.Random(4)
    for _ in range(300):
        w, room = some_weights(rng), [rng.randint(0, 25), rng.randint(0, 25)]

        def fits(n: int, w: PlacedBytes = w, room: list[int] = room) -> bool:
            last = [x.total for x in w.layers[len(w.layers) - n :]]
            return any(sum(last[:cut]) <= room[0] and sum(last[cut:]) <= room[1] for cut in range(n + 1))

        best = max(n for n in range(7) if fits(n))
        found = whole_layers(w, room)
        assert int(found.flags[1]) == best
        assert all(u <= r for u, r in zip(found.used, room, strict=True))


def test_gpus_are_filled_evenly(r1_plans: dict[str, Plan]) -> None:
    found = answer(weights_of(r1_plans["UD-IQ1_S"], 1024), Gpus("8x80", (80,) * 8), GIB, ())
    assert (found.whole.n_layers, found.whole.output) == (61, True)
    assert min(found.whole.used) > 10 * GIB
    assert max(found.whole.used) < 22 * GIB


@pytest.mark.tools
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_against_llama_cpp_itself(tools: Tools, tiny_bf16: Path, tmp_path: Path, cache_type: str) -> None:
    """Compare with what the real loader reports about its KV cache, and about the tensors that -ot moves."""
    catalogue = open_model(str(tiny_bf16))
    (tmp_path / "t.txt").write_text("some words to read " * 200)
    pattern = rf"blk\.{numbers_regex([2])}\.ffn_.*_exps\."
    command = [tools.perplexity, "-m", tiny_bf16, "-f", tmp_path / "t.txt", "-c", "64", "--chunks", "1", "-v"]
    command += ["-ctk", cache_type, "-ctv", cache_type, "-ot", f"{pattern}=CPU"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)
    log = done.stdout + done.stderr
    moved = set(re.findall(r"tensor (\S+) .* buffer type overridden to CPU", log))
    assert moved == {t.name for t in catalogue.tensors if t.role == "routed expert" and t.layer == 2}
    m = re.search(
        r"size = .*\(\s*(\d+) cells, +3 layers, +(\d+)/\d+ seqs\), K \(\w+\): +(\S+) MiB, V \(\w+\): +(\S+) MiB", log
    )
    assert m, log[-3000:]
    cells, n_seqs, k_mib, v_mib = int(m[1]), int(m[2]), float(m[3]), float(m[4])
    assert (cells, v_mib) == (256, 0.0)
    assert abs(n_seqs * sum(cache_bytes(catalogue, 64, cache_type)) / 2**20 - k_mib) <= 0.005


# ---------------------------------------------------------------- regular expressions


@given(st.sets(st.integers(0, 1100), min_size=1))
def test_numbers_regex(numbers: set[int]) -> None:
    pattern = numbers_regex(numbers)
    assert "," not in pattern
    assert {n for n in range(1200) if re.fullmatch(pattern, str(n))} == numbers


def test_numbers_regex_is_short() -> None:
    assert numbers_regex([7]) == "7"
    assert numbers_regex(range(3, 61)) == "(?:[3-9]|[1-5][0-9]|60)"
    assert numbers_regex([3, 4, 12, 14, 22, 24]) == "(?:[34]|[12][24])"


# ---------------------------------------------------------------- the command


def run(*args: str) -> str:
    done = CliRunner().invoke(fit, [*args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_fit_as_text() -> None:
    text = run("deepseek-r1", "-r", "UD-Q2_K_XL", "--layout", "kv_b", "--vram", "24,80,2x80", "--ram", "100")
    assert re.search(r"^  24  2 of 61 ", text, re.M)
    assert re.search(r"^  80  19 of 61 ", text, re.M)
    assert re.search(r"^2x80  42 of 61 ", text, re.M)
    assert text.count("note: the published guide says 32 layers there; its own rule gives 42\n") == 1
    assert (
        "24: no room for all but routed experts: with the KV cache that is 47.8 GiB; take a shorter --ctx, or a "
        in text
    )
    assert "2x80: whole layers; the other 97.0 GiB fit in RAM\n  -c 8192 -ngl 37 -ts 18,19\n" in text
    assert "24: whole layers; 227.4 GiB are left, 127.4 GiB more than RAM has: read from disk (mmap) as needed" in text


def test_fit_as_json() -> None:
    found = json.loads(
        run("deepseek-r1", "-r", "UD-IQ1_S", "--vram", "24", "--ram", "64", "--cache-type", "q8_0", "--json")
    )
    assert found["cache_bytes"] == 61 * 8192 * 576 // 32 * 34
    (answer,) = found["answers"]
    assert (answer["vram"], answer["gib"], answer["published_rule_layers"]) == ("24", [24], 7)
    assert answer["whole_layers"]["flags"][:6] == ["-c", "8192", "-ctk", "q8_0", "-ctv", "q8_0"]
    assert answer["experts_in_ram"]["fits_ram"] is False
    assert answer["experts_in_ram"]["ram"] > 64 * GIB


def test_fit_needs_a_recipe_but_for_ggufs(tmp_path: Path) -> None:
    done = CliRunner().invoke(fit, ["deepseek-r1", "--vram", "24"])
    assert done.exit_code == 2
    assert done.output.endswith("Error: deepseek-r1 is not a GGUF, so --recipe must say which types it gets\n")
    text = run(str(gqa_gguf(tmp_path / "m.gguf")), "--vram", "1", "--reserve", "0")
    assert "1: whole layers; 8.0 KiB stay in RAM\n  -c 8192 -ngl 3\n" in text
    assert "experts" not in text


def gpus(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [tuple(g) for g in GpuList().convert(text, None, None)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("24", (24,)), ("2x80", (80, 80)), ("24G", (24,)), ("24GB", (24,)), ("24 GiB", (24,)), ("80g", (80,)),
        ("2x80GB", (80, 80)), ("2 x 80 gb", (80, 80)), ("2*80", (80, 80)), ("16x8", (8,) * 16), ("024", (24,)),
        ("3090", (24,)), ("16x3090", (24,) * 16), ("4090x2", (24, 24)), ("3090 x 4", (24,) * 4), ("RTX 5090", (32,)),
        ("NVIDIA GeForce RTX 3090 Ti", (24,)), ("8xH100", (80,) * 8), ("H200x8", (141,) * 8), ("24GBx2", (24, 24)),
        ("80 GiB x 4", (80,) * 4),
        ("A100-80GB", (80,)), ("4xA100 40G", (40,) * 4), ("a100-80", (80,)), ("RTX PRO 6000 Blackwell", (96,)),
        ("24+80", (24, 80)), ("3090 + 2x80GB", (24, 80, 80)), ("8x24+8x80", (24,) * 8 + (80,) * 8),
        ("MI300X", (192,)), ("7900 XTX", (24,)), ("Tesla P40", (24,)), ("2xL40S", (48, 48)), ("4xH100-80GB", (80,) * 4),
    ],
)  # fmt: skip
def test_gpus_as_people_name_them(text: str, gib: tuple[int, ...]) -> None:
    assert [g for _, g in gpus(text)] == [gib]
    assert [g for _, g in gpus(f"{text},24GiB, 24")] == [gib, (24,), (24,)]


def test_gpus_are_shown_as_they_were_asked_for() -> None:
    assert gpus("2x80GB,16x3090,4090x2,3090+2x80GB,A100-80GB") == [
        ("2x80", (80, 80)), ("16x3090 (16x24)", (24,) * 16), ("2x4090 (2x24)", (24, 24)),
        ("3090 (24)+2x80", (24, 80, 80)), ("a100-80gb (80)", (80,)),
    ]  # fmt: skip


def test_fit_says_what_a_name_stands_for() -> None:
    text = run("deepseek-r1", "-r", "UD-IQ1_S", "--vram", "16x3090")
    assert "\n16x3090 (16x24): whole layers" in text
    assert (
        json.loads(run("deepseek-r1", "-r", "UD-IQ1_S", "--vram", "16x3090", "--json"))["answers"][0]["gib"]
        == [24] * 16
    )
    plain = run("deepseek-r1", "-r", "UD-IQ1_S", "--vram", "16x24")
    assert text.partition("whole layers;")[2] == plain.partition("whole layers;")[2].replace("16x24", "16x3090 (16x24)")


NO_VRAM = " is not VRAM in GiB such as 24, 2x80 or 24+80 for two GPUs (at most 16), or a GPU such as 3090"


@pytest.mark.parametrize(
    ("vram", "what"),
    [
        ("", "''" + NO_VRAM), ("0", "'0'" + NO_VRAM), ("17x80", "'17x80'" + NO_VRAM), ("24,", "''" + NO_VRAM),
        ("0x8", "'0x8'" + NO_VRAM), ("0x3090", "'0x3090'" + NO_VRAM), ("-24", "'-24'" + NO_VRAM),
        ("24.5", "'24.5'" + NO_VRAM), ("much", "'much'" + NO_VRAM), ("40900", "no GPU has 40,900 GiB"),
        ("24+", "'24+'" + NO_VRAM), ("+", "'+'" + NO_VRAM),
        ("9x24+8x80", "'9x24+8x80' is 17 GPUs, and 16 are the most"),
        ("24+much", "'much'" + NO_VRAM),
        ("H10", "'H10'" + NO_VRAM + " (did you mean h100?)"),
        ("2xA100", "'2xA100': A100 are sold with 40 or 80 GiB; say which, such as 2x80"),
        ("513", "'513': no GPU has 513 GiB (at most 512), nor is one known by that name"),
        ("2x24576",
         "'2x24576': no GPU has 24,576 GiB (at most 512), nor is one known by that name; as MiB it would be 2x24"),
    ],
)  # fmt: skip
def test_wrong_vram(vram: str, what: str) -> None:
    done = CliRunner().invoke(fit, ["deepseek-r1", "-r", "UD-IQ1_S", f"--vram={vram}"])
    assert done.exit_code == 2
    assert what in done.output


def test_ram_and_reserve_as_people_write_them() -> None:
    def answer(ram: str, reserve: str) -> tuple[int, list[int]]:
        options = ["--vram", "24", "--ram", ram, "--reserve", reserve, "--json"]
        found = json.loads(run("deepseek-r1", "-r", "UD-IQ1_S", *options))
        return found["ram_bytes"], found["answers"][0]["whole_layers"]["used"]

    plain = answer("64", "2")
    assert plain[0] == 64 * GIB
    assert answer("64GiB", "2 GiB") == plain
    assert answer("64GB", "2") == (64 * 10**9, plain[1])
    assert answer("64.5", "2.0")[0] == 129 * GIB // 2
    assert answer("0", "9") < plain
    done = CliRunner().invoke(fit, ["deepseek-r1", "-r", "UD-IQ1_S", "--vram", "24", "--ram", "lots"])
    assert "'lots' is not a size such as 24, 1.5, 64GiB or 64GB (G and GB are 10^9 bytes, GiB 2^30)" in done.output


def test_bars_say_what_the_bytes_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    """`fit` has a bar for each part, the longest for the largest; `plan` has one for each role, as shares of all
    bytes."""
    from quantkit.cli import cli

    cli.main(["fit", "deepseek-r1", "-r", "UD-IQ1_S", "--vram", "2x80"], standalone_mode=False)
    assert capsys.readouterr().out.splitlines()[3:8] == [
        "routed experts  120.26 GiB  ████████████████████",
        "rest of layers    9.26 GiB  █▌",
        "output head       0.71 GiB  ▏",
        "token_embd        0.49 GiB  ▏",
        "KV cache          0.54 GiB  ▏",
    ]
    cli.main(["plan", "deepseek-r1", "-r", "UD-IQ1_S"], standalone_mode=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    ends = {" ".join(row[:2]): row[-1] for row in rows if row and set(row[-1]) <= set("█▉▊▋▌▍▎▏")}
    assert ends["routed expert"] == "█████████▎"
    assert ends["attention 366"] == "▌"
