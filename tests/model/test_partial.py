"""What is not whole here: shards that are missing or cut short, and what can be said of a model all the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Run
from factory import gguf_file, shard_of

from quantkit.gguf.header import I32, STRING, U16, U32, kv
from quantkit.model.families.options import Options
from quantkit.model.open import describe_stored, open_model

PRE = Options(pre="deepseek-v3")
ARCH = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]


def header_end(shard: Path) -> int:
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


GONE, SHORT = "is missing, and shapes in it are config.json's", "ends before its data"


@pytest.mark.parametrize(
    ("keep", "how"),
    [("nothing", GONE), ("some of the header", GONE), ("the header", SHORT), ("some of the data", SHORT)],
)
def test_a_checkpoint_with_a_shard_that_is_not_whole(v3: Path, keep: str, how: str) -> None:
    whole = open_model(str(v3), PRE)
    shard = shard_of(v3, "model.norm.weight")
    end = header_end(shard)
    if keep == "nothing":
        shard.unlink()
    else:
        os.truncate(shard, {"some of the header": end - 9, "the header": end, "some of the data": end + 5000}[keep])
    part = open_model(str(v3), PRE)
    assert part.source is None
    assert (part.tensors, part.kvs, part.kvs_complete) == (whole.tensors, whole.kvs, True)
    assert part.partial == f"not whole, so nothing can be built from it: shard {shard.name} of 2 {how}"
    assert part.notes[-1] == part.partial
    assert (describe_stored(part) == describe_stored(whole)) == (how == SHORT)


def test_only_the_small_files(v3: Path) -> None:
    whole = open_model(str(v3), PRE)
    for shard in v3.glob("*.safetensors"):
        shard.unlink()
    part = open_model(str(v3), PRE)
    assert (part.tensors, part.kvs) == (whole.tensors, whole.kvs)
    assert "shard model-00001-of-00002.safetensors and 1 more of 2 is missing" in part.partial


def test_what_a_header_says_is_still_checked(v3: Path, quantkit: Run) -> None:
    shard_of(v3, "model.norm.weight").unlink()
    (shard,) = v3.glob("*.safetensors")
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b"F8_E4M3", b"F8_E9M9", 1))
    done = quantkit("plan", v3, "-r", "UD-IQ1_S", "--pre", "deepseek-v3")
    assert (done.returncode, done.stdout) == (5, "")
    assert "has the unknown dtype 'F8_E9M9'" in done.stderr


def test_on_the_command_line(v3: Path, quantkit: Run, tmp_path: Path) -> None:
    shard = shard_of(v3, "model.norm.weight")
    whole = {
        args: quantkit(*args).stdout
        for args in [
            ("fit", v3, "-r", "UD-IQ1_S", "--vram", "1GB"),
            ("recipe", "diff", "Q8_0", "Q4_K_M", "--model", v3),
        ]
    }
    shard.unlink()
    note = "not whole, so nothing can be built from it: shard model-00002-of-00002.safetensors of 2 is missing"
    for args, text in whole.items():
        done = quantkit(*args)
        assert (done.returncode, done.stdout) == (0, text)
        assert done.stderr.startswith(f"note: Tiny-V3: {note}")
    plan = json.loads(quantkit("plan", v3, "-r", "UD-IQ1_S", "--pre", "deepseek-v3", "--json").stdout)
    assert any(n.startswith(note) for n in plan["notes"])
    assert note in quantkit("inspect", v3).stdout
    done = quantkit("build", v3, "-r", "Q8_0", "--pre", "deepseek-v3", "-o", tmp_path / "out.gguf")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.endswith(
        "shard model-00002-of-00002.safetensors of the 2 that model.safetensors.index.json names is missing; "
        "download it again\n"
    )
    done = quantkit("dequant", v3, tmp_path / "bf16")
    assert (done.returncode, "is missing; download it again" in done.stderr) == (4, True)
    assert not list(tmp_path.glob("out*"))


def test_a_gguf_cut_after_its_header(tmp_path: Path, quantkit: Run) -> None:
    file = gguf_file(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": ((256, 4), "F32", bytes(4096))}, ARCH)
    whole, recipe = open_model(str(file)), quantkit("recipe", "from-gguf", file)
    os.truncate(file, file.stat().st_size - 4000)
    part = open_model(str(file))
    assert (part.tensors, part.kvs, part.source) == (whole.tensors, whole.kvs, None)
    assert part.notes == ("not whole, so nothing can be built from it: the file ends before its data",)
    done = quantkit("recipe", "from-gguf", file)
    assert (done.returncode, done.stdout) == (0, recipe.stdout)
    assert "not whole" in done.stderr
    done = quantkit("build", file, "-r", "Q8_0", "-o", tmp_path / "out.gguf")
    assert done.returncode == 4
    assert "the file is truncated: get it again" in done.stderr
    assert quantkit("verify", file).returncode == 12


def test_only_the_first_shard_of_a_gguf(tmp_path: Path, quantkit: Run) -> None:
    for no in (1, 2, 3):
        keys = [*(ARCH if no == 1 else []), kv("split.no", U16, no - 1), kv("split.count", U16, 3)]
        keys.append(kv("split.tensors.count", I32, 3))
        gguf_file(tmp_path / f"m-{no:05d}-of-00003.gguf", {f"blk.0.a{no}.weight": ((4,), "F32", bytes(16))}, keys)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    part = open_model(str(tmp_path / "m-00001-of-00003.gguf"))
    note = (
        "not whole: 1 of 3 shards are here with 1 of 3 tensors; all sizes are of those only, and nothing can be built"
    )
    assert part.partial == f"{note} from it"
    assert [t.name for t in part.tensors] == ["blk.0.a1.weight"]
    assert note in quantkit("inspect", tmp_path / "m-00001-of-00003.gguf").stdout
    done = quantkit("build", tmp_path / "m-00001-of-00003.gguf", "-r", "Q8_0", "-o", tmp_path / "out.gguf")
    assert done.returncode == 4
    assert "shard 2 of 3 is missing; get it and put it beside the first" in done.stderr
