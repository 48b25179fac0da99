"""Pages of `quantkit report` for tests: what one is made of, read again as HTML, and documents of every kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "br", "img", "input", "hr"}
#: text of strangers that would run, steer a terminal, or turn the direction of writing
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "<svg/onload=window.pwned=1>",
    "' onmouseover='window.pwned=1",
    "&lt;b&gt; ]]> <!-- --> url(http://example.com/x)",
    "\x1b[31mred\x07\u202egnp.\u2066\x9b2J\x00\ud800",
    "var(--fg)",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1}",
)
SHOWN = "\\x1b[31mred\\x07\\u202egnp.\\u2066\\x9b2J\\x00\\ud800"


@dataclass
class Node:
    """An element."""

    tag: str
    attrs: dict[str, str]
    children: list[Node] = field(default_factory=list)
    text: str = ""
    """its own, and of what is in it"""

    def all(self, tag: str = "", **attrs: str) -> list[Node]:
        """Those inside of a tag with such attributes (class_: one of its classes)."""
        out = []
        for c in self.children:
            wanted = all(
                v in c.attrs.get("class", "").split() if k == "class_" else c.attrs.get(k) == v
                for k, v in attrs.items()
            )
            if (not tag or c.tag == tag) and wanted:
                out.append(c)
            out += c.all(tag, **attrs)
        return out

    def rows(self) -> list[list[str]]:
        """The cells of its table's body."""
        return [[td.text for td in tr.all("td")] for tr in self.all("tbody")[0].all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> in <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text += data


def read(path: Path) -> Node:
    """A page as a tree. Every element is closed, in its order."""
    reader = _Reader()
    reader.feed(path.read_text("utf-8"))
    reader.close()
    assert len(reader.open) == 1, reader.open[-1].tag
    return reader.root


def check_alone(page: Node) -> None:
    """The page asks nothing of anybody, and runs no script but its own."""
    scripts = [s for s in page.all("script") if s.attrs.get("type") != "application/json"]
    assert len(scripts) == 1
    assert scripts[0].attrs == {}
    for s in page.all("script", type="application/json"):
        json.loads(s.text)
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for node in page.all():
        for name, value in node.attrs.items():
            assert not name.startswith("on"), (node.tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "style"):
                assert value.startswith("#") or value == "data:,", (node.tag, name, value)
            if name.startswith("xmlns"):
                assert value in allowed
    assert not page.all("img")
    assert not page.all("iframe")
    assert not page.all("a", target="_blank")
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attrs["content"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def scored(name: str, nbytes: int, kld: float, **more: Any) -> dict[str, Any]:
    """A candidate's figures, as `quantkit eval --json` has them."""
    return {
        "name": name, "file_bytes": nbytes, "bpw": nbytes / 1e9, "ppl": 9.0, "ppl_se": 0.1, "ppl_ratio": 1.0 + kld,
        "mean_kld": kld, "mean_kld_se": kld / 10, "median_kld": kld, "kld_90": kld, "kld_95": kld, "kld_99": kld,
        "kld_999": kld, "kld_max": kld, "rms_dp": 0.1, "same_top": 1 - kld, "same_top_se": 0.01, "agree_32": None,
        "first_difference_32": None, **more,
    }  # fmt: skip


def evaluation(*candidates: dict[str, Any]) -> dict[str, Any]:
    """What `quantkit eval --json` prints."""
    return {
        "quantkit_eval": 1, "engine": "native", "reference": {"name": "R1", "ppl": 8.5, "n_tokens": 1000},
        "n_chunks": 4, "n_ctx": 512, "texts": ["wiki.txt"], "noise_kld": None, "candidates": list(candidates),
        "pairs": [],
    }  # fmt: skip


def optimized() -> dict[str, Any]:
    """What `quantkit optimize --json` prints."""
    rows = [
        {"what": what, **scored(name, nbytes, kld), "predicted": kld * 0.9, "off": 0.11}
        for what, name, nbytes, kld in (
            ("the recipe", "best", 2_000_000_000, 0.1), ("uniform", "Q2_K", 2_100_000_000, 0.3),
        )
    ]  # fmt: skip
    return {
        "quantkit_optimize": 1, "recipe": "name: best\n", "file_bytes": 2_000_000_000, "budget": 2_000_000_001,
        "bpw": 2.5, "gap": 1e-7, "exponent": 0.5, "predicted": 0.09, "fit": rows[:1], "chosen_from": [],
        "report": rows, "versus": [], "notes": ["a note"],
    }  # fmt: skip


def sensitivity(names: dict[str, list[str]]) -> dict[str, Any]:
    """What `quantkit sensitivity show --json` prints, with the errors that its file has; `names`: tensors by role."""
    groups, alphas, errors = [], [], {}
    for i, (role, tensors) in enumerate(names.items()):
        groups.append({"name": f"g{i}", "role": role, "kind": "k", "band": 0, "tensors": tensors, "n_elements": 10})
        alphas.append({
            "group": f"g{i}", "value": 0.5 + i, "low": 0.4, "high": 0.6, "beta": 0.1, "beta_low": 0.0,
            "beta_high": 0.2, "misfit": 0.1, "above_floor": i == 0,
        })  # fmt: skip
        errors.update({name: {"Q4_K": 0.004, "Q6_K": 0.0003} for name in tensors})
    shares = [{"role": role, "damage": 0.25, "nbytes": 0.5, "ratio": 0.5} for role in names]
    return {
        "quantkit_sensitivity": 1, "model": "m", "arch": "llama", "source": "", "imatrix": "", "settings": "",
        "floor": 0.0, "groups": groups, "alphas": alphas, "texts": {"d": "wiki.txt"}, "probes": [], "errors": errors,
        "shares": shares,
    }  # fmt: skip


def coverage(layers: int, experts: int, kinds: tuple[str, ...] = ("ffn_down_exps", "ffn_up_exps")) -> dict[str, Any]:
    """What `quantkit imatrix info --json` prints; expert 1 of layer 3 was never seen."""
    tensors = [
        {
            "name": f"blk.{i}.{kind}.weight", "layer": i, "kind": f"{kind}.weight", "matrices": experts, "columns": 256,
            "counts": [0 if (i, j) == (3, 1) else 50 + 10 * ((i * 7 + j * 3) % 97) for j in range(experts)],
        }
        for kind in kinds
        for i in range(3, 3 + layers)
    ]  # fmt: skip
    return {
        "file": "imatrix.gguf", "format": "gguf", "datasets": ["calib.txt"], "chunks": 10, "chunk_size": 512,
        "in_sum": False, "entries": len(tensors), "min_tokens": 100, "count_unit": "tokens", "never_seen": 1,
        "rarely_seen": 0, "tensors": tensors,
    }  # fmt: skip
