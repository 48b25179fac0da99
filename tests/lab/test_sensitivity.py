"""Probes of a small model held against what changing its weights really does; files, merging, going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from random_tokens import Tokens

import quantkit as qk
from quantkit import kernels
from quantkit.base.errors import ResumeError, SourceError, UnsupportedError
from quantkit.forward.model import Model, Quantized
from quantkit.forward.stream import Options as Forward
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.lab.allocation.damage import FLOOR, Probe, Sensitivity, merge, read_sensitivity
from quantkit.lab.allocation.damage_report import sensitivity_text, shares
from quantkit.lab.allocation.groups import computed_tensors, groups_of
from quantkit.lab.allocation.sensitivity import ProbeOptions, sensitivity
from quantkit.lab.allocation.weight_errors import Noise, weight_errors
from quantkit.lab.evaluation.evaluate import score_tokens
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options
from quantkit.model.open import open_model

OPTS = ProbeOptions("role", 1, ("IQ2_XXS", "Q4_K"), types=("IQ2_XXS", "Q4_K", "Q8_0"), forward=Forward(n_threads=1))


def tokens(seed: int, n: int = 3) -> Tokens:
    return Tokens(np.random.default_rng(seed).integers(0, 384, (n, 32)).astype(np.int32))


@pytest.fixture(scope="module")
def model(tiny_v3: Path) -> Catalogue:
    return open_model(str(tiny_v3), Options(pre="deepseek-v3"))


@pytest.fixture(scope="module")
def imatrix(tiny_imatrix: Path) -> Imatrix:
    return open_imatrix(str(tiny_imatrix))


@pytest.fixture(scope="module")
def measured(model: Catalogue, imatrix: Imatrix) -> Sensitivity:
    return sensitivity(model, tokens(1), imatrix, None, OPTS)


# ---------------------------------------------------------------- groups


def test_every_quantizable_tensor_is_in_one_group(model: Catalogue) -> None:
    wanted = sorted(t.name for t in model.tensors if t.quantizable)
    for by in ("role", "kind", "family", "tensor"):
        for bands in (1, 2, 9):
            groups = groups_of(model, by, bands)
            assert sorted(n for g in groups for n in g.tensors) == wanted
            assert len({g.name for g in groups}) == len(groups)
    assert set(wanted) <= computed_tensors(model)


def test_groups_are_named_by_what_they_do_and_their_layers(model: Catalogue) -> None:
    assert [g.name for g in groups_of(model, "role", 2)] == [
        "output", "embedding", "attention[0-1]", "attention[2]", "dense_ffn[0]", "routed_expert[1]",
        "routed_expert[2]", "shared_expert[1]", "shared_expert[2]",
    ]  # fmt: skip
    kinds = {g.kind: g for g in groups_of(model, "kind", 1)}
    assert kinds["attn_q"].tensors[:2] == ("blk.0.attn_q_a.weight", "blk.0.attn_q_b.weight")
    assert kinds["ffn_gate_up_exps"].tensors[:2] == ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    assert kinds["ffn_down_shexp"].name == "ffn_down_shexp[1-2]"
    with pytest.raises(UnsupportedError) as e:
        groups_of(model, "layers")
    assert str(e.value) == "groups by 'layers' are not known; there are role, kind, family, tensor"


# ---------------------------------------------------------------- errors of weights


def test_errors_of_sampled_rows_are_those_of_all_rows_where_all_are_sampled(model: Catalogue, imatrix: Imatrix) -> None:
    """A tensor of 64 rows: ggml's own bytes of all of it, weighted by the imatrix."""
    reference = Model(model)
    (t,) = (t for t in model.tensors if t.name == "blk.1.attn_q_a.weight")
    found = weight_errors(reference, [t], ["Q4_K", "IQ2_XXS", "Q8_0"], imatrix, seed=3)[t.name]
    assert list(found) == ["Q4_K", "IQ2_XXS", "Q8_0"]
    assert found["IQ2_XXS"] > 5 * found["Q4_K"] > 50 * found["Q8_0"] > 0
    rows = reference.weights.rows(t.name, np.arange(t.n_rows))
    w = imatrix.weights(t.name, 0, t.n_cols)
    made = kernels.dequantize(kernels.quantize(rows, "Q4_K", w), "Q4_K", t.n_cols)
    whole = (w * (rows - made).astype(np.float64) ** 2).sum() / (w * rows.astype(np.float64) ** 2).sum()
    assert found["Q4_K"] == pytest.approx(whole, rel=0.1)
    assert weight_errors(reference, [t], ["Q4_K"], imatrix, seed=3)[t.name]["Q4_K"] == found["Q4_K"]
    assert weight_errors(reference, [t], ["Q4_K"], imatrix, seed=4)[t.name]["Q4_K"] != found["Q4_K"]


def test_noise_has_its_size_and_is_the_same_for_the_same_seed(model: Catalogue) -> None:
    t = model.tensors[0]
    rows = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    one = Noise(frozenset({t.name}), 0.04, 1)
    made = one.apply(t, 0, rows)
    assert ((made - rows) ** 2).sum() / (rows**2).sum() == pytest.approx(0.04, rel=0.02)
    assert (made == one.apply(t, 0, rows)).all()
    assert (made != Noise(frozenset({t.name}), 0.04, 2).apply(t, 0, rows)).any()
    assert (made != one.apply(t, 1, rows)).any()
    assert one.key("another") is None


# ---------------------------------------------------------------- probes


def test_a_probe_is_the_kld_of_the_model_with_only_that_group_changed(
    model: Catalogue, imatrix: Imatrix, measured: Sensitivity
) -> None:
    (probe,) = (p for p in measured.probes if p.group == "shared_expert[1-2]" and p.change == "Q4_K")
    names = measured.by_name[probe.group].tensors
    reference = Model(model)
    alone = reference.variant("alone", Quantized(dict.fromkeys(names, "Q4_K"), imatrix))
    tokens_of = score_tokens(reference, [alone], tokens(1), Forward(n_threads=1), lambda *_: None)
    assert probe.by_chunk == pytest.approx(tokens_of[1].kld.mean(-1).tolist(), rel=1e-6)
    errors = [(measured.errors[n]["Q4_K"], measured.sizes[n]) for n in names]
    assert probe.error == pytest.approx(sum(e * n for e, n in errors) / sum(n for _, n in errors))


def test_every_group_is_probed_and_fewer_bits_cost_more(measured: Sensitivity) -> None:
    assert measured.probed == {g.name for g in measured.groups}
    for g in measured.groups:
        klds = {p.change: p.kld for p in measured.probes if p.group == g.name}
        low = "IQ2_XXS" if "IQ2_XXS" in klds else "Q2_K"
        assert set(klds) == {low, "Q4_K"}
        assert klds[low] > klds["Q4_K"] > 0
        a = measured.alpha(g.name)
        assert a.low <= a.value <= a.high
        assert a.beta_low <= a.beta <= a.beta_high
    assert 0 < measured.floor < min(p.kld for p in measured.probes if p.change == "IQ2_XXS")


def test_types_that_need_importance_are_not_probed_without(measured: Sensitivity) -> None:
    """The imatrix has nothing for output and token_embd."""
    for name in ("output", "embedding"):
        assert {p.change for p in measured.probes if p.group == name} == {"Q2_K", "Q4_K"}
    assert set(measured.errors["output.weight"]) == {"Q2_K", "Q4_K", "Q8_0"}


def test_the_number_of_probes_in_a_pass_changes_nothing(
    model: Catalogue, imatrix: Imatrix, measured: Sensitivity
) -> None:
    other = sensitivity(model, tokens(1), imatrix, None, replace(OPTS, per_pass=2))
    klds = [{(p.group, p.change): p.by_chunk for p in s.probes} for s in (measured, other)]
    assert klds[0] == klds[1]


def test_a_run_goes_on_where_it_was(model: Catalogue, imatrix: Imatrix, measured: Sensitivity, tmp_path: Path) -> None:
    """Stopped after two passes; the same call does the rest, and comes to the same."""
    out = tmp_path / "s.json"
    seen: list[str] = []

    def stop(stage: str, n_done: int, n_total: int) -> None:
        seen.append(stage)
        if stage.startswith("pass 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, tokens(1), imatrix, out, replace(OPTS, per_pass=2), stop)
    some = read_sensitivity(out)
    assert len(some.probes) == 4
    stages: set[str] = set()
    done = sensitivity(model, tokens(1), imatrix, out, replace(OPTS, per_pass=2), lambda s, *_: stages.add(s))
    assert "errors" not in stages
    n_left = len(measured.probes) - 4
    assert stages == {f"pass {i + 1} of {-(-n_left // 2)}" for i in range(-(-n_left // 2))}
    assert sorted(done.probes) == sorted(measured.probes)
    assert read_sensitivity(out).probes == done.probes
    again: set[str] = set()
    assert sensitivity(model, tokens(1), imatrix, out, OPTS, lambda s, *_: again.add(s)).probes == done.probes
    assert again == set()


def test_what_is_of_something_else_is_not_gone_on_with(
    model: Catalogue, imatrix: Imatrix, measured: Sensitivity, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    measured.save(out)
    with pytest.raises(ResumeError) as e:
        sensitivity(model, tokens(1), None, out, OPTS)
    assert str(e.value) == (
        f"{out}: is of another importance matrix ('{measured.imatrix}', not ''); give another output, or remove it"
    )
    with pytest.raises(ResumeError) as e:
        sensitivity(model, tokens(1), imatrix, out, replace(OPTS, by="kind"))
    assert str(e.value) == (
        f"{out}: has other groups than those asked for; give the same --groups and --bands, another output, or "
        "remove it"
    )
    assert read_sensitivity(out) == measured


# ---------------------------------------------------------------- files


def test_a_file_comes_back_as_it_was(measured: Sensitivity, tmp_path: Path) -> None:
    measured.save(tmp_path / "s.json")
    assert read_sensitivity(tmp_path / "s.json") == measured
    said = json.loads((tmp_path / "s.json").read_text())
    assert said["quantkit_sensitivity"] == 2
    assert said["floor"] == measured.floor


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is no sensitivity; make it with quantkit sensitivity"),
        ('{"quantkit_sensitivity": 1}', "is of another version of quantkit; make it with quantkit sensitivity"),
        ("[1", "is not a sensitivity, or is damaged: "),
        (
            '{"quantkit_sensitivity": 2}',
            "is not a sensitivity, or is damaged: 'model'; make it with quantkit sensitivity",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(SourceError) as e:
        read_sensitivity(path)
    assert str(e.value).startswith(f"{path}: {says}")


def test_texts_are_merged_chunk_by_chunk(measured: Sensitivity) -> None:
    (p, *_) = (p for p in measured.probes if p.group != FLOOR)
    other = replace(
        measured, probes=(p._replace(text="u", by_chunk=(1.0,) * 3), Probe(p.group, "Q3_K", 0.02, "u", (0.5,))),
        texts={"u": "another"},
    )  # fmt: skip
    both = merge([("a", measured), ("b", other)])
    assert len(both.texts) == 2
    assert len(both.probes) == len(measured.probes) + 2
    assert both.alpha(p.group).value != measured.alpha(p.group).value
    assert merge([("a", both), ("b", other)]).probes == both.probes
    with pytest.raises(SourceError) as e:
        merge([("a", measured), ("b", replace(other, source="x"))])
    assert str(e.value) == f"b: is of another model than a ('x', not '{measured.source}')"
    moved = (replace(measured.groups[2], tensors=("x",)), *measured.groups[:2])
    with pytest.raises(SourceError) as e:
        merge([("a", measured), ("b", replace(other, groups=moved))])
    assert str(e.value) == f"b: its group '{moved[0].name}' has other tensors than that of a"


def test_shares_of_damage_and_bytes(measured: Sensitivity) -> None:
    said = shares(measured, "Q4_K")
    assert {s.role for s in said} == {g.role for g in measured.groups}
    assert sum(s.damage for s in said) == pytest.approx(1)
    assert sum(s.nbytes for s in said) == pytest.approx(1)
    text = sensitivity_text(measured)
    assert f"noise floor: {measured.floor:.6f}, what rounding every weight to BF16 once more costs" in text
    assert all(g.name in text for g in measured.groups)


def test_from_python(model: Catalogue, imatrix: Imatrix, measured: Sensitivity) -> None:
    """The same by quantkit's own names, and a recipe of it."""
    chunks = tokens(1)
    made = qk.sensitivity(model, chunks, imatrix, options=OPTS)  # type: ignore[arg-type]
    assert isinstance(made, qk.Sensitivity)
    assert made == measured
    from quantkit.lab.allocation.optimize import OptimizeOptions
    from quantkit.lab.allocation.problem import Constraints

    opts = OptimizeOptions(Constraints(types=OPTS.types))
    best = qk.optimize(model, made, "6bpw", imatrix, options=opts)
    assert isinstance(best, qk.Optimized)
    assert best.plan.bpw <= 6
    assert qk.plan(model, best.text, imatrix).types() == best.plan.types()


def test_show_and_merge(quantkit: Run, measured: Sensitivity, tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    measured.save(a)
    replace(measured, probes=measured.probes[:3]).save(b)
    done = quantkit("sensitivity", "show", a)
    assert (done.returncode, done.stdout) == (0, sensitivity_text(measured) + "\n")
    assert json.loads(quantkit("sensitivity", "show", a, "--json").stdout)["shares"]
    done = quantkit("sensitivity", "merge", b, a, "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: {len(measured.groups)} groups, {len(measured.probes)} probes on 1 texts\n"
    assert sorted(read_sensitivity(out).probes) == sorted(measured.probes)
