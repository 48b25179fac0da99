"""The kernel tests against a build of _native with GCC's sanitizers, which end the process at their first report.

    python tests/tools/sanitize.py [--sanitizers address undefined …] [--weights 414000] [--keep FOLDER]
                                     [-- PYTEST OPTION …]

Builds native/ with QUANTKIT_SANITIZE into a folder of its own (cmake, make, nanobind: what an install needs), puts the
package beside it, and runs the tests of kernels there, and of error feedback. First a control: freed
memory given to a kernel must be reported.
Exits 1 on a report or a failed test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = (
    "kernels/test_native_kernels.py", "kernels/test_kernels.py",
    "rounding/test_rounding.py", "rounding/test_iq.py", "rounding/test_factor.py",
)  # fmt: skip
#: what the compiler puts into an instrumented library
TRACES = {"address": b"__asan_report_", "undefined": b"__ubsan_handle_"}
#: the package beside the instrumented library, and not one that is installed to be edited
START = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
    "from quantkit import _native; assert _native.__file__.startswith(sys.argv[1]), _native.__file__; "
)
RUN_TESTS = START + "import pytest; sys.exit(pytest.main(sys.argv[2:]))"
USE_FREED = START + (
    "import ctypes, numpy; libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; "
    "at = libc.malloc(4096); x = numpy.ctypeslib.as_array((ctypes.c_float * 1024).from_address(at)); "
    "libc.free.argtypes = [ctypes.c_void_p]; libc.free(at); _native.first_nonfinite(x)"
)


def build(folder: Path, sanitizers: list[str], jobs: int) -> Path:
    """The package with an instrumented _native, in `folder`; the library."""
    where = folder / "build"
    where.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DQUANTKIT_SANITIZE={';'.join(sanitizers)}", str(REPOSITORY / "native"),
    ]  # fmt: skip
    for command in (configure, ["make", f"-j{jobs}"]):
        done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
    (made,) = where.glob("_native*.so")
    shutil.rmtree(folder / "quantkit", ignore_errors=True)
    shutil.copytree(REPOSITORY / "quantkit", folder / "quantkit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return Path(shutil.copy(made, folder / "quantkit"))


def runtimes(sanitizers: list[str]) -> str:
    """What must be loaded before an interpreter that knows nothing of sanitizers. libstdc++ too, for its exceptions."""
    names = [f"lib{short}.so" for name, short in (("address", "asan"), ("undefined", "ubsan")) if name in sanitizers]
    found = []
    for name in (*names, "libstdc++.so.6"):
        path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        found.append(str(Path(path.strip()).resolve()))
    return " ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizers", nargs="+", default=["address", "undefined", "float-cast-overflow"])
    parser.add_argument("--weights", type=int, default=414_000, help="a type in test_every_law; it has 10^7 otherwise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="build here, and leave it for the next time")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantkit-sanitize-") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        start = time.monotonic()
        library = build(folder, options.sanitizers, options.jobs)
        print(f"built with {', '.join(options.sanitizers)} in {time.monotonic() - start:.0f} s", flush=True)
        for name in TRACES.keys() & set(options.sanitizers):
            if TRACES[name] not in library.read_bytes():
                raise SystemExit(f"{library}: holds nothing of the {name} sanitizer")
        env = os.environ | {
            "LD_PRELOAD": runtimes(options.sanitizers),
            "PYTHONPATH": os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "QUANTKIT_TEST_WEIGHTS": str(options.weights),
        }

        def python(code: str, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", code, str(folder), *arguments]
            return subprocess.run(command, cwd=folder, env=env, capture_output=quiet, text=True, check=False)

        if "address" in options.sanitizers:
            control = python(USE_FREED, quiet=True)
            if control.returncode == 0 or "heap-use-after-free" not in control.stderr:
                raise SystemExit(f"the control was not reported: {control.stderr[-2000:]}")
            print("control: freed memory given to a kernel is reported", flush=True)
        start = time.monotonic()
        files = [str(REPOSITORY / "tests" / name) for name in TESTS]
        ini = ["-c", str(REPOSITORY / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
        done = python(RUN_TESTS, *ini, *files, *options.pytest)
        verdict = "clean" if done.returncode == 0 else f"NOT clean: pytest ended with {done.returncode}"
        print(f"{verdict} in {time.monotonic() - start:.0f} s")
        sys.exit(done.returncode != 0)


if __name__ == "__main__":
    main()
