"""The cache: its tensors are those that would be made, and damage to its folder costs only time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
from conftest import Run
from small_builds import OPTIONS
from stopping import SLAB, recipe

from quantkit.base.errors import OutputError
from quantkit.building import run as builds
from quantkit.building.cache import Cache
from quantkit.building.cache_folder import CacheFolder
from quantkit.building.engines.native import NativeEngine
from quantkit.imatrix.matrix import open_imatrix
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan


def build(source: Path, out: Path, cache: Cache | None, imatrix: Path, type_: str = "IQ2_XXS", **more: Any) -> bytes:
    weights = open_imatrix(str(imatrix))
    plan = make_plan(open_model(str(source), OPTIONS), recipe(type_), weights)
    ready = builds.prepare(plan, out, weights, force=True, **more)
    builds.run(ready, NativeEngine(SLAB), 2, lambda _name, _n: None, cache)
    return out.read_bytes()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30)


def again(cache: Cache) -> Cache:
    """The cache as another process opens it."""
    return Cache(cache.folder, cache.max_bytes)


@pytest.fixture(scope="module")
def n_tensors(tiny_v3: Path) -> int:
    return len(open_model(str(tiny_v3), OPTIONS).tensors)


def test_a_build_from_the_cache(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache, n_tensors: int
) -> None:
    plain = build(tiny_v3, tmp_path / "plain.gguf", None, tiny_imatrix)
    assert build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix) == plain
    assert cache.n_found == 0
    assert cache.n_kept == len(cache.entries())
    second = again(cache)
    assert build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix) == plain
    assert (second.n_found, second.n_kept, second.n_corrupt) == (n_tensors, 0, 0)


def test_another_recipe_makes_only_what_differs(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache, n_tensors: int
) -> None:
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    second = again(cache)
    got = build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix, "IQ2_XS")
    assert got == build(tiny_v3, tmp_path / "c.gguf", None, tiny_imatrix, "IQ2_XS")
    experts = sum("_exps.weight" in t.name for t in open_model(str(tiny_v3), OPTIONS).tensors)
    assert (second.n_found, second.n_kept) == (n_tensors - experts, experts)


def test_a_tensor_is_known_by_its_content(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache) -> None:
    """Not by its file's path or time: a copy of the checkpoint hits; a changed weight or scale misses."""
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    copy = Path(shutil.copytree(tiny_v3, tmp_path / "elsewhere" / "Tiny-V3"))
    second = again(cache)
    build(copy, tmp_path / "b.gguf", second, tiny_imatrix)
    assert second.n_kept == 0
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for tensor in (name, f"{name}_scale_inv"):
        shard = factory.shard_of(copy, tensor)
        flip(shard, tensor)
        third = again(cache)
        got = build(copy, tmp_path / "c.gguf", third, tiny_imatrix)
        assert third.n_kept == 1
        assert got == build(copy, tmp_path / "d.gguf", None, tiny_imatrix)


def flip(shard: Path, tensor: str) -> None:
    """Change the lowest bit of a stored tensor's first byte."""
    raw = bytearray(shard.read_bytes())
    n = int.from_bytes(raw[:8], "little")
    at = 8 + n + json.loads(raw[8 : 8 + n])[tensor]["data_offsets"][0]
    raw[at] ^= 1
    shard.write_bytes(raw)


def test_the_importance_is_in_the_key(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache) -> None:
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    catalogue = open_model(str(tiny_v3), OPTIONS)
    other = factory.imatrix_for(catalogue, tmp_path / "imatrix.gguf", seed=7)
    second = again(cache)
    got = build(tiny_v3, tmp_path / "b.gguf", second, other)
    assert got == build(tiny_v3, tmp_path / "c.gguf", None, other)
    assert second.n_kept > 0


def test_other_kernels_find_nothing(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    monkeypatch.setattr("quantkit.kernels.version", lambda: "quantkit 9.9, kernels 0")
    second = again(cache)
    build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix)
    assert second.n_found == 0


@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "empty", "trailer", "other"])
def test_a_damaged_entry_is_made_again(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache, damage: str
) -> None:
    plain = build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    paths = [path for _, _, path in cache.entries()]
    path = paths[0]
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[len(raw) // 2] ^= 1
    elif damage == "cut":
        del raw[-9:]
    elif damage == "longer":
        raw += b"x"
    elif damage == "empty":
        raw.clear()
    elif damage == "trailer":
        raw[-1] ^= 1
    else:
        raw = bytearray(next(p for p in paths if p.stat().st_size != path.stat().st_size).read_bytes())
    path.write_bytes(raw)
    second = again(cache)
    assert build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix) == plain
    assert (second.n_corrupt, second.n_kept) == (1, 1)
    third = again(cache)
    assert build(tiny_v3, tmp_path / "c.gguf", third, tiny_imatrix) == plain
    assert (third.n_corrupt, third.n_kept) == (0, 0)


def test_entries_that_changed_places_are_not_taken_for_each_other(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache
) -> None:
    plain = build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    by_size: dict[int, list[Path]] = {}
    for _, nbytes, path in cache.entries():
        by_size.setdefault(nbytes, []).append(path)
    moved = 0
    for same in by_size.values():
        contents = [path.read_bytes() for path in same]
        for path, raw in zip(same, contents[1:] + contents[:1], strict=True):
            moved += path.read_bytes() != raw
            path.write_bytes(raw)
    assert moved > 10
    second = again(cache)
    assert build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix) == plain
    assert second.n_corrupt == moved


def test_digests_of_other_tensors_are_not_believed(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache
) -> None:
    plain = build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    for path in (cache.folder / "sources").iterdir():
        said = json.loads(path.read_text())
        names, values = list(said["digests"]), list(said["digests"].values())
        said["digests"] = dict(zip(names, values[1:] + values[:1], strict=True))
        path.write_text(json.dumps(said))
    assert build(tiny_v3, tmp_path / "b.gguf", again(cache), tiny_imatrix) == plain


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"lm_head.weight": 3}', b"[" * 100_000, b"\xff"])
def test_garbage_among_the_digests(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache, garbage: bytes
) -> None:
    plain = build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    for path in (cache.folder / "sources").iterdir():
        path.write_bytes(garbage)
    second = again(cache)
    assert build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix) == plain
    assert second.n_kept == 0


def test_the_source_is_read_once_for_its_digests(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache
) -> None:
    plan = make_plan(open_model(str(tiny_v3), OPTIONS), recipe(), open_imatrix(str(tiny_imatrix)))
    names = [t.tensor.name for t in plan.tensors]
    seen: list[int] = []
    keys = cache.keys(plan, names, None, 2, lambda _name, n: seen.append(n))
    assert sum(seen) > 1_000_000
    seen.clear()
    assert again(cache).keys(plan, names, None, 2, lambda _name, n: seen.append(n)) == keys
    assert seen == []


def test_the_longest_unused_goes_first(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache) -> None:
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    entries = cache.entries()
    now = time.time()
    order = np.random.default_rng(1).permutation(len(entries))
    for age, i in enumerate(order):
        os.utime(entries[i][2], (now - age, now - age))
    keep = len(entries) // 2
    newest = {entries[i][2] for i in order[:keep]}
    cap = sum(path.stat().st_size for path in newest)
    smaller = Cache(cache.folder, cap)
    smaller.evict()
    left = {path for _, _, path in smaller.entries()}
    assert left <= newest
    assert sum(p.stat().st_size for p in left) <= cap
    # using an entry makes it the most recent
    second = again(cache)
    build(tiny_v3, tmp_path / "b.gguf", second, tiny_imatrix)
    assert second.n_found == len(left)


def test_the_size_is_kept_while_building(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 200_000)
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    assert 0 < sum(n for _, n, _ in cache.entries()) <= 200_000


def test_the_entries_are_not_listed_for_each_tensor(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    listed = []
    entries = CacheFolder.entries

    def counted(self: CacheFolder) -> list[tuple[float, int, Path]]:
        listed.append(self)
        return entries(self)

    monkeypatch.setattr(CacheFolder, "entries", counted)
    build(tiny_v3, tmp_path / "a.gguf", cache, tiny_imatrix)
    assert cache.n_kept > 50
    assert len(listed) == 2  # the first addition, and the end


def test_a_cache_that_cannot_be_written_does_not_end_the_build(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, cache: Cache
) -> None:
    shutil.rmtree(cache.folder / "tmp")  # while the cache is open
    plain = build(tiny_v3, tmp_path / "a.gguf", None, tiny_imatrix)
    assert build(tiny_v3, tmp_path / "b.gguf", cache, tiny_imatrix) == plain
    assert cache.failure == f"{cache.folder / 'tmp'}: No such file or directory"


def test_no_cache_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"/f: no cache can be made there: (Not a directory|File exists)"):
        Cache(tmp_path / "f", 1)


def test_processes_that_share_a_cache(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, quantkit: Run) -> None:
    """Several builds run at once, with a size limit that makes them evict each other's entries."""
    (tmp_path / "r.yaml").write_text(
        'name: r\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*", type: Q4_K, why: t}\n'
    )
    plain = quantkit(
        "build", tiny_v3, "-o", tmp_path / "plain.gguf", "-r", tmp_path / "r.yaml", "--pre", "deepseek-v3", "-q"
    )
    assert plain.returncode == 0, plain.stderr
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "quantkit", "build", str(tiny_v3), "-o", str(tmp_path / f"{i}.gguf"), "-q",
             "-t", "1", "-r", str(tmp_path / "r.yaml"), "--pre", "deepseek-v3", "--cache", str(tmp_path / "cache"),
             "--cache-size", "1M"],
            cwd=tempfile.gettempdir(), stderr=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    for p in started:
        assert p.communicate(timeout=300)[1] == ""
        assert p.returncode == 0
    expected = (tmp_path / "plain.gguf").read_bytes()
    assert all((tmp_path / f"{i}.gguf").read_bytes() == expected for i in range(4))
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []

    shown = quantkit("cache", "show", tmp_path / "cache", "--json")
    said = json.loads(shown.stdout)
    assert 0 < said["bytes"] <= 1_000_000
    pruned = quantkit("cache", "prune", tmp_path / "cache", "--max-size", "1")
    assert re.search(rf": {said['tensors']} tensors removed, {said['bytes']:,} bytes; 0 are left\n$", pruned.stdout)


def test_a_folder_that_is_no_cache(quantkit: Run, tmp_path: Path) -> None:
    done = quantkit("cache", "show", tmp_path)
    assert (done.returncode, done.stderr) == (7, f"error: {tmp_path}: is no folder of `quantkit build --cache`\n")
