"""Choosing a quantization for a machine: verdicts and order against quantkit fit, measured quality, published files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import factory
import pytest
from click.testing import CliRunner
from hub_server import Fault, Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.authoring.which import choice
from quantkit.authoring.which.candidates import Candidate, Kind, scaled
from quantkit.authoring.which.choice import Machine, Runs, ordered, place
from quantkit.authoring.which.quality import Quality
from quantkit.base.errors import RecipeError, SourceError
from quantkit.base.text import GIB
from quantkit.cli import cli
from quantkit.gguf.header import STRING, U32, kv
from quantkit.planning.fit import Layer, PlacedBytes
from quantkit.planning.gpus import Gpus


def run(*words: str, width: int | None = None) -> str:
    env = {"COLUMNS": str(width) if width else ""}
    done = CliRunner().invoke(cli, ["which", *words], env=env, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def answers(*words: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(run(*words, "--json"))
    return said


def runs(said: dict[str, Any]) -> dict[str, str]:
    return {c["name"]: c["runs"] for c in said["choices"]}


def fit(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["fit", *words, "--json"], catch_exceptions=False)
    said: dict[str, Any] = json.loads(done.output)
    return said


# ---------------------------------------------------------------- R1


def test_r1_on_two_80s() -> None:
    said = answers("deepseek-r1", "--vram", "2x80")
    assert said["best"] == "UD-IQ1_S"
    first = said["choices"][0]
    assert (first["runs"], first["layers_on_gpu"], first["ram_bytes"]) == ("in VRAM", 61, 521_256_960)
    assert first["quality"]["text"] == '"fair"'
    assert "unsloth.ai/blog/deepseekr1-dynamic" in first["quality"]["source"]
    assert [n for n, r in runs(said).items() if r == "in VRAM"] == ["UD-IQ1_S"]
    # the amount of RAM is unknown: the rest is ordered by what it needs
    rest = [c["ram_bytes"] for c in said["choices"][1:]]
    assert rest == sorted(rest)
    assert "less RAM first" in said["rule"]
    assert not any(name.startswith("NAIVE") for name in runs(said))


@pytest.mark.parametrize(("vram", "ram"), [("24", 64), ("24", 256), ("80", 128), ("24+80", 128), ("4x24", 1000)])
def test_every_answer_is_that_of_fit(vram: str, ram: int) -> None:
    said = answers("deepseek-r1", "--vram", vram, "--ram", str(ram))
    for c in said["choices"]:
        (there,) = fit("deepseek-r1", "-r", c["name"], "--vram", vram, "--ram", str(ram))["answers"]
        of = there["experts_in_ram" if c["only_experts_in_ram"] else "whole_layers"]
        assert (c["layers_on_gpu"], c["gpu_bytes"], c["ram_bytes"], c["flags"]) == (
            of["n_layers"], of["used"], of["ram"], of["flags"],
        )  # fmt: skip
        assert (c["runs"] == "from disk") == (not of["fits_ram"]), c["name"]
    both = [c["bpw"] for c in said["choices"] if c["runs"] == "VRAM + RAM"]
    assert both == sorted(both, reverse=True)
    disk = [c["tensor_bytes"] for c in said["choices"] if c["runs"] == "from disk"]
    assert disk == sorted(disk)
    order = ["in VRAM", "VRAM + RAM", "from disk", "does not fit"]
    places = [order.index(c["runs"]) for c in said["choices"]]
    assert places == sorted(places)


def test_only_ram_and_unified_memory() -> None:
    said = answers("deepseek-r1", "--ram", "256")
    assert said["best"] == "Q2_K_L"
    assert said["choices"][0]["flags"] == ["-c", "8192", "-ngl", "0"]
    assert runs(said)["Q3_K_M"] == "from disk"
    shared = answers("deepseek-r1", "--unified", "192", "--reserve", "8")
    assert shared["best"] == "UD-IQ2_XXS"
    first = shared["choices"][0]
    assert (first["runs"], first["layers_on_gpu"]) == ("in memory", 61)
    assert first["ram_bytes"] == first["tensor_bytes"] + shared["cache_bytes"]
    assert answers("deepseek-r1", "--unified", "192", "--reserve", "9")["best"] == "UD-IQ1_M"


def test_nothing_fits() -> None:
    said = answers("deepseek-r1", "--ram", "0.5")
    assert said["best"] is None
    assert set(runs(said).values()) == {"does not fit"}
    text = run("deepseek-r1", "--ram", "0.5")
    assert "none of them fits: even from disk the KV cache needs memory" in text


def test_a_dense_model() -> None:
    recipes = ("-r", "Q8_0", "-r", "Q4_K_M", "-r", "F16")
    said = answers("deepseek-r1-distill-qwen-7b", "--vram", "8", "--ram", "32", *recipes)
    assert list(runs(said).items()) == [("Q4_K_M", "in VRAM"), ("F16", "VRAM + RAM"), ("Q8_0", "VRAM + RAM")]
    assert {c["quality"]["text"] for c in said["choices"]} == {"not measured"}
    text = run("deepseek-r1-distill-qwen-7b", "--vram", "8", "--ram", "32", *recipes)
    for c in said["choices"][1:]:
        assert re.search(rf"^{c['name']} .* VRAM \+ RAM +{c['layers_on_gpu']} of 28 ", text, re.M)


def test_a_gguf_is_an_answer_too(tmp_path: Path) -> None:
    keys = [
        kv("general.architecture", STRING, "llama"), kv("llama.block_count", U32, 2),
        kv("llama.embedding_length", U32, 256), kv("llama.attention.head_count", U32, 4),
    ]  # fmt: skip
    shapes = {"token_embd.weight": (256, 64), "output_norm.weight": (256,)}
    shapes |= {f"blk.{i}.ffn_up.weight": (256, 512) for i in range(2)}
    tensors = {
        name: (shape, "F32", bytes(4 * shape[0] * (shape[1] if len(shape) > 1 else 1)))
        for name, shape in shapes.items()
    }
    path = factory.gguf_file(tmp_path / "m.gguf", tensors, keys)
    said = answers(str(path), "--vram", "8", "-r", "Q8_0")
    found = {c["name"]: c for c in said["choices"]}
    assert found["m.gguf"]["kind"] == "file"
    assert found["m.gguf"]["tensor_bytes"] == sum(len(data) for _, _, data in tensors.values())
    assert said["best"] == "m.gguf"


def test_what_is_wrong() -> None:
    def says(*words: str) -> str:
        done = CliRunner().invoke(cli, ["which", "deepseek-r1", *words])
        assert done.exit_code == 2
        return done.output

    assert "say what there is: --vram 24, --ram 64, both, or --unified 128" in says()
    assert "--unified is memory that CPU and GPU share" in says("--unified", "64", "--ram", "32")
    assert "the answer is for one machine; GPUs of one are joined with +: 24+80" in says("--vram", "24,80")
    with pytest.raises(RecipeError, match=r"is a qwen2, and no recipe of UD-IQ1_S is for that"):
        run("deepseek-r1-distill-qwen-7b", "--vram", "8", "-r", "UD-IQ1_S")


@pytest.mark.parametrize("machine", ["--vram 24 --ram 64", "--vram 24+80", "--ram 256", "--unified 192", "--vram 4x24"])
def test_it_fits_80_columns(machine: str) -> None:
    lines = run("deepseek-r1", *machine.split(), width=80).splitlines()
    assert max(len(line) for line in lines if " -ot " not in line and not line.startswith("  -ot")) <= 80
    assert any(line.startswith("best: UD-") or line.startswith("best: Q2") for line in lines)
    assert any(line.startswith("order: what fits wholly comes first") for line in lines)


# ---------------------------------------------------------------- order, for any sizes


def candidates() -> st.SearchStrategy[list[Candidate]]:
    sizes = st.lists(st.integers(1, 400), min_size=1, max_size=8, unique=True)

    def make(n: int, moe: bool) -> Candidate:
        layer = Layer(n * GIB // 40, n * GIB // 10 if moe else 0, GIB // 50)
        layers = (*(layer,) * 8, Layer(n * GIB // 50, 0, 0))
        total = n * GIB // 100 + sum(x.rest + x.experts for x in layers)
        weights = PlacedBytes("m", f"r{n}", layers, n * GIB // 100, total)
        return Candidate(f"r{n}", Kind.RECIPE, "", weights, n / 50)

    return st.tuples(sizes, st.booleans()).map(lambda x: [make(n, x[1]) for n in x[0]])


@settings(max_examples=60)
@given(
    candidates(), st.lists(st.integers(1, 80), max_size=3), st.one_of(st.none(), st.integers(0, 500)), st.integers(0, 4)
)
def test_order(made: list[Candidate], gib: list[int], ram: int | None, cut: int) -> None:
    if not gib and ram is None:
        ram = 1
    machine = Machine(Gpus("+".join(map(str, gib)), tuple(gib)), None if ram is None else ram * GIB)
    placed = [place(c, machine, ()) for c in made]
    found, _ = ordered(placed, machine)
    assert sorted(c.candidate.name for c in found) == sorted(c.name for c in made)
    for c in found:
        w = c.candidate.weights
        everything = w.input + sum(x.total for x in w.layers)
        assert sum(c.used) + c.ram == everything
        for on_gpu, there in zip(c.used, gib, strict=False):
            assert on_gpu <= there * GIB - machine.reserve
        if c.runs in (Runs.BOTH, Runs.RAM):
            assert ram is None or c.ram <= ram * GIB
        if c.runs == Runs.VRAM:
            assert c.ram == w.input
    # a smaller one never runs worse
    rank = [choice._RANK[c.runs] for c in sorted(placed, key=lambda c: c.candidate.weights.tensor_bytes)]
    assert rank == sorted(rank)
    # measurements do not change its class
    measured = [c._replace(quality=Quality("KLD", "me", float(i))) if i >= cut else c for i, c in enumerate(placed)]
    again, _ = ordered(measured, machine)
    assert [c.runs for c in again] == [c.runs for c in found]


def test_scaled_weights_are_as_large_as_said() -> None:
    layers = (*(Layer(10, 90, 7),) * 3, Layer(5, 0, 0))
    w = scaled(PlacedBytes("m", "r", layers, 20, 325), 650)
    assert w.layers == (*(Layer(20, 180, 7),) * 3, Layer(10, 0, 0))
    assert (w.input, w.tensor_bytes) == (40, 650)


# ---------------------------------------------------------------- measured quality


def evaluation(path: Path, **klds: float) -> Path:
    candidates = [{"name": name, "mean_kld": kld, "mean_kld_se": 0.001} for name, kld in klds.items()]
    said = {"quantkit_eval": 1, "n_chunks": 100, "texts": ["wiki.txt"], "candidates": candidates}
    path.write_text(json.dumps(said))
    return path


def test_what_was_measured_here(tmp_path: Path) -> None:
    names = ("UD-IQ1_S", "UD-IQ1_M", "Q2_K_XS")
    recipes = [word for name in names for word in ("-r", name)]
    path = evaluation(tmp_path / "e.json", **{"UD-IQ1_S": 0.5, "R1-UD-IQ1_M.gguf": 0.2, "Q2_K_XS": 0.3})
    said = answers("deepseek-r1", "--ram", "300", *recipes, "--eval", str(path))
    assert [(c["name"], c["quality"]["mean_kld"]) for c in said["choices"]] == [
        ("UD-IQ1_M", 0.2), ("Q2_K_XS", 0.3), ("UD-IQ1_S", 0.5),
    ]  # fmt: skip
    assert said["choices"][0]["quality"]["source"] == "measured: e.json, 100 chunks of wiki.txt"
    assert "where each is measured less KLD" in said["rule"]
    # one is not measured, so more bits come first
    path = evaluation(tmp_path / "f.json", **{"UD-IQ1_S": 0.5, "Q2_K_XS": 0.3})
    said = answers("deepseek-r1", "--ram", "300", *recipes, "--eval", str(path))
    assert [c["name"] for c in said["choices"]] == ["Q2_K_XS", "UD-IQ1_M", "UD-IQ1_S"]
    assert "KLD 0.3000 ± 0.0010 [1]" in run("deepseek-r1", "--ram", "300", *recipes, "--eval", str(path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"quantkit_eval": 1}', '{"quantkit_eval": 1, "n_chunks": 1, "texts": 3}']
)
def test_what_is_no_evaluation(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(SourceError, match=r"e\.json: is (not what `quantkit eval --json` prints|damaged, or not an)"):
        run("deepseek-r1", "--ram", "300", "--eval", str(tmp_path / "e.json"))
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        run("deepseek-r1", "--ram", "300", "--eval", str(tmp_path / "none.json"))


# ---------------------------------------------------------------- published files


def sparse(path: Path, nbytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        f.truncate(nbytes)


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Hub:
    """A small model's files: Q8_0 in one file, UD-IQ1_S in two shards, Q4_K_M without its second shard, another
    model's."""
    folder = tmp_path / "repo"
    sparse(folder / "R1-Q8_0.gguf", 8_000_000)
    sparse(folder / "R1-Q2_K" / "R1-Q2_K-00001-of-00002.gguf", 2_000_000)
    sparse(folder / "R1-Q2_K" / "R1-Q2_K-00002-of-00002.gguf", 900_000)
    sparse(folder / "R1-Q4_K_M" / "R1-Q4_K_M-00001-of-00002.gguf", 2_000_000)
    sparse(folder / "draft-Q6_K.gguf", 1000)
    (folder / "README.md").write_text("hello\n")
    hub.add("org/R1-GGUF", folder)
    return hub


def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(factory.TINY_V3))
    return path


def test_published_files(repository: Hub, tmp_path: Path) -> None:
    said = answers(str(config(tmp_path)), "--vram", "24", "--repo", "org/R1-GGUF")
    assert said["repository"] == "org/R1-GGUF"
    assert [(c["name"], c["kind"], c["tensor_bytes"], c["runs"]) for c in said["choices"]] == [
        ("Q8_0", "published", 8_000_000, "in VRAM"), ("Q2_K", "published", 2_900_000, "in VRAM"),
    ]  # fmt: skip
    assert said["choices"][0]["layers_like"] == "Q8_0"
    assert said["choices"][1]["files"] == ["R1-Q2_K/R1-Q2_K-00001-of-00002.gguf", "R1-Q2_K/R1-Q2_K-00002-of-00002.gguf"]
    assert [re.sub(r"[\d.]+ bits.*", "", note) for note in said["notes"]] == [
        "org/R1-GGUF: Q6_K is left out: its 1,000 bytes would be ",
        "org/R1-GGUF: Q4_K_M is left out: 1 of 2 shards is missing",
    ]
    # its list of files, but not a byte of them
    assert [entry.path for entry in repository.log if "/resolve/" in entry.path] == []
    text = run(str(config(tmp_path)), "--vram", "24", "--repo", "hf://org/R1-GGUF", width=80)
    assert re.search(r"^best: Q8_0: all of it on the GPU;\s+hf://org/R1-GGUF/R1-Q8_0\.gguf", text, re.M)
    assert "~ only the size of a published file is known" in " ".join(text.split())


def test_repositories_that_do_not_help(repository: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("hello\n")
    repository.add("org/empty", tmp_path / "empty")
    model = str(config(tmp_path))
    with pytest.raises(SourceError, match=r"hf://org/empty: has no GGUF of .*: it has no \.gguf; give another --repo"):
        run(model, "--vram", "24", "--repo", "org/empty")
    with pytest.raises(SourceError, match=r"is another model"):
        run("deepseek-r1", "--vram", "24", "--repo", "org/R1-GGUF")
    with pytest.raises(SourceError, match=r"hf://org/none"):
        run(model, "--vram", "24", "--repo", "org/none")
    with pytest.raises(SourceError, match=r"is no name of a repository|is not hf://"):
        run(model, "--vram", "24", "--repo", "what is this")


def test_a_model_on_the_hub(hub: Hub, tiny_v3: Path) -> None:
    hub.add("me/Tiny-V3", tiny_v3)
    here, there = (answers(model, "--vram", "1", "--reserve", "0") for model in (str(tiny_v3), "hf://me/Tiny-V3"))
    commit = there.pop("commit")
    assert commit == hub.repos["me/Tiny-V3"].branches["main"][-1]
    assert there["notes"].pop() == f"hf://me/Tiny-V3 was read on the Hub at commit {commit}"
    assert there == here
    assert there["best"] == "Q8_0"


def test_a_busy_hub(repository: Hub, tmp_path: Path) -> None:
    repository.fail(Fault("/api/models/*", status=503, times=2))
    assert answers(str(config(tmp_path)), "--vram", "24", "--repo", "org/R1-GGUF")["best"] == "Q8_0"


# ---------------------------------------------------------------- in the report


def test_the_report_shows_it(tmp_path: Path) -> None:
    said = run("deepseek-r1", "--vram", "24+80", "--ram", "128", "--json")
    (tmp_path / "w.json").write_text(said)
    page = tmp_path / "w.html"
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "w.json"), "-o", str(page)], catch_exceptions=False)
    assert "1 figures" in done.output
    text = page.read_text()
    assert "Which quantization of deepseek-r1, with 24+80 GiB of VRAM and 128 GiB of RAM" in text
    assert "UD-Q2_K_XL: VRAM + RAM, llama.cpp" in text
    (tmp_path / "w.json").write_text(said.replace('"bpw"', '"bits"'))
    with pytest.raises(SourceError, match="is damaged, or not a choice for a machine"):
        CliRunner().invoke(
            cli, ["report", str(tmp_path / "w.json"), "-o", str(tmp_path / "x.html")], catch_exceptions=False
        )
