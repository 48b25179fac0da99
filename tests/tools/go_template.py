"""Go's text/template, as far as quantkit's Modelfiles use it: texts, fields, variables, strings, if, else if, range
with an index, eq, ne, and, not, len, slice. With `go` on PATH, `by_go` is the real one."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.S)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|:=|[^\s()"]+')
_GO = """\
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content, Thinking string }

func main() {
	var in struct {
		Template string
		Data     []struct {
			System   string
			Messages []*Message
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	t := template.Must(template.New("").Option("missingkey=zero").Parse(in.Template))
	out := []string{}
	for _, d := range in.Data {
		w := new(writer)
		if err := t.Execute(w, map[string]any{"System": d.System, "Messages": d.Messages}); err != nil {
			panic(err)
		}
		out = append(out, string(*w))
	}
	json.NewEncoder(os.Stdout).Encode(out)
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
"""


def collated(messages: Sequence[Mapping[str, str]], thinking: bool) -> dict[str, Any]:
    """A conversation as Ollama gives it to a template: system messages together, neighbours of one role as one, and
    with `thinking` what precedes </think> in a field of its own."""
    out: list[dict[str, str]] = []
    for m in messages:
        thought, mark, rest = m["content"].rpartition("</think>")
        split = thinking and m["role"] == "assistant" and bool(mark)
        each = {"Role": m["role"], "Content": rest if split else m["content"], "Thinking": ""}
        if split:
            each["Thinking"] = thought.replace("<think>", "").strip()
        if out and out[-1]["Role"] == each["Role"]:
            out[-1]["Content"] += "\n\n" + each["Content"]
        else:
            out.append(each)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return {"System": system, "Messages": out}


def by_go(template: str, data: Sequence[Mapping[str, Any]], folder: Path) -> list[str] | None:
    """The texts by real Go; None where it is not installed."""
    go = shutil.which("go")
    if go is None:
        return None
    (folder / "main.go").write_text(_GO)
    asked = json.dumps({"Template": template, "Data": list(data)})
    done = subprocess.run([go, "run", "main.go"], input=asked, capture_output=True, text=True, check=True, cwd=folder)
    texts: list[str] = json.loads(done.stdout)
    return texts


def rendered(template: str, data: Mapping[str, Any]) -> str:
    """The text of a template. Raises ValueError for what is not known here."""
    pieces = _ACTION.split(template)
    nodes = [(i % 2 == 1, piece.strip() if i % 2 else piece) for i, piece in enumerate(pieces)]
    body, end, rest = _parsed(iter(nodes))
    if end or list(rest):
        raise ValueError(f"{end!r} without its beginning")
    out: list[str] = []
    _run(body, {"$": data}, data, out)
    return "".join(out)


def _parsed(nodes: Iterator[tuple[bool, str]]) -> tuple[list[Any], str, Iterator[tuple[bool, str]]]:
    """Nodes up to an end or else, and that."""
    body: list[Any] = []
    for is_action, text in nodes:
        if not is_action:
            body.append(text)
        elif text == "end" or text.startswith("else"):
            return body, text, nodes
        elif text.startswith("if "):
            body.append(_parsed_if(text[3:], nodes))
        elif text.startswith("range "):
            inner, end, _ = _parsed(nodes)
            if end != "end":
                raise ValueError(end)
            body.append(("range", text[6:], inner))
        else:
            body.append(("do", text))
    return body, "", nodes


def _parsed_if(condition: str, nodes: Iterator[tuple[bool, str]]) -> tuple[Any, ...]:
    then, end, _ = _parsed(nodes)
    otherwise: list[Any] = []
    if end.startswith("else if "):
        otherwise = [_parsed_if(end[8:], nodes)]
    elif end == "else":
        otherwise, end, _ = _parsed(nodes)
    if not (end == "end" or end.startswith("else if ")):
        raise ValueError(end)
    return ("if", condition, then, otherwise)


def _run(body: Sequence[Any], variables: dict[str, Any], dot: Any, out: list[str]) -> None:
    for node in body:
        if isinstance(node, str):
            out.append(node)
        elif node[0] == "if":
            _run(node[2] if _value(node[1], variables, dot) else node[3], dict(variables), dot, out)
        elif node[0] == "range":
            names, of = node[1].split(":=")
            index, each = (name.strip() for name in names.split(","))
            for i, item in enumerate(_value(of, variables, dot)):
                _run(node[2], {**variables, index: i, each: item}, item, out)
        elif ":=" in node[1]:
            name, of = node[1].split(":=")
            variables[name.strip()] = _value(of, variables, dot)
        else:
            out.append(str(_value(node[1], variables, dot)))


def _value(text: str, variables: Mapping[str, Any], dot: Any) -> Any:
    words = _WORD.findall(text)
    value = _expression(words, variables, dot)
    if words:
        raise ValueError(text)
    return value


def _expression(words: list[str], variables: Mapping[str, Any], dot: Any) -> Any:
    """A call or a value, up to a closing parenthesis or the end."""
    first = words[0]
    calls: dict[str, Callable[..., Any]] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda a, b: a and b, "not": lambda a: not a,
        "len": len, "slice": lambda a, i: a[i:],
    }  # fmt: skip
    if first not in calls:
        return _term(words, variables, dot)
    words.pop(0)
    given = []
    while words and words[0] != ")":
        given.append(_term(words, variables, dot))
    return calls[first](*given)


def _term(words: list[str], variables: Mapping[str, Any], dot: Any) -> Any:
    word = words.pop(0)
    if word == "(":
        value = _expression(words, variables, dot)
        words.pop(0)
        return value
    if word.startswith('"'):
        return ast.literal_eval(word)
    if word.isdecimal():
        return int(word)
    name, _, field = word.partition(".")
    if name not in variables and name:
        raise ValueError(word)
    value = variables[name] if name else dot
    return value[field] if field else value
