"""The toolchain: where tools are found, and an install that verifies, resumes and locks (without network)."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.base.errors import ToolError
from quantkit.base.files import file_sha256
from quantkit.cli import cli
from quantkit.cli.doctor import doctor
from quantkit.cli.toolchain import toolchain as toolchain_group
from quantkit.llama_cpp import toolchain
from quantkit.llama_cpp.install import _lock, _run, install

TOOL = "llama-quantize"


def executable(path: Path, says: str = "version: 1.2.3 (test)") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty PATH for every test except those of the real tools."""
    if request.node.get_closest_marker("tools") is None:
        monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "cache"


# Finding


def test_explicit_goes_before_path_goes_before_cache(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as e:
        toolchain.find(TOOL)
    assert str(e.value) == (
        f"llama-quantize is neither on PATH nor in {toolchain.root() / 'bin'}; "
        "to build it, run: quantkit toolchain install"
    )
    assert e.value.exit_code == 10
    cached = executable(toolchain.root() / "bin" / TOOL)
    assert toolchain.find(TOOL) == cached == toolchain.find_in_cache(TOOL)
    on_path = executable(tmp_path / "path" / TOOL)
    assert toolchain.find(TOOL) == on_path
    assert toolchain.locate(TOOL) == (on_path, "PATH")
    explicit = executable(tmp_path / "mine")
    assert toolchain.find(TOOL, explicit) == explicit
    assert toolchain.find(TOOL, str(explicit)) == explicit


def test_an_explicit_path_is_never_replaced_by_another(tmp_path: Path) -> None:
    executable(tmp_path / "path" / TOOL)
    plain = tmp_path / "plain"
    plain.write_text("")
    for path, problem in (
        (tmp_path / "none", "is not there, or no file"),
        (tmp_path, "is not there, or no file"),
        (plain, "is not executable"),
    ):
        with pytest.raises(ToolError) as e:
            toolchain.find(TOOL, path)
        assert str(e.value) == (
            f"llama-quantize: {path} {problem}; give another path or none, and run: quantkit toolchain install"
        )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("#!/bin/sh\nexit 0\n", "is none, or too old: its --help does not name --tensor-type-file"),
        ("#!/bin/sh\nexec /usr/bin/yes\n", "is none, or too old: its --help does not name --tensor-type-file"),
        ("#!/bin/sh\n/bin/cat\n", "is none, or too old: its --help does not name --tensor-type-file"),
        ("#!/nowhere/sh\n", "cannot be run: No such file or directory"),
        ("echo no program", "cannot be run: Exec format error"),
        ("\x7fELF", "cannot be run: Exec format error"),
    ],
)
def test_what_is_no_llama_quantize(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mine"
    path.write_text(text)
    path.chmod(0o755)
    with pytest.raises(ToolError) as e:
        toolchain.find_quantize(path)
    assert str(e.value) == (
        f"llama-quantize: {path} {problem}; give --llama-quantize the path of another, or run: "
        "quantkit toolchain install"
    )


@pytest.mark.tools
def test_the_real_one_is_a_llama_quantize() -> None:
    assert toolchain.find_quantize() == toolchain.find(TOOL)
    with pytest.raises(ToolError, match="imatrix is none, or too old"):
        toolchain.find_quantize(toolchain.find("llama-imatrix"))


def test_a_binary_that_no_engine_drives(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["build", "x", "-o", "y.gguf", "-r", "Q4_K_M", "--llama-quantize", "/bin/true"])
    assert done.exit_code == 2
    assert "--llama-quantize needs --engine llama-quantize" in done.stderr


def test_an_unknown_tool_is_an_error_with_a_guess() -> None:
    with pytest.raises(ToolError, match=r"'llama-quantise' .*did you mean llama-quantize\?"):
        toolchain.find("llama-quantise")


def test_cache_dir_takes_the_first_that_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert toolchain.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("QUANTKIT_CACHE")
    assert toolchain.cache_dir() == tmp_path / "xdg" / "quantkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert toolchain.cache_dir() == tmp_path / ".cache" / "quantkit"


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("version: 0.5.0-dev (build 0)", "0.5.0-dev (build 0)"),
        ("main: build = 4567 (abcdef0)", "4567 (abcdef0)"),
        ("something else", "something else"),
        ("usage: tool FILE", "unknown version"),
        ("", "unknown version"),
    ],
)
def test_version_is_one_line_whatever_a_tool_says(tmp_path: Path, says: str, version: str) -> None:
    assert toolchain.version(executable(tmp_path / "path" / TOOL, says)) == version


def test_version_of_what_cannot_run_is_unknown(tmp_path: Path) -> None:
    assert toolchain.version(tmp_path / "none") == "unknown version"


def test_nothing_is_installed_in_an_empty_cache() -> None:
    assert toolchain.ggml_library() is None
    assert not toolchain.installed()
    with pytest.raises(ToolError, match=r"run: quantkit toolchain install$"):
        toolchain.converter_command()


def test_converter_of_another_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    script = executable(toolchain.root() / "src" / "convert_hf_to_gguf.py")
    with pytest.raises(ToolError, match=r"not installed for this Python .*run: quantkit toolchain install$"):
        toolchain.converter_command()
    packages = toolchain.root() / "python" / str(sys.implementation.cache_tag)
    packages.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert toolchain.converter_command() == (
        [sys.executable, str(script)],
        {"PYTHONPATH": f"{script.parent / 'gguf-py'}:{packages}:/mine"},
    )


# Installing, with every program replaced by the files it would leave


class FakeRun:
    """Replaces install's `_run`: leaves the files that pip and cmake would, and can fail at one of them."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail_at = ""

    def __call__(self, argv: Sequence[str], log: Path, follow: Callable[[str], None] | None = None) -> int:
        what = next(w for w in ("download", "--build", "-S", "--target") if w in argv)
        if "pip" in argv and what == "--target":
            what = "packages"
        self.ran.append(what)
        if what == self.fail_at:
            log.write_text("one\nERROR: no route to host\nlast\n")
            return 1
        work = log.parent
        if what == "download":
            (work / toolchain.SDIST).write_bytes(sdist())
        elif what == "packages":
            (Path(argv[argv.index("--target") + 1]) / "transformers").mkdir(parents=True)
        elif what == "--build":
            for tool in toolchain.TOOLS:
                executable(work / "build" / "bin" / tool)
            (work / "build" / "bin" / "libggml-base.so.0").write_text("")
            (work / "build" / "bin" / "libggml-base.so").unlink(missing_ok=True)
            (work / "build" / "bin" / "libggml-base.so").symlink_to("libggml-base.so.0")
            assert follow is not None
            follow("[3/147] Building CXX object\n")
            follow("[ 50%] Building CXX object\n")
            follow("a warning [1/2]\n")
        return 0


@functools.cache  # gzip stores the time; cached, the bytes and their sha256 stay the same
def sdist() -> bytes:
    """A small sdist of the right shape, with a file that must not be unpacked."""
    buffer = io.BytesIO()
    inside = "llama_cpp_python-0.3.36/vendor/llama.cpp"
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in (
            f"{inside}/CMakeLists.txt",
            f"{inside}/LICENSE",
            f"{inside}/convert_hf_to_gguf.py",
            f"{inside}/conversion/__init__.py",
            f"{inside}/gguf-py/gguf/__init__.py",
            "llama_cpp_python-0.3.36/vendor/llama.cpp-not/file",
            "llama_cpp_python-0.3.36/setup.py",
        ):
            info = tarfile.TarInfo(name)
            info.mtime = 0
            archive.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    known = tmp_path / "known"
    known.write_bytes(sdist())
    monkeypatch.setattr("quantkit.llama_cpp.install._run", fake)
    monkeypatch.setattr(toolchain, "SDIST_SHA256", file_sha256(known))
    for name in ("c++", "cmake", "ninja"):
        executable(tmp_path / "path" / name)
    return fake


def install_pinned(force: bool = False) -> tuple[Path, list[str], list[tuple[int, int]]]:
    reports: list[str] = []
    steps: list[tuple[int, int]] = []
    path = install(reports.append, lambda done, total: steps.append((done, total)), force=force)
    return path, reports, steps


def test_install_leaves_the_tools_the_converter_and_nothing_else(run: FakeRun) -> None:
    root, reports, steps = install_pinned()
    assert root == toolchain.root()
    assert run.ran == ["download", "-S", "--build", "packages"]
    assert steps == [(3, 147), (50, 100)]
    assert reports[-1] == f"installed in {root}"
    assert toolchain.installed()
    assert [toolchain.find(tool) for tool in toolchain.TOOLS] == [root / "bin" / t for t in toolchain.TOOLS]
    library = toolchain.ggml_library()
    assert library is not None
    assert library.is_symlink()
    assert (root / "src" / "gguf-py" / "gguf" / "__init__.py").is_file()
    stamp = toolchain.stamp()
    assert stamp is not None
    assert stamp["tools"] == dict.fromkeys(toolchain.TOOLS, "1.2.3 (test)")
    assert sorted(p.name for p in root.parent.iterdir()) == [root.name, f"{root.name}.lock"]


def test_a_second_install_does_nothing_unless_forced(run: FakeRun) -> None:
    install_pinned()
    run.ran.clear()
    install_pinned()
    assert run.ran == []
    assert toolchain.installed()
    install_pinned(force=True)
    assert run.ran == ["download", "-S", "--build", "packages"]
    assert toolchain.installed()


def test_another_python_gets_only_the_packages_it_lacks(run: FakeRun) -> None:
    root, _, _ = install_pinned()
    (root / "python" / str(sys.implementation.cache_tag)).rename(root / "python" / "cpython-1")
    assert not toolchain.installed()
    run.ran.clear()
    install_pinned()
    assert run.ran == ["packages"]
    assert toolchain.installed()


def test_what_an_earlier_quantkit_built_is_used_and_added_to(run: FakeRun) -> None:
    """An older version built fewer tools: those still work, the others are requested, and `install` builds all."""
    root, _, _ = install_pinned()
    for tool in ("llama-completion", "llama-tokenize"):
        (root / "bin" / tool).unlink()
    assert not toolchain.installed()
    assert toolchain.find(TOOL) == root / "bin" / TOOL
    with pytest.raises(ToolError) as e:
        toolchain.find("llama-completion")
    assert str(e.value) == (
        f"llama-completion is neither on PATH nor in {root / 'bin'} (an earlier quantkit built what is there); to "
        "build it, run: quantkit toolchain install"
    )
    listed = CliRunner().invoke(toolchain_group, ["list"]).output
    assert listed.endswith(f"not all installed in {root}; run: quantkit toolchain install\n")
    run.ran.clear()
    _, reports, _ = install_pinned()
    assert run.ran == ["download", "-S", "--build", "packages"]
    assert reports[0] == (
        f"{root} has no llama-completion, llama-tokenize: an earlier quantkit built it, or something was deleted"
    )
    assert toolchain.installed()
    assert toolchain.missing() == []


def test_a_wrong_sdist_is_deleted_and_refused(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    got, wanted = toolchain.SDIST_SHA256, "0" * 64
    monkeypatch.setattr(toolchain, "SDIST_SHA256", wanted)
    with pytest.raises(ToolError) as e:
        install_pinned()
    assert f"{toolchain.SDIST} has the sha256 {got}, not {wanted}" in str(e.value)
    assert e.value.exit_code == 10
    assert run.ran == ["download"]
    assert not list(toolchain.cache_dir().rglob("*.tar.gz"))
    assert not toolchain.root().exists()


def test_pip_is_told_the_sha256_before_it_runs_the_sdist(run: FakeRun) -> None:
    run.fail_at = "download"
    with pytest.raises(ToolError) as e:
        install_pinned()
    assert "failed: ERROR: no route to host (the whole log is" in str(e.value)
    assert str(e.value).endswith("run again: quantkit toolchain install")
    (requirement,) = toolchain.cache_dir().rglob("requirement.txt")
    assert requirement.read_text() == f"llama-cpp-python==0.3.36 --hash=sha256:{toolchain.SDIST_SHA256}\n"


@pytest.mark.parametrize(
    ("fail_at", "rest"),
    [
        ("-S", ["-S", "--build", "packages"]),
        ("--build", ["-S", "--build", "packages"]),
        ("packages", ["-S", "--build", "packages"]),
    ],
)
def test_an_install_that_stopped_goes_on_without_downloading(run: FakeRun, fail_at: str, rest: list[str]) -> None:
    run.fail_at = fail_at
    with pytest.raises(ToolError, match="no route to host"):
        install_pinned()
    assert not toolchain.root().exists()
    run.fail_at = ""
    run.ran.clear()
    _, reports, _ = install_pinned()
    assert run.ran == rest
    assert reports[0] == f"{toolchain.SDIST} is here already"
    assert toolchain.installed()


def test_a_half_written_sdist_is_downloaded_again(run: FakeRun) -> None:
    run.fail_at = "-S"
    with pytest.raises(ToolError):
        install_pinned()
    (kept,) = toolchain.cache_dir().rglob("*.tar.gz")
    kept.write_bytes(kept.read_bytes()[:-1])
    run.fail_at = ""
    run.ran.clear()
    install_pinned()
    assert run.ran[0] == "download"


def test_a_failed_compile_shows_the_end_of_the_log(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: Sequence[str], log: Path, follow: Callable[[str], None] | None = None) -> int:
        if "--build" not in argv:
            return run(argv, log, follow)
        log.write_text("".join(f"line {i}\n" for i in range(100)))
        return 1

    monkeypatch.setattr("quantkit.llama_cpp.install._run", fail)
    with pytest.raises(ToolError) as e:
        install_pinned()
    lines = str(e.value).splitlines()
    assert lines[1:-1] == [f"line {i}" for i in range(85, 100)]
    assert "build.log" in lines[-1]


def test_no_compiler_and_no_pip_are_said_so(run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "path" / "c++").unlink()
    with pytest.raises(ToolError, match=r"needs a C\+\+ compiler, and none of c\+\+, g\+\+, clang\+\+ is on PATH"):
        install_pinned()
    executable(tmp_path / "path" / "c++")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolError, match=r"run: .* -m ensurepip$"):
        install_pinned()


def test_cmake_and_ninja_come_from_wheels_where_there_are_none(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cmake", "ninja"):
        (tmp_path / "path" / name).unlink()
    wheels: list[str] = []

    def pip(argv: Sequence[str], log: Path, follow: Callable[[str], None] | None = None) -> int:
        if argv[-1] == "off" and "--target" in argv and "--constraint" not in argv:
            target = Path(argv[argv.index("--target") + 1])
            name = target.name.removesuffix("-wheel")
            wheels.append(name)
            executable(target / ("cmake/data/bin/cmake" if name == "cmake" else "bin/ninja"))
            return 0
        return run(argv, log, follow)

    monkeypatch.setattr("quantkit.llama_cpp.install._run", pip)
    install_pinned()
    assert wheels == ["ninja", "cmake"]


def test_a_second_install_at_the_same_time_is_refused(run: FakeRun) -> None:
    lock = toolchain.root().with_name(f"{toolchain.root().name}.lock")
    lock.parent.mkdir(parents=True)
    with _lock(lock), pytest.raises(ToolError) as e:
        install_pinned()
    assert str(e.value) == (
        f"another install (process {os.getpid()}) holds {lock}; when it has ended, run again: "
        "quantkit toolchain install"
    )
    install_pinned()


def test_a_cache_that_cannot_be_written_is_an_error_of_its_own(run: FakeRun, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ToolError, match=r"cannot be installed in .*set QUANTKIT_CACHE to another folder"):
        install_pinned()


def test_run_logs_and_follows_every_line(tmp_path: Path) -> None:
    seen: list[str] = []
    script = "import sys; print('one'); sys.stdout.flush(); print('two', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "log"
    assert _run([sys.executable, "-c", script], log, seen.append) == 3
    assert seen == ["one\n", "two\n"]
    assert log.read_text() == "one\ntwo\n"


# The commands


def test_toolchain_list_json(tmp_path: Path) -> None:
    on_path = executable(tmp_path / "path" / TOOL)
    cached = executable(toolchain.root() / "bin" / "llama-imatrix")
    result = CliRunner().invoke(toolchain_group, ["list", "--json"])
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    missing = {"path": None, "origin": None, "version": None}
    assert said == {
        "root": str(toolchain.root()),
        "trouble": None,
        "installed": False,
        "tools": [
            {"name": TOOL, "path": str(on_path), "origin": "PATH", "version": "1.2.3 (test)"},
            {"name": "llama-imatrix", "path": str(cached), "origin": "cache", "version": "1.2.3 (test)"},
            {"name": "llama-gguf-split", **missing},
            {"name": "llama-perplexity", **missing},
            {"name": "llama-completion", **missing},
            {"name": "llama-tokenize", **missing},
        ],
        "converter": None,
        "ggml_library": None,
        "ggml_version": None,
    }


def test_toolchain_list_says_how_to_get_what_is_missing() -> None:
    result = CliRunner().invoke(toolchain_group, ["list"])
    assert result.exit_code == 0
    assert "llama-quantize      -        not found\n" in result.output
    assert result.output.endswith("run: quantkit toolchain install\n")


def test_toolchain_install_ends_with_each_tool_and_its_version(run: FakeRun) -> None:
    result = CliRunner().invoke(toolchain_group, ["install", "--jobs", "2"])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{tool:18} 1.2.3 (test)" for tool in toolchain.TOOLS]
    assert "compiling" in result.stderr
    run.fail_at = "download"
    failed = CliRunner().invoke(toolchain_group, ["install", "--force"])
    assert isinstance(failed.exception, ToolError)
    assert toolchain.installed()


@pytest.mark.parametrize("arguments", [["--help"], ["install", "--help"], ["list", "--help"]])
def test_help_shows_an_example(arguments: list[str]) -> None:
    output = CliRunner().invoke(toolchain_group, arguments).output
    assert "Example:\n    quantkit toolchain " in output


def test_doctor_json() -> None:
    result = CliRunner().invoke(doctor, ["--json"])
    said = json.loads(result.stdout)
    assert result.exit_code == (0 if said["ok"] else 1)
    assert said["packages"]["numpy"]
    assert set(said["cpu"]["features"]) == {"avx2", "avx512f", "f16c", "fma", "neon"}
    assert said["disk"]["here"]["free_nbytes"] > 0
    assert said["kernels"]["Q4_K"]
    assert {"severity": "warning", "fix": "quantkit toolchain install"}.items() <= said["problems"][-1].items()
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-c", "import sys, quantkit.cli.doctor as d; d.examine(); print(*sys.modules)"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.split()
    )


def test_doctor_fails_with_the_mending_command_when_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantkit.cli.doctor.REQUIRED", ("numpy", "no-such-distribution"))
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 1
    assert "error: no-such-distribution is not installed; run: pip install no-such-distribution\n" in result.output
    assert result.output.endswith("builds cannot run until the errors above are mended\n")


# A cache that cannot be used

OWN = "set QUANTKIT_CACHE to a folder of your own"


@pytest.fixture(params=["nobody's home", "a file", "too long", "a loop"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message for a cache path that is no folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    folder, what = {
        "nobody's home": ("~nobody-at-all/x", f"no home folder is known for quantkit's cache; {OWN}"),
        "a file": (tmp_path / "file", "Not a directory"),
        "too long": (tmp_path / ("x" * 256), "File name too long"),
        "a loop": (tmp_path / "loop", "Too many levels of symbolic links"),
    }[request.param]
    monkeypatch.setenv("QUANTKIT_CACHE", str(folder))
    return what if OWN in what else f"{folder}: the cache cannot be read: {what}; {OWN}"


def test_an_unusable_cache_is_said(unusable: str) -> None:
    assert toolchain.trouble() == unusable
    with pytest.raises(ToolError) as e:
        toolchain.find(TOOL)
    assert str(e.value) == f"llama-quantize is not on PATH, and the cache has none: {unusable}"
    done = CliRunner().invoke(cli, ["toolchain", "list"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, unusable)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert f"warning: {unusable}; run: export QUANTKIT_CACHE=FOLDER\n" in done.stdout
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert {"severity": "warning", "what": unusable, "fix": "export QUANTKIT_CACHE=FOLDER"} in json.loads(done.stdout)[
        "problems"
    ]
    done = CliRunner().invoke(cli, ["toolchain", "install"])
    assert isinstance(done.exception, ToolError)
    assert "set QUANTKIT_CACHE to " in str(done.exception)
    assert "free some space" not in str(done.exception)


def test_an_unusable_cache_is_none_of_the_native_engine(unusable: str, tiny_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    done = CliRunner().invoke(cli, ["build", str(tiny_v3), "-o", str(out), "-r", "Q8_0", "--pre", "deepseek-v3", "-q"])
    assert done.exit_code == 0, done.exception
    assert out.is_file()


def test_a_toolchain_of_which_a_part_has_gone_is_not_installed(cache: Path) -> None:
    base = toolchain.root()
    for tool in toolchain.TOOLS:
        executable(base / "bin" / tool)
    (base / "src").mkdir()
    for path in (base / "src" / toolchain.CONVERTER, base / "bin" / "libggml-base.so"):
        path.write_text("")
    toolchain.converter_packages(base).mkdir(parents=True)
    (base / toolchain.STAMP).write_text(json.dumps({"sha256": toolchain.SDIST_SHA256}))
    assert toolchain.installed()
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        aside = path.rename(base / "aside")
        assert not toolchain.installed(), path
        aside.rename(path)
    for text in ("", "[]", '{"sha256": 1}', "[" * 100_000):
        (base / toolchain.STAMP).write_text(text)
        assert not toolchain.whole()


# The real tools


@pytest.mark.tools
@pytest.mark.skipif(not toolchain.installed(), reason="needs: quantkit toolchain install")
def test_the_installed_tools_run() -> None:
    for tool in toolchain.TOOLS:
        path = toolchain.find_in_cache(tool)
        assert path is not None
        assert toolchain.version(path) != "unknown version"
    library = toolchain.ggml_library()
    assert library is not None
    argv, environment = toolchain.converter_command()
    ran = subprocess.run([*argv, "--help"], env=os.environ | environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "--outtype" in ran.stdout
