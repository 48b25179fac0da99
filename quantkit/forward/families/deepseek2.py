"""llama.cpp's arch `deepseek2`: DeepSeek-V2, V2-Lite, V3, R1 and their relatives.

Attention is absorbed as in llama.cpp's graph where the file has attn_k_b and attn_v_b: keys are the compressed
latent that all heads share, and attn_k_b meets the query. With attn_kv_b (files of early 2025) each head has keys
and values of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...base.errors import SourceError, UnsupportedError
from ...model.catalogue import Catalogue
from ..experts import Choice, Experts
from ..hparams import Hparams
from ..layer import ALL, Key, Layer, Need, State, Tensor, require
from ..ops import Router, causal_attention, linear, rms_norm, swiglu
from ..rope import read_rope


class Deepseek2:
    """See quantkit.forward.layer.Family."""

    def __init__(self, catalogue: Catalogue) -> None:
        hp = Hparams(catalogue)
        names = {t.name: t for t in catalogue.tensors}
        if "attention.temperature_scale" in hp:
            raise UnsupportedError(f"{hp.model}: attention.temperature_scale (of Mistral Large) cannot be computed")
        self.n_layers = hp.layers()
        self.n_dense = hp.int_("leading_dense_block_count", 0, least=0)
        self.n_embd = hp.int_("embedding_length")
        self.n_heads = hp.int_("attention.head_count")
        self.eps = hp.float_("attention.layer_norm_rms_epsilon", above=0)
        self.kv_lora = hp.int_("attention.kv_lora_rank")
        n_rot = hp.int_("rope.dimension_count")
        self.mla = "attention.key_length_mla" in hp
        self.key = hp.int_("attention.key_length_mla" if self.mla else "attention.key_length")
        self.value = hp.int_("attention.value_length_mla" if self.mla else "attention.value_length")
        self.nope = self.key - n_rot
        if self.nope < 1:
            raise SourceError(f"{hp.model}: keys of {self.key} values cannot have {n_rot} rotated ones")
        self.lora = 0
        if "blk.0.attn_q_a.weight" in names:
            self.lora = hp.int_("attention.q_lora_rank")
        self.rope = read_rope(hp, n_rot, neox=False)
        # the magnitude that ggml gives cosines and sines is 1; what YaRN adds to keys and queries is in the scale
        factor = 1 / self.rope.scale
        org = self.rope.attn_factor * (1 + 0.1 * math.log(factor))
        m = org * (1 + hp.float_("rope.scaling.yarn_log_multiplier", 0.0) * math.log(factor))
        self.scale = m * m / math.sqrt(self.key)
        per_head = 2 * self.key + self.value + 3 * self.kv_lora
        self.n_ff = hp.int_("feed_forward_length")
        self.widest = 4 * self.n_embd + max(self.n_heads * per_head, 3 * self.n_ff)
        self.n_experts = hp.int_("expert_count", 0, least=0)
        self.has_bias = {n for n in names if n.endswith(".exp_probs_b.bias")}
        self.has_shared = {n for n in names if n.endswith(".ffn_gate_shexp.weight")}
        if self.n_experts:
            gating = hp.int_("expert_gating_func", 1, least=0) or 1
            if gating not in (1, 2):
                raise UnsupportedError(f"{hp.model}: expert_gating_func {gating} cannot be computed; 1 and 2 can")
            self.router = Router(
                self.n_experts, hp.int_("expert_used_count"), gating == 2, hp.flag("expert_weights_norm"),
                hp.float_("expert_weights_scale", 0.0), hp.int_("expert_group_count", 1, least=0) or 1,
                hp.int_("expert_group_used_count", 1, least=0) or 1,
            )  # fmt: skip
            self.router.check(hp.model)
        if "token_embd.weight" not in names:
            require(catalogue, {"token_embd.weight": (self.n_embd,)})
        self.output = "output.weight" if "output.weight" in names else "token_embd.weight"
        self.n_vocab = names["token_embd.weight"].n_rows
        require(catalogue, self._shapes(hp))

    def _shapes(self, hp: Hparams) -> dict[str, tuple[int, ...]]:
        """The (ne) shapes of all tensors that are needed."""
        n_embd, n_ff, n_value = self.n_embd, self.n_ff, self.n_heads * self.value
        n_exp = (hp.int_("expert_feed_forward_length"), self.n_experts) if self.n_experts else (0, 0)
        n_shared = n_exp[0] * hp.int_("expert_shared_count", 0, least=0)
        of_layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (n_embd,),
            "attn_q": (n_embd, self.n_heads * self.key),
            "attn_q_a": (n_embd, self.lora),
            "attn_q_a_norm": (self.lora,),
            "attn_q_b": (self.lora, self.n_heads * self.key),
            "attn_kv_a_mqa": (n_embd, self.kv_lora + self.rope.n_rot),
            "attn_kv_a_norm": (self.kv_lora,),
            "attn_k_b": (self.nope, self.kv_lora, self.n_heads),
            "attn_v_b": (self.kv_lora, self.value, self.n_heads),
            "attn_kv_b": (self.kv_lora, self.n_heads * (self.nope + self.value)),
            "attn_output": (n_value, n_embd),
            "ffn_norm": (n_embd,),
            "ffn_gate_inp": (n_embd, self.n_experts),
            "exp_probs_b": (self.n_experts,),
        }
        for kind, n, more in (("", n_ff, ()), ("_shexp", n_shared, ()), ("_exps", n_exp[0], (self.n_experts,))):
            of_layer |= {f"ffn_{name}{kind}": (n_embd, n, *more) for name in ("gate", "up")}
            of_layer[f"ffn_down{kind}"] = (n, n_embd, *more)
        vocab = (n_embd, self.n_vocab)
        out: dict[str, tuple[int, ...]] = {"token_embd.weight": vocab, self.output: vocab}
        out["output_norm.weight"] = (n_embd,)
        for number in range(self.n_layers):
            for key in self.keys(number):
                out[key.name] = of_layer[key.name.split(".")[2]]
        return out

    # ------------------------------------------------------------ what a layer needs

    def _attention_keys(self, blk: str) -> tuple[Key, ...]:
        q = ("attn_q_a", "attn_q_a_norm", "attn_q_b") if self.lora else ("attn_q",)
        kv = ("attn_k_b", "attn_v_b") if self.mla else ("attn_kv_b",)
        names = ("attn_norm", *q, "attn_kv_a_mqa", "attn_kv_a_norm", *kv, "attn_output")
        return tuple(Key(f"{blk}{n}.weight", ALL) for n in names)

    def _is_dense(self, number: int) -> bool:
        return number < self.n_dense or not self.n_experts

    def _ffn_keys(self, number: int) -> tuple[Key, ...]:
        blk = f"blk.{number}."
        if self._is_dense(number):
            return tuple(Key(f"{blk}ffn_{n}.weight", ALL) for n in ("norm", "gate", "up", "down"))
        keys = [Key(f"{blk}ffn_norm.weight", ALL), Key(f"{blk}ffn_gate_inp.weight", ALL)]
        if f"{blk}exp_probs_b.bias" in self.has_bias:
            keys.append(Key(f"{blk}exp_probs_b.bias", ALL))
        if f"{blk}ffn_gate_shexp.weight" in self.has_shared:
            keys += [Key(f"{blk}ffn_{n}_shexp.weight", ALL) for n in ("gate", "up", "down")]
        return tuple(keys)

    def keys(self, number: int) -> tuple[Key, ...]:
        blk = f"blk.{number}."
        kinds = () if self._is_dense(number) else ("gate", "up", "down")
        experts = (Key(f"{blk}ffn_{n}_exps.weight", ALL) for n in kinds)
        return (*self._attention_keys(blk), *self._ffn_keys(number), *experts)

    # ------------------------------------------------------------ the layer

    def layer(self, number: int, state: State) -> Layer:
        blk = f"blk.{number}."
        first, ffn = self._attention_keys(blk), self._ffn_keys(number)
        w = dict(zip((k.name.removeprefix(blk) for k in first), (yield Need(first, (ffn,))), strict=True))
        for h in state.blocks():
            self._attend(blk, w, h, state)
        del w
        if self._is_dense(number):
            norm, gate, up, down = yield Need(ffn, left=(1, 2))
            for h in state.blocks():
                flat = h.view(-1, self.n_embd)
                x = rms_norm(flat, norm[0], self.eps)
                flat += self._mlp(blk, "", x, (gate, up, down), state)
            return
        need = Need(ffn, left=(self.n_experts + 1, self.n_experts + 2))
        w = dict(zip((k.name.removeprefix(blk) for k in ffn), (yield need), strict=True))
        yield from self._experts(blk, w, state)

    def _mlp(self, blk: str, kind: str, x: Tensor, w: Sequence[Tensor], state: State) -> Tensor:
        state.look((f"{blk}ffn_gate{kind}.weight", f"{blk}ffn_up{kind}.weight"), x)
        a = swiglu(linear(x, w[0]), linear(x, w[1]))
        state.look((f"{blk}ffn_down{kind}.weight",), a)
        return linear(a, w[2])

    def _experts(self, blk: str, w: dict[str, Tensor], state: State) -> Layer:
        norm, bias = w["ffn_norm.weight"][0], w.get("exp_probs_b.bias")
        shared = [w[f"ffn_{n}_shexp.weight"] for n in ("gate", "up", "down")] if "ffn_gate_shexp.weight" in w else None
        total = state.zeros((state.hidden.shape[0] * state.n_ctx, self.n_embd))
        chosen, weights, at = [], [], 0
        for h in state.blocks():
            x = rms_norm(h.view(-1, self.n_embd), norm, self.eps)
            state.look((f"{blk}ffn_gate_inp.weight",), x)
            logits = torch.nn.functional.linear(x.float(), w["ffn_gate_inp.weight"].float())
            which, how_much = self.router.choose(logits, None if bias is None else bias[0].float())
            chosen.append(which.to(torch.int32))
            weights.append(how_much)
            if shared is not None:
                total[at : at + len(x)] = self._mlp(blk, "_shexp", x, shared, state)
            at += len(x)
        del w, shared
        names = (f"{blk}ffn_gate_exps.weight", f"{blk}ffn_up_exps.weight", f"{blk}ffn_down_exps.weight")
        choice = Choice(torch.cat(chosen), torch.cat(weights))
        experts = Experts(names, self.n_experts, choice, state, norm, self.eps, total)
        for need in experts.needs():
            experts.add(need.keys[0].mat, (yield need))
        experts.finish()
        state.hidden.view(-1, self.n_embd).add_(total)

    def _attend(self, blk: str, w: dict[str, Tensor], h: Tensor, state: State) -> None:
        n_seqs, n_ctx, _ = h.shape
        n_rot = self.rope.n_rot
        flat = h.view(-1, self.n_embd)
        x = rms_norm(flat, w["attn_norm.weight"][0], self.eps)
        if self.lora:
            state.look((f"{blk}attn_q_a.weight", f"{blk}attn_kv_a_mqa.weight"), x)
            compressed = rms_norm(linear(x, w["attn_q_a.weight"]), w["attn_q_a_norm.weight"][0], self.eps)
            state.look((f"{blk}attn_q_b.weight",), compressed)
            q = linear(compressed, w["attn_q_b.weight"])
        else:
            state.look((f"{blk}attn_q.weight", f"{blk}attn_kv_a_mqa.weight"), x)
            q = linear(x, w["attn_q.weight"])
        q = q.float().view(n_seqs, n_ctx, self.n_heads, self.key)
        kv = linear(x, w["attn_kv_a_mqa.weight"]).float()
        latent = rms_norm(kv[:, : self.kv_lora], w["attn_kv_a_norm.weight"][0], self.eps)
        if "rope" not in state.tables:
            cos, sin = self.rope.tables(n_ctx)
            state.tables["rope"] = cos.to(h.device), sin.to(h.device)
        tables = state.tables["rope"]
        k_pe = self.rope.turn(kv[:, self.kv_lora :].view(n_seqs, n_ctx, 1, n_rot), tables)
        q_pe = self.rope.turn(q[..., self.nope :], tables)
        attend = self._absorbed if self.mla else self._expanded
        out = attend(blk, w, (q[..., : self.nope], q_pe), (latent, k_pe), state)
        state.look((f"{blk}attn_output.weight",), out)
        flat += linear(out, w["attn_output.weight"])

    def _absorbed(
        self, blk: str, w: dict[str, Tensor], q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], state: State
    ) -> Tensor:
        """Queries against the latent itself. attn_k_b is [heads, kv_lora, nope], attn_v_b [heads, value, kv_lora]."""
        (q_nope, q_pe), (latent, k_pe) = q, k
        n_seqs, n_ctx = q_nope.shape[:2]
        q_nope = q_nope.reshape(-1, self.n_heads, self.nope)
        state.look((f"{blk}attn_k_b.weight",), q_nope, ALL, self.n_heads)
        k_b = w["attn_k_b.weight"].view(self.n_heads, self.kv_lora, self.nope)
        absorbed = torch.einsum("thn,hkn->thk", q_nope.to(k_b.dtype), k_b).float()
        latent = latent.view(n_seqs, n_ctx, 1, self.kv_lora)
        query = torch.cat([absorbed.view(n_seqs, n_ctx, self.n_heads, self.kv_lora), q_pe], -1)
        mixed = causal_attention(query, torch.cat([latent, k_pe], -1), latent, self.scale)
        mixed = mixed.reshape(-1, self.n_heads, self.kv_lora)
        state.look((f"{blk}attn_v_b.weight",), mixed, ALL, self.n_heads)
        v_b = w["attn_v_b.weight"].view(self.n_heads, self.value, self.kv_lora)
        return torch.einsum("thk,hvk->thv", mixed.to(v_b.dtype), v_b).float().reshape(-1, self.n_heads * self.value)

    def _expanded(
        self, blk: str, w: dict[str, Tensor], q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], state: State
    ) -> Tensor:
        """Keys and values of each head, out of the latent by attn_kv_b [heads * (nope + value), kv_lora]."""
        (q_nope, q_pe), (latent, k_pe) = q, k
        n_seqs, n_ctx = q_nope.shape[:2]
        state.look((f"{blk}attn_kv_b.weight",), latent)
        kv = linear(latent, w["attn_kv_b.weight"]).float().view(n_seqs, n_ctx, self.n_heads, self.nope + self.value)
        keys = torch.cat([kv[..., : self.nope], k_pe.expand(-1, -1, self.n_heads, -1)], -1)
        out = causal_attention(torch.cat([q_nope, q_pe], -1), keys, kv[..., self.nope :], self.scale)
        return out.reshape(-1, self.n_heads * self.value)
