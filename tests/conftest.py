"""Fixtures that several test files share. Slow things are made once a session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import factory
import hypothesis
import pytest

from quantkit.llama_cpp import toolchain
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan

if TYPE_CHECKING:
    from evil import Scene
    from faults_site import Server
    from hub_server import Hub

Run = Callable[..., "subprocess.CompletedProcess[str]"]


if "PYTEST_XDIST_WORKER" in os.environ:
    # threads of torch that wait for each other on processors that other workers use take many times as long
    os.environ.setdefault("OMP_NUM_THREADS", "1")
#: pytest-xdist's workers have it, and what a command prints to a pipe depends on it
os.environ.pop("COLUMNS", None)

# no test depends on how fast the machine is
_ANY_SPEED: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
# The same examples in every run, so that a change is judged by what it does. To look for others:
# pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("same", derandomize=True, **_ANY_SPEED)
hypothesis.settings.register_profile("explore", max_examples=1000, print_blob=True, **_ANY_SPEED)
hypothesis.settings.load_profile("same")


def pytest_configure() -> None:
    """A shell has SIGINT ignored in what it starts in the background, and what that starts has too: tests that
    interrupt would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def quantkit() -> Run:
    """Run the command line as a user does; returns the completed process."""

    def run(
        *args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quantkit", *map(str, args)]
        # not in the repository: there `quantkit` would be the source folder, without its compiled module
        where = cwd or Path(tempfile.gettempdir())
        return subprocess.run(
            command,
            cwd=where,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FP8 checkpoint; read it, do not change it."""
    return factory.checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V3")


@pytest.fixture(scope="session")
def tiny_imatrix(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix for tiny_v3, in GGUF form."""
    catalogue = open_model(str(tiny_v3), Options(pre="deepseek-v3"))
    return factory.imatrix_for(catalogue, tmp_path_factory.mktemp("imatrix") / "imatrix.gguf")


@pytest.fixture(scope="session")
def tiny_covariance(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A covariance for tiny_v3, as `quantkit imatrix make --covariance` writes them; read it, do not change it."""
    catalogue = open_model(str(tiny_v3), Options(pre="deepseek-v3"))
    return factory.covariance_for(catalogue, tmp_path_factory.mktemp("covariance") / "cov")


@pytest.fixture
def v3(tiny_v3: Path, tmp_path: Path) -> Path:
    """A copy of tiny_v3 to damage."""
    return Path(shutil.copytree(tiny_v3, tmp_path / "Tiny-V3"))


class Tools(NamedTuple):
    """The real llama.cpp tools."""

    quantize: Path
    gguf_split: Path
    perplexity: Path

    def convert(self, model: Path, out: Path, pre: str | None = "deepseek-v3") -> Path:
        """convert_hf_to_gguf.py --outtype bf16; unless `pre` is None, it is told the pre-tokenizer."""
        self.convert_all([(model, out)], pre)
        return out

    def convert_all(self, models: Sequence[tuple[Path, Path]], pre: str | None = "deepseek-v3") -> None:
        """The same for many models, each with its output, in one process: it takes long to start."""
        (python, script), env = toolchain.converter_command()
        code = (
            "import runpy, sys, pathlib\n"
            "script, pre, *paths = sys.argv[1:]\n"
            "sys.path[0] = str(pathlib.Path(script).parent)\n"
            "import conversion.base\n"
            "if pre: conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre\n"
            "for model, out in zip(paths[::2], paths[1::2]):\n"
            "    sys.argv = [script, model, '--outtype', 'bf16', '--outfile', out]\n"
            "    runpy.run_path(script, run_name='__main__')\n"
        )
        command = [python, "-c", code, script, pre or "", *(str(path) for pair in models for path in pair)]
        done = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, errors="replace", check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def tools() -> Tools:
    """The toolchain, which must be there: run `quantkit toolchain install` first."""
    return Tools(*(toolchain.find(f"llama-{t}") for t in ("quantize", "gguf-split", "perplexity")))


@pytest.fixture(scope="session")
def tiny_bf16(tools: Tools, tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 as the converter's BF16 GGUF."""
    return tools.convert(tiny_v3, tmp_path_factory.mktemp("bf16") / "tiny-bf16.gguf")


@pytest.fixture(scope="session")
def imatrix_tool(tools: Tools) -> Path:
    """llama-imatrix."""
    return toolchain.find("llama-imatrix")


@pytest.fixture(scope="session")
def real_imatrices(imatrix_tool: Path, tiny_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama-imatrix's files of tiny_v3, of chunks of 64 tokens (a, b) and of 32 (short): some experts are hardly ever
    used."""
    import imatrices

    folder = tmp_path_factory.mktemp("real")
    return {
        name: imatrices.of_random_text(imatrix_tool, tiny_bf16, folder / f"{name}.gguf", ctx, chunks)
        for name, ctx, chunks in (("a", 64, 6), ("b", 64, 4), ("short", 32, 3))
    }


@pytest.fixture(scope="session")
def sound_plan(tiny_v3: Path, tiny_imatrix: Path) -> Plan:
    """tiny_v3 as checking.MIX has it."""
    import checking
    import small_builds

    return small_builds.plan_of(tiny_v3, checking.MIX, tiny_imatrix)


@pytest.fixture(scope="session")
def sound(sound_plan: Plan, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound build of sound_plan; read it, do not change it."""
    import small_builds

    return small_builds.build(sound_plan, tmp_path_factory.mktemp("sound") / "tiny.gguf", tiny_imatrix)


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound` to damage."""
    return Path(shutil.copy(sound, tmp_path / "tiny.gguf"))


@pytest.fixture(scope="session")
def sound_set(sound_plan: Plan, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards: a folder."""
    import small_builds

    out = tmp_path_factory.mktemp("sound-set") / "tiny.gguf"
    return small_builds.build(sound_plan, out, tiny_imatrix, split=500_000).parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server on this machine that huggingface_hub takes for Hugging Face, with an empty cache and a token; children
    of this process take it too."""
    import huggingface_hub
    from hub_server import Hub
    from huggingface_hub import constants

    made = Hub(tmp_path / "hub-store")
    home = tmp_path / "hub-home"
    for name, value in made.environment(home).items():
        monkeypatch.setenv(name, value)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    now = {"ENDPOINT": made.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    now |= {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_DISABLE_XET": True}
    for name, constant in now.items():  # they were read from the environment when it was imported
        monkeypatch.setattr(constants, name, constant)
    yield made
    made.close()
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Forks the processes that commands run in."""
    from faults_site import Server

    with tempfile.TemporaryDirectory() as folder:
        made = Server(Path(folder))
        yield made
        made.close()


@pytest.fixture
def scene(server: Server) -> Iterator[Scene]:
    """A folder that all users reach, for what somebody else prepares there."""
    from evil import Scene, open_folder

    folder = open_folder()
    yield Scene(server, folder)
    shutil.rmtree(folder)
