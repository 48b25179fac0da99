"""llama.cpp's arch `llama` without experts: Llama 1 to 3, SmolLM2, and what shares their graph."""

from __future__ import annotations

from ...base.errors import UnsupportedError
from ...model.catalogue import Catalogue
from ..hparams import Hparams
from ..layer import ALL, Key, Layer, Need, State, Tensor, require
from ..ops import causal_attention, linear, rms_norm, swiglu
from ..rope import read_rope

_FREQS = "rope_freqs.weight"


class Llama:
    """See quantkit.forward.layer.Family."""

    neox = False
    has_factors = True
    """rope_freqs.weight divides the angles"""

    def __init__(self, catalogue: Catalogue) -> None:
        hp = Hparams(catalogue)
        names = {t.name: t for t in catalogue.tensors}
        if hp.int_("expert_count", 0, least=0):
            raise UnsupportedError(f"{hp.model}: arch '{hp.arch}' with experts cannot be computed")
        self.n_layers = hp.layers()
        self.n_embd = hp.int_("embedding_length")
        self.n_ff = hp.int_("feed_forward_length")
        self.n_heads = hp.int_("attention.head_count")
        self.n_kv_heads = hp.int_("attention.head_count_kv", self.n_heads)
        self.eps = hp.float_("attention.layer_norm_rms_epsilon", above=0)
        self.head = hp.int_("attention.key_length", max(1, self.n_embd // self.n_heads))
        n_rot, n_value = hp.int_("rope.dimension_count", self.head), hp.int_("attention.value_length", self.head)
        if self.n_heads % self.n_kv_heads or {n_rot, n_value} != {self.head}:
            raise UnsupportedError(
                f"{hp.model}: {self.n_heads:,} heads on {self.n_kv_heads:,} with keys of {self.head:,} values, of "
                f"which {n_rot:,} are rotated, and values of {n_value:,} cannot be computed"
            )
        self.widest = 4 * self.n_embd + 3 * self.n_ff + 3 * self.n_heads * self.head
        self.rope = read_rope(hp, self.head, self.neox)
        self.scale = self.head**-0.5
        self._names = set(names)
        self.output = "output.weight" if "output.weight" in names else "token_embd.weight"
        if "token_embd.weight" not in names:
            require(catalogue, {"token_embd.weight": (self.n_embd,)})
        self.n_vocab = names["token_embd.weight"].n_rows
        require(catalogue, self._shapes())
        computed = {k.name for i in range(self.n_layers) for k in self.keys(i)}
        for name in names:
            if name.endswith(".bias") and name not in computed:
                raise UnsupportedError(f"{hp.model}: '{name}': a bias there cannot be computed")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The (ne) shapes of all tensors that are needed."""
        n_embd, n_q, n_kv = self.n_embd, self.n_heads * self.head, self.n_kv_heads * self.head
        rows = {"attn_q": n_q, "attn_k": n_kv, "attn_v": n_kv, "ffn_gate": self.n_ff, "ffn_up": self.n_ff}
        of_layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (n_embd, n) for name, n in rows.items()}
        of_layer |= {f"{name}.bias": (n,) for name, n in rows.items()}
        of_layer |= {"attn_output.weight": (n_q, n_embd), "ffn_down.weight": (self.n_ff, n_embd)}
        of_layer |= {"attn_norm.weight": (n_embd,), "ffn_norm.weight": (n_embd,)}
        vocab = (n_embd, self.n_vocab)
        out: dict[str, tuple[int, ...]] = {"token_embd.weight": vocab, self.output: vocab}
        out["output_norm.weight"] = (n_embd,)
        for number in range(self.n_layers):
            for key in self.keys(number):
                out[key.name] = of_layer.get(key.name.removeprefix(f"blk.{number}."), (self.head // 2,))
        return out

    def keys(self, number: int) -> tuple[Key, ...]:
        blk = f"blk.{number}."
        first = [f"{blk}attn_norm.weight"] + [f"{blk}attn_{n}.weight" for n in ("q", "k", "v", "output")]
        first += [bias for n in ("q", "k", "v") if (bias := f"{blk}attn_{n}.bias") in self._names]
        if self.has_factors and _FREQS in self._names:
            first.append(_FREQS)
        ffn = [f"{blk}ffn_{n}.weight" for n in ("norm", "gate", "up", "down")]
        return tuple(Key(n, ALL) for n in (*first, *ffn))

    def layer(self, number: int, state: State) -> Layer:
        keys = self.keys(number)
        first, ffn = keys[:-4], keys[-4:]
        blk = f"blk.{number}."
        w = dict(zip((k.name.removeprefix(blk) for k in first), (yield Need(first, (ffn,))), strict=True))
        for h in state.blocks():
            self._attend(blk, w, h, state)
        del w
        norm, gate, up, down = yield Need(ffn, left=(1, 2))
        for h in state.blocks():
            flat = h.view(-1, self.n_embd)
            x = rms_norm(flat, norm[0], self.eps)
            state.look((f"{blk}ffn_gate.weight", f"{blk}ffn_up.weight"), x)
            x = swiglu(linear(x, gate), linear(x, up))
            state.look((f"{blk}ffn_down.weight",), x)
            flat += linear(x, down)

    def _attend(self, blk: str, w: dict[str, Tensor], h: Tensor, state: State) -> None:
        n_seqs, n_ctx, _ = h.shape
        flat = h.view(-1, self.n_embd)
        x = rms_norm(flat, w["attn_norm.weight"][0], self.eps)
        state.look(tuple(f"{blk}attn_{n}.weight" for n in ("q", "k", "v")), x)

        def project(name: str, n_heads: int) -> Tensor:
            bias = w.get(f"attn_{name}.bias")
            made = linear(x, w[f"attn_{name}.weight"], None if bias is None else bias[0])
            return made.float().view(n_seqs, n_ctx, n_heads, self.head)

        q, k, v = project("q", self.n_heads), project("k", self.n_kv_heads), project("v", self.n_kv_heads)
        freqs = w.get(_FREQS)
        if "rope" not in state.tables:
            factors = None if freqs is None else freqs[0].float().cpu().numpy()
            cos, sin = self.rope.tables(n_ctx, factors)
            state.tables["rope"] = cos.to(h.device), sin.to(h.device)
        q, k = (self.rope.turn(t, state.tables["rope"]) for t in (q, k))
        out = causal_attention(q, k, v, self.scale).reshape(n_seqs * n_ctx, self.n_heads * self.head)
        state.look((f"{blk}attn_output.weight",), out)
        flat += linear(out, w["attn_output.weight"])
