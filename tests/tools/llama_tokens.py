"""The real llama_tokenize, of the library of the installed tools, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

#: answers each line: a path by what the vocabulary of that file is, and [text, add_special, parse_special] by ids
_SERVE = """
import ctypes, json, sys
class Params(ctypes.Structure):  # larger than llama_model_params
    _fields_ = [("head", ctypes.c_byte * 72), ("vocab_only", ctypes.c_bool), ("rest", ctypes.c_byte * 951)]
llama = ctypes.CDLL(sys.argv[1])
llama.llama_model_default_params.restype = Params
llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
llama.llama_model_load_from_file.restype = ctypes.c_void_p
llama.llama_model_free.argtypes = [ctypes.c_void_p]
llama.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
llama.llama_model_get_vocab.restype = ctypes.c_void_p
for name in ("add_bos", "add_eos"):
    function = getattr(llama, "llama_vocab_get_" + name)
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_bool
for name in ("bos", "eos", "n_tokens"):
    getattr(llama, "llama_vocab_" + name).argtypes = [ctypes.c_void_p]
ids_type = ctypes.POINTER(ctypes.c_int32)
llama.llama_tokenize.argtypes = [
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ids_type, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
]
llama.llama_backend_init()
params = llama.llama_model_default_params()
params.vocab_only = True
model = None

def load(path):
    global model, v
    if model:
        llama.llama_model_free(model)
    model = llama.llama_model_load_from_file(path.encode(), params)
    assert model, "the file was not loaded"
    v = llama.llama_model_get_vocab(model)
    said = {"n_tokens": llama.llama_vocab_n_tokens(v), "bos": llama.llama_vocab_bos(v), "eos": llama.llama_vocab_eos(v)}
    return said | {"add_bos": llama.llama_vocab_get_add_bos(v), "add_eos": llama.llama_vocab_get_add_eos(v)}

def tokenize(text, add_special, parse_special):
    raw = text.encode()
    room = len(raw) + 16
    ids = (ctypes.c_int32 * room)()
    n = llama.llama_tokenize(v, raw, len(raw), ids, room, add_special, parse_special)
    assert n >= 0, n
    return ids[:n]

for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(load(asked) if isinstance(asked, str) else tokenize(*asked)), flush=True)
"""


class LlamaTokens:
    """llama.cpp's vocabulary of one GGUF. Close it when done."""

    def __init__(self, quantize: Path, gguf: Path) -> None:
        library = quantize.resolve().parent / "libllama.so"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(library)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        self.says: dict[str, Any] = {}
        """n_tokens, bos, eos (-1 for none), add_bos, add_eos"""
        self.load(gguf)

    def load(self, gguf: Path) -> None:
        """Go on with another file."""
        self.says = self._ask(str(gguf))

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"llama.cpp ended with {self._process.wait()}"
        return json.loads(line)

    def __call__(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids: list[int] = self._ask([text, add_special, parse_special])
        return ids

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
