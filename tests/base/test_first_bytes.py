"""Files that are not what their names say: Git LFS pointers, web pages, byte-order marks; for every reader, with whole
messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from factory import checkpoint

from quantkit.authoring.sizes.lock import read_lock
from quantkit.base.errors import ImatrixError, QuantkitError, RecipeError, SourceError
from quantkit.dequant.plan import DequantOptions, plan_dequant
from quantkit.imatrix.matrix import open_imatrix
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.model.sources.safetensors_dir import open_checkpoint
from quantkit.recipe.load import load
from quantkit.verifying import attestation, manifest
from quantkit.verifying import gguf as verify_gguf
from quantkit.verifying.against_plan import read_plan
from quantkit.verifying.verdict import Findings

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 7847602\n"
PULL = (
    "is a Git LFS pointer, not the file; the file itself has 7,847,602 bytes: in the repository's folder, run `git lfs "
    "pull`"
)
PAGE = b'<!DOCTYPE html>\n<html class="">\n<head>'
FETCH = "is a web page, not the file: download the file itself, not the page that shows it"
INSIDE = (
    "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def sentence(call: Callable[[], Any], error: type[QuantkitError]) -> str:
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error
    return str(e.value)


@pytest.mark.parametrize(("head", "says"), [(POINTER, PULL), (PAGE, FETCH)], ids=["pointer", "page"])
@pytest.mark.parametrize("name", INSIDE)
def test_in_a_checkpoint(v3: Path, name: str, head: bytes, says: str) -> None:
    (v3 / name).write_bytes(head)
    assert sentence(lambda: open_model(str(v3), Options(pre="deepseek-v3")), SourceError) == f"{v3 / name}: {says}"
    dequant = sentence(lambda: plan_dequant(open_checkpoint(v3), DequantOptions()), SourceError)
    assert dequant == f"{v3 / name}: {says}"


@pytest.mark.parametrize("spec", ["https://hawser.github.com/spec/v1", "http://git-media.io/v/2"])
def test_pointers_of_old_releases(v3: Path, spec: str) -> None:
    """The specification names both old forms; without a size, none is stated."""
    (v3 / "config.json").write_text(f"version {spec}\noid sha256:{64 * '0'}\n")
    assert sentence(lambda: open_model(str(v3)), SourceError) == (
        f"{v3 / 'config.json'}: is a Git LFS pointer, not the file: in the repository's folder, run `git lfs pull`"
    )


@pytest.mark.parametrize(("head", "says"), [(POINTER, PULL), (PAGE, FETCH)], ids=["pointer", "page"])
def test_everywhere_else(tmp_path: Path, head: bytes, says: str) -> None:
    def file(name: str) -> Path:
        (tmp_path / name).write_bytes(head)
        return tmp_path / name

    model, imatrix, dat = file("m.gguf"), file("i.gguf"), file("imatrix.dat")
    assert sentence(lambda: open_model(str(model)), SourceError) == f"{model}: {says}"
    assert sentence(lambda: verify_gguf.read(model, Findings()), SourceError) == f"{model}: {says}"
    for path in (imatrix, dat):
        assert sentence(partial(open_imatrix, str(path)), ImatrixError) == f"{path}: {says}"
    recipe, lock, config = file("r.yaml"), file("sizes.lock"), file("config.json")
    assert sentence(lambda: load(str(recipe)), RecipeError) == f"{recipe}: cannot be read: it {says}"
    assert sentence(lambda: read_lock(lock), SourceError) == f"{lock}: cannot be read: it {says}"
    assert sentence(lambda: open_model(str(config)), SourceError) == f"{config}: {says}"


@pytest.mark.parametrize(("head", "says"), [(POINTER, PULL), (PAGE, FETCH)], ids=["pointer", "page"])
@pytest.mark.parametrize("read", [read_plan, manifest.read, attestation.read])
def test_what_verify_compares_with(tmp_path: Path, read: Callable[[Path], Any], head: bytes, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(head)
    assert sentence(lambda: read(path), SourceError) == f"{path}: {says}"


def test_on_the_command_line(quantkit: Run, tmp_path: Path, v3: Path) -> None:
    pointer = tmp_path / "x.gguf"
    pointer.write_bytes(POINTER)
    shutil.copy(pointer, tmp_path / "x-00001-of-00002.gguf")
    for command, exit_code in (
        (("verify", pointer), 4),
        (("inspect", pointer), 4),
        (("merge", tmp_path / "x-00001-of-00002.gguf", tmp_path / "o.gguf"), 4),
        (("plan", v3, "-r", "UD-IQ1_S", "--pre", "deepseek-v3", "--imatrix", pointer), 6),
    ):
        done = quantkit(*command)
        assert (done.returncode, done.stdout) == (exit_code, ""), command
        assert done.stderr == f"error: {command[-1] if exit_code == 6 else command[1]}: {PULL}\n"


@pytest.mark.parametrize(
    ("mark", "encoding"), [(b"\xef\xbb\xbf", "UTF-8"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")]
)
@pytest.mark.parametrize(
    "name",
    [n for n in INSIDE if not n.endswith(".safetensors") and n not in ("added_tokens.json", "special_tokens_map.json")],
)
def test_json_with_a_byte_order_mark(v3: Path, name: str, mark: bytes, encoding: str) -> None:
    """The converter reads none of them either; the message names the file."""
    (v3 / name).write_bytes(mark + (v3 / name).read_bytes())
    assert sentence(lambda: open_model(str(v3), Options(pre="deepseek-v3")), SourceError) == (
        f"{v3 / name}: begins with the byte-order mark of {encoding}, which JSON has not; save it as UTF-8 without one"
    )


def test_a_model_card_that_begins_with_html(v3: Path) -> None:
    (v3 / "README.md").write_text("<html><img src=logo></html>\n# Model")
    assert open_model(str(v3), Options(pre="deepseek-v3")).model == "Tiny-V3"


def test_a_snapshot_is_named_by_its_repository(tmp_path: Path) -> None:
    """Hugging Face's cache: the folder is named by the commit, the files are links."""
    folder = tmp_path / "models--org--Tiny-V3-Chat" / "snapshots" / (40 * "0")
    checkpoint(folder)
    blob = tmp_path / "models--org--Tiny-V3-Chat" / "blobs" / "abc"
    blob.parent.mkdir()
    (folder / "config.json").rename(blob)
    (folder / "config.json").symlink_to("../../blobs/abc")
    plain = checkpoint(tmp_path / "Tiny-V3-Chat")
    here, there = (open_model(str(path), Options(pre="deepseek-v3")) for path in (folder, plain))
    assert (here.model, here.kvs) == ("Tiny-V3-Chat", there.kvs)
    assert open_model(str(folder / "config.json")).model == "Tiny-V3-Chat"
