"""The command line as a user meets it: help, documentation, output forms, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import Run

from quantkit import __version__
from quantkit.base import errors
from quantkit.cli import cli
from quantkit.recipe.named import shipped

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = ROOT / "docs"


def commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in cli.commands.items():
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {sub}", c) for sub, c in command.commands.items()]
    return found


@pytest.mark.parametrize(("name", "command"), commands(), ids=[n for n, _ in commands()])
def test_help_has_a_runnable_example(name: str, command: click.Command) -> None:
    assert command.help
    assert f"quantkit {name}" in command.help


@pytest.mark.parametrize("name", cli.commands)
def test_readme_names_every_command(name: str) -> None:
    assert re.search(rf"quantkit\s{name}\b", README)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("tests/*/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_readme_opens_with_two_commands() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S)
    assert [b.splitlines()[-1] for b in blocks] == ["quantkit demo", "tests/run"]


def test_recipes_page_states_the_exact_sizes() -> None:
    from quantkit.model.families.options import Options
    from quantkit.model.open import open_model
    from quantkit.planning.plan import make_plan
    from quantkit.recipe.load import load

    catalogue = open_model("deepseek-r1", Options("kv_b"))
    page = (DOCS / "recipes.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (UD-\S+) \| [^|]+ \| ([0-9,]+) \|", page, re.M))
    assert rows.keys() == {name for name in shipped() if name.startswith("UD-")}
    for name, nbytes in rows.items():
        assert f"{make_plan(catalogue, load(name)).tensor_bytes:,}" == nbytes


def test_exit_codes_are_distinct_and_documented() -> None:

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.QuantkitError)]
    codes = [k.exit_code for k in kinds]
    assert len(set(codes)) == len(codes)
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    for kind in kinds:
        assert re.search(rf"^\| {kind.exit_code} \| \w", page, re.M), kind


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, quantkit.cli; print(sorted(m for m in ('torch', 'numpy', 'gguf', 'pydantic') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == "[]\n"


def test_planning_does_not_import_torch() -> None:
    code = (
        "import sys; from quantkit.cli import cli\n"
        "cli.main(['plan', 'deepseek-r1', '--recipe', 'UD-IQ1_S'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stderr == "[]\n"


def test_version(quantkit: Run) -> None:
    done = quantkit("--version")
    assert (done.returncode, done.stdout) == (0, f"quantkit, version {__version__}\n")


def test_wrong_usage_is_two(quantkit: Run) -> None:
    done = quantkit("plan", "deepseek-r1")
    assert done.returncode == 2
    assert done.stderr.endswith("Error: Missing option '-r' / '--recipe'.\n")


@pytest.mark.parametrize(
    "size", ["0", "-1G", "0.5", "1.0005K", "1,5G", "5P", "1.G", ".5G", "G", "GB", "5 G B", "5GG", "1.0005KB", ""]
)
def test_wrong_sizes(quantkit: Run, size: str) -> None:
    done = quantkit("plan", "deepseek-r1", "--recipe", "UD-IQ1_S", f"--split-max-size={size}")
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"{size!r} is not a size such as 50G, 1.5GB, 40GiB or 4000000 (G and GB are 10^9 bytes, GiB 2^30)\n"
    )


def test_plan_as_text(quantkit: Run) -> None:
    done = quantkit("plan", "deepseek-r1", "--recipe", "UD-IQ1_S", "--layout", "kv_b")
    assert done.returncode == 0
    assert "tensors      1025, 671,026,419,200 elements\n" in done.stdout
    assert "tensor data  140,226,135,552 bytes = 130.60 GiB = 140.23 GB, 1.67 BPW\n" in done.stdout
    assert re.search(r"^blk\.\{3-8\}\.ffn_down_exps\.weight +6 +2048x7168x256 +IQ2_XXS ", done.stdout, re.M)


def test_plan_lists_every_tensor(quantkit: Run) -> None:
    done = quantkit("plan", "deepseek-v2-lite", "--recipe", "UD-Q2_K_XL", "--layout", "kv_b", "--all")
    assert len(re.findall(r"^(blk\.\d+\.|output|token_embd)\S+ +1 ", done.stdout, re.M)) == 377


def test_plan_to_a_closed_pipe(tmp_path: Path) -> None:
    command = f"{sys.executable} -m quantkit plan deepseek-r1 --recipe UD-IQ1_S --json | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.stdout, done.stderr) == ('{\n "quantk', "")


def test_nobody_reads_standard_output(tmp_path: Path) -> None:
    """Not a word, but not success either: a build ends before it has begun, say."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "quantkit", "recipe", "list"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")


def test_inspect_checkpoint(quantkit: Run, tiny_v3: Path) -> None:
    done = quantkit("inspect", tiny_v3, "--json")
    found = json.loads(done.stdout)
    assert (found["arch"], found["layers"], len(found["tensors"])) == ("deepseek2", 3, 52)
    assert set(found["stored"]) == {"BF16", "F32", "F32 (scale)", "F8_E4M3"}
    assert {m["key"]: m["value"] for m in found["metadata"]}["tokenizer.ggml.pre"] == "'(not recognized)'"
    assert found["notes"][0].startswith("left out: ")


def test_inspect_gguf(quantkit: Run, tiny_imatrix: Path, tiny_bf16: Path) -> None:
    done = quantkit("inspect", tiny_bf16)
    assert done.returncode == 0
    assert "deepseek2.expert_count " in done.stdout
    assert re.search(r"^blk\.\{1-2\}\.ffn_up_exps\.weight +2 +256x256x4 +BF16 ", done.stdout, re.M)
    done = quantkit("inspect", tiny_imatrix)
    assert done.returncode == 5
    assert done.stderr == (f"error: {tiny_imatrix}: is an importance matrix, not a model; give it with --imatrix\n")


def test_a_demo_of_a_recipe_whose_name_is_no_files_name(quantkit: Run, tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "UD-Q2_K_XL.yaml").read_text()
    (tmp_path / "r.yaml").write_text(re.sub("^name: .*", 'name: "../a/b c"', text, flags=re.MULTILINE))
    assert quantkit("demo", "-r", "r.yaml", cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantkit-demo", "r.yaml"]
    assert (tmp_path / "quantkit-demo" / "demo-a-b-c.gguf").is_file()


def test_a_demo_without_space(tmp_path: Path) -> None:
    """As on a full disk: no file may get longer."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    code += "from quantkit.cli import main; sys.argv = ['quantkit', 'demo']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    assert done.stderr == (
        "error: quantkit-demo/DeepSeek-V3-Demo: the checkpoint cannot be written: Error while serializing: I/O error: "
        "File too large (os error 27)\n"
    )


def test_demo(quantkit: Run, tmp_path: Path) -> None:
    done = quantkit("demo", "--recipe", "UD-Q2_K_XL", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "quantkit-demo" / "demo-UD-Q2_K_XL.gguf"
    assert f"{out.relative_to(tmp_path)}  {out.stat().st_size:,} bytes\n" in done.stdout
    # again over its own, never over another's
    assert quantkit("demo", "--recipe", "UD-Q2_K_XL", cwd=tmp_path).returncode == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    done = quantkit("demo", "--dir", "mine", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        7,
        "error: mine: exists and was not made by quantkit demo; choose another place with --dir\n",
    )


def test_dry_run_writes_nothing(quantkit: Run, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    args = ["--recipe", "UD-IQ1_S", "--imatrix", tiny_imatrix, "--pre", "deepseek-v3", "--dry-run"]
    done = quantkit("build", tiny_v3, "-o", "o.gguf", *args, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith("dry run: everything was checked, nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_r1_from_all_its_headers(quantkit: Run, tmp_path: Path) -> None:
    """91,991 header entries in 163 shards, sparse."""
    import sparse_r1

    model = sparse_r1.make(tmp_path / "DeepSeek-R1")
    done = quantkit("plan", model, "--recipe", "UD-IQ1_S", "--pre", "deepseek-v3", "--layout", "kv_b", "--json")
    plan = json.loads(done.stdout)
    assert plan["totals"]["tensor_bytes"] == 140_226_135_552
    assert plan["notes"][0] == "left out: 788 tensors of the multi-token-prediction layer (MTP), as llama.cpp does"
    assert plan["metadata_complete"] is True
