"""What a pass costs, counted by hand on tiny models, measured on them, and for R1."""

from __future__ import annotations

from pathlib import Path

import factory
import making
import pytest
from small_builds import NAMED, OPTIONS

from quantkit.lab.calibration.estimate import LARGE_STATE, Rates, Work, is_fp8, times_of, work_of
from quantkit.lab.calibration.inputs import covariance_bytes
from quantkit.model.open import open_model


def test_operations_of_a_tiny_v3_by_hand(tiny_v3: Path) -> None:
    c = factory.TINY_V3
    d, q, kv = c["hidden_size"], c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, value, heads = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["num_attention_heads"]
    attention = d * q + q * heads * (nope + rope) + d * (kv + rope) + heads * kv * (nope + value) + heads * value * d
    expert = 3 * d * c["moe_intermediate_size"]
    n, used = c["n_routed_experts"], c["num_experts_per_tok"]
    active = 3 * attention + 3 * d * c["intermediate_size"] + 2 * (d * n + (used + c["n_shared_experts"]) * expert)
    every = active + 2 * (n - used) * expert
    work = work_of(open_model(str(tiny_v3), OPTIONS), 640, 32)
    assert (work.n_active, work.n_parameters) == (active, every)
    assert work.flop_weights == 2 * active * 640
    # a query meets 16.5 of 32 tokens: kv + rope products for the score, kv for the mix
    assert work.flop_attention == 3 * 640 * heads * (2 * (kv + rope) + 2 * kv) * 33 // 2
    assert work.flop == work.flop_weights + work.flop_attention
    assert (work.n_experts, work.n_moe_layers, work.n_layers, work.n_chunks) == (8, 2, 3, 20)
    assert work.hidden_bytes == 2 * 4 * d * 640
    head = work_of(open_model(str(tiny_v3), OPTIONS), 640, 32, head=True)
    assert head.flop_weights - work.flop_weights == 2 * c["vocab_size"] * d * 640


def test_operations_of_a_tiny_llama_by_hand(tmp_path: Path) -> None:
    c = factory.TINY_LLAMA
    d, ffn, heads, groups = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head = d // heads
    active = c["num_hidden_layers"] * (d * head * (2 * heads + 2 * groups) + 3 * d * ffn)
    model = open_model(str(factory.dense_checkpoint(tmp_path / "Dense", c)), NAMED)
    work = work_of(model, 64, 16)
    assert (work.n_active, work.n_parameters, work.n_experts) == (active, active, 0)
    assert work.flop_attention == c["num_hidden_layers"] * 64 * heads * 4 * head * 17 // 2


def test_bytes_are_those_that_a_run_reads(tiny_v3: Path, tmp_path: Path) -> None:
    file = making.some_text(tmp_path / "text.txt")
    made = making.make(tiny_v3, file, tmp_path / "x.gguf", n_chunks=8)
    work = work_of(open_model(str(tiny_v3), OPTIONS), 8 * making.CTX, making.CTX)
    assert made.bytes_read == pytest.approx(work.bytes_read, rel=0.05)  # the text has not every token


def test_second_moments(tiny_v3: Path) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    work = work_of(model, 640, 32, covariance=True)
    assert work.covariance_bytes == covariance_bytes(model)
    c = factory.TINY_V3
    d, q, kv, heads = c["hidden_size"], c["q_lora_rank"], c["kv_lora_rank"], c["num_attention_heads"]
    nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
    layer = 2 * d * d + q * q + heads * (nope**2 + kv**2) + (heads * value) ** 2
    m, used = c["moe_intermediate_size"], c["num_experts_per_tok"]
    experts = 2 * (used + c["n_shared_experts"]) * m * m
    assert work.flop_covariance == 2 * 640 * (3 * layer + c["intermediate_size"] ** 2 + experts)
    pooled = work_of(model, 640, 32, covariance=False)
    assert pooled.flop_covariance == work.flop_covariance
    assert pooled.covariance_bytes == covariance_bytes(model, False)


def test_r1_by_its_config() -> None:
    model = open_model("deepseek-r1")
    assert is_fp8("deepseek-r1", model)
    work = work_of(model, 2**20, 512, fp8=True)
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    expert, router = 3 * 7168 * 2048, 7168 * 256
    always = 61 * attention + 3 * 3 * 7168 * 18432 + 58 * (router + expert)
    assert work.n_parameters == always + 58 * 256 * expert == 669_172_039_680
    assert work.n_active == always + 58 * 8 * expert == 35_697_917_952
    assert (work.n_experts, round(work.n_experts_used)) == (58 * 256, 58 * 256)
    assert work.bytes_read == pytest.approx(671.5e9, rel=1e-3)
    # after 32 tokens, 8 of 256 each, an expert is still unseen with a chance of (31/32)^32
    few = work_of(model, 32, 32, fp8=True)
    assert few.n_experts_used == pytest.approx(58 * 256 * (1 - (31 / 32) ** 32))
    assert few.bytes_read < 0.65 * work.bytes_read
    assert work_of(model, 2**20, 512).bytes_read == pytest.approx(2 * work.bytes_read, rel=0.01)  # as BF16


def test_times_are_counts_over_rates(tiny_v3: Path) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    work = work_of(model, 640, 32)
    slow = times_of(work, Rates(flop=work.flop / 10, disk=work.bytes_read / 2, decode=work.bytes_read / 3))
    assert (slow.computing, slow.reading) == (10, 3)
    assert slow.writing == pytest.approx(3 * work.hidden_bytes / 2 / (work.bytes_read / 2))
    assert slow.total == 10 + slow.writing
    # large hidden states are not kept after every layer
    r1: Work = work_of(open_model("deepseek-r1"), 2**20, 512, fp8=True)
    assert r1.hidden_bytes // 2 > LARGE_STATE
    fast = times_of(r1, Rates(r1.flop / 600, r1.bytes_read / 100, r1.bytes_read / 100))
    assert fast.writing == pytest.approx(2 * r1.hidden_bytes / 2 / (r1.bytes_read / 100))
