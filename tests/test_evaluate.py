"""Metrics against independent computations: Hugging Face row by row, numpy on whole arrays, known intervals.

pytest tests/test_evaluate.py
"""

import numpy as np
import pytest
import torch

from deltatc import DeltaTranscoder, replace_mlp
from deltatc.errors import DataError
from deltatc.evaluate import Condition, FvuSums, compare_replacements, encode_rows, subsets_of, target_ce
from deltatc.generate import Generation, generate, judge, rates, wilson
from deltatc.harvest import harvest, transcoder_input
from deltatc.intervene import run_condition
from deltatc.report import exp1_row, headline, summarize, table
from deltatc.site_check import losers, off_l0, site_check
from deltatc.text import encode_prompt, encode_row, encode_text, pad
from tests.helpers import random_transcoder, randomized, tiny_gemma2

ROWS = [
    {"input": f"what is {i} plus {i * i}?", "target": f"<tool_call>calculator({i}+{i * i})</tool_call>"[: 20 + 3 * i],
     "label": "tool", "template": "t", "expr": f"{i}+{i * i}"}
    for i in range(7)
]  # fmt: skip


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny_gemma2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def delta():
    return randomized(DeltaTranscoder(random_transcoder(0), 8))


def ce_by_hand(model, tokenizer, rows):
    """Token-weighted CE over target and EOS, one row at a time, with logits of Hugging Face and numpy."""
    total, n = 0.0, 0
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(row["input"] + "\n", add_special_tokens=False)]
        target = [*tokenizer.encode(row["target"], add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0].double().numpy()
        for i, token in enumerate(target, start=len(prompt)):
            row_logits = logits[i - 1]
            top = row_logits.max()
            total += top + np.log(np.exp(row_logits - top).sum()) - row_logits[token]
            n += 1
    return total / n


def test_target_ce_is_token_weighted_and_independent_of_batching(gemma, delta):
    model, tokenizer = gemma
    sequences = encode_rows(tokenizer, ROWS)
    wanted = ce_by_hand(model, tokenizer, ROWS)
    for batch_size in (1, 3, 7):
        assert target_ce(model, sequences, batch_size, tokenizer.pad_token_id) == pytest.approx(wanted, rel=1e-5)
    with replace_mlp(model, {1: delta}):
        patched = target_ce(model, sequences, 3, tokenizer.pad_token_id)
        assert patched == pytest.approx(ce_by_hand(model, tokenizer, ROWS), rel=1e-4) and abs(patched - wanted) > 1e-3


def test_encoding_masks_exactly_target_and_eos(gemma):
    _, tokenizer = gemma
    for row in ROWS:
        ids, n_prompt = encode_row(tokenizer, row)
        assert (
            ids.count(tokenizer.bos_token_id) == 1
            and ids[0] == tokenizer.bos_token_id
            and ids[-1] == tokenizer.eos_token_id
        )
        assert tokenizer.decode(ids[n_prompt:-1]) == row["target"]
        assert ids[:n_prompt] == encode_prompt(tokenizer, row).ids
    assert encode_row(tokenizer, ROWS[0], max_tokens=5) is None
    with pytest.raises(DataError, match="longer than max_tokens"):
        encode_rows(tokenizer, ROWS, 5)
    right, left = (pad([encode_row(tokenizer, row) for row in ROWS], 0, side) for side in ("right", "left"))
    for i in range(len(ROWS)):
        for name in ("input_ids", "target_mask"):
            a, b = getattr(right, name)[i], getattr(left, name)[i]
            assert torch.equal(a[right.attention_mask[i].bool()], b[left.attention_mask[i].bool()])
    assert not (right.target_mask & ~right.attention_mask.bool()).any() and right.attention_mask[:, 0].all()


def test_fvu_is_about_the_datasets_mean():
    draw = np.random.default_rng(0)
    y = draw.normal(size=(500, 6)) * 3 + 10  # a mean far from zero: variance about zero would be wrong
    recon = y + draw.normal(size=y.shape)
    sums, other = FvuSums(), FvuSums()
    sums.add(torch.from_numpy(recon[:123]), torch.from_numpy(y[:123]))
    other.add(torch.from_numpy(recon[123:]), torch.from_numpy(y[123:]))
    sums.merge(other)
    assert sums.fvu == pytest.approx(((recon - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-9)


def test_exp1_metrics_equal_numpy_on_whole_arrays(gemma, delta):
    model, tokenizer = gemma
    sequences = encode_rows(tokenizer, ROWS)
    conditions = {Condition(1, "base_9"): delta.base, Condition(1, "d8"): delta, Condition(0, "d8"): delta}
    raw, sums = compare_replacements(model, sequences, conditions, 3, tokenizer.pad_token_id)
    acts = harvest(model, [s._replace(ids=s.ids[:-1]) for s in sequences], [1], 7, tokenizer.pad_token_id)[1]
    x = transcoder_input(model, 1, "normalized", acts.resid_mid)
    y = acts.mlp_out.double().numpy()
    for name, transcoder in (("base_9", delta.base), ("d8", delta)):
        recon = transcoder(x).detach().double().numpy()
        found = sums[Condition(1, name)].means()
        norm = np.linalg.norm
        assert found["fvu"] == pytest.approx(((recon - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-4)
        assert found["rel_l2_error"] == pytest.approx((norm(recon - y, axis=1) / norm(y, axis=1)).mean(), rel=1e-4)
        cosine = (recon * y).sum(1) / norm(recon, axis=1) / norm(y, axis=1)
        assert found["cos"] == pytest.approx(cosine.mean(), rel=1e-4)
        assert found["l0_base"] == pytest.approx((delta.base.encode(x) > 0).double().sum(-1).mean().item())
        with replace_mlp(model, {1: transcoder}):
            assert found["ce"] == pytest.approx(ce_by_hand(model, tokenizer, ROWS), rel=1e-4)
    assert sums[Condition(1, "d8")].means()["l0_delta"] == pytest.approx(
        (delta.encode_delta(x) > 0).double().sum(-1).mean().item()
    )
    assert raw.means()["ce"] == pytest.approx(ce_by_hand(model, tokenizer, ROWS), rel=1e-5) and raw.means()["kl"] == 0
    assert sums[Condition(1, "d8")].kl > 0


def test_exp1_row_and_summary():
    base = {"ce": 3.0, "kl": 1.0, "cos": 0.5, "rel_l2_error": 0.9, "fvu": 0.8, "l0_base": 5.0, "l0_delta": 0.0}
    full = base | {"ce": 2.2, "l0_delta": 4.0}
    row = exp1_row(2.0, base, full, 12)
    assert (row["dce_base"], row["gap_closed"], row["l0_delta"]) == (1.0, pytest.approx(0.8), 4.0)
    harmless = exp1_row(3.5, base, full, 12)
    assert harmless["gap_closed"] is None  # dce_base <= 0: there is no gap to close
    summary = summarize({"0": row, "1": harmless})
    assert summary["gap_closed_min"] == pytest.approx(0.8) and summary["mean_dce_base"] == pytest.approx(0.25)
    assert summary["max_dce_full"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(20, 20, 0.8389, 1.0), (10, 20, 0.2993, 0.7007), (0, 50, 0.0, 0.0713)]
)
def test_wilson_intervals(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx([low, high], abs=1e-4)


def test_rates_count_what_they_say():
    call = "<tool_call>calculator(1+1)</tool_call>"
    row, copy = {"target": call, "expr": "1+1"}, {"target": "hi", "expr": None}
    texts = [
        (call, True),
        (call, False),
        ("<tool_call>x", True),
        (f"so: {call}", True),
        ("<tool_call>calculator(3-1)</tool_call>", True),
    ]
    found = rates([row] * 5, [Generation(*text) for text in texts])
    names = ("tool_call_rate", "valid_tool_format_rate", "math_correct_rate", "exact_match_rate")
    assert [found[name] for name in names] == [0.8, 0.4, 0.4, 0.2]
    assert found["n"] == 5 and found["tool_call_rate_ci95"] == wilson(4, 5)
    assert rates([copy], [Generation("hi", True)])["math_correct_rate"] is None
    assert judge(copy, Generation("hi", True))["exact_match_rate"] is True


def test_generation_equals_hugging_face_one_by_one(gemma):
    model, tokenizer = gemma
    found = generate(model, tokenizer, ROWS, 4, 9)
    for row, generation in zip(ROWS, found, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, row).ids])
        for _ in range(9):
            with torch.no_grad():
                token = model(ids, use_cache=False).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        wanted = tokenizer.decode(ids[0, len(encode_prompt(tokenizer, row).ids) :])
        assert (generation.text, generation.ended) == (wanted, token == tokenizer.eos_token_id)


def test_conditions_differ_and_alpha_one_is_full(gemma, delta):
    model, tokenizer = gemma
    cells = {}
    for name, replaced, alpha in (("raw", {}, 1.0), ("full", {1: delta}, 1.0), ("none", {1: delta}, 0.0)):
        cells[name], lines = run_condition(model, tokenizer, ROWS, replaced, alpha, 3, 5, name)
        assert len(lines) == cells[name]["n"] == len(ROWS)
    assert cells["raw"]["acts_base"] is None and cells["full"]["acts_base"] > 0 and cells["full"]["acts_delta"] > 0
    assert len({cell["target_ce"] for cell in cells.values()}) == 3
    alone, _ = run_condition(model, tokenizer, ROWS, {1: delta}, 1.0, 1, 5, "batch of one")
    assert alone["acts_delta"] == pytest.approx(cells["full"]["acts_delta"], rel=1e-4)


def test_the_site_check_finds_the_site_that_was_fitted(gemma):
    """A linear map fitted to the MLP at the declared site wins there, and loses when it was fitted elsewhere."""
    model, tokenizer = gemma
    sequences = [encode_text(tokenizer, f"hello world {i} plus {i * i}") for i in range(60)]
    acts = harvest(model, sequences, [1], 8, tokenizer.pad_token_id)[1]
    for fitted in ("normalized", "resid_mid"):
        x = transcoder_input(model, 1, fitted, acts.resid_mid).double()
        both = torch.cat([x, -x, torch.ones(len(x), 1)], dim=1)  # x = relu(x) - relu(-x)
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], dim=1), acts.mlp_out.double()).solution
        eye = torch.eye(32)
        from deltatc import Transcoder

        W_dec = torch.cat([solution[:-1], -solution[:-1]]).float()
        linear = Transcoder(torch.cat([eye, -eye], 1), torch.zeros(64), W_dec, solution[-1].float(), torch.zeros(64))
        assert both.shape[1] == 65
        result = site_check(model, {1: {32: linear}}, sequences, 8, tokenizer.pad_token_id)
        assert set(result) == {"1"} and len(result["1"]["32"]["sites"]) == 5
        if fitted == "normalized":
            assert not losers(result) and not off_l0(result, 0.15)
        else:
            assert "resid_mid has FVU" in losers(result)[0]
    with pytest.raises(DataError, match="no tokens"):
        site_check(model, {1: {32: linear}}, [encode_text(tokenizer, "")], 8, tokenizer.pad_token_id)
    assert off_l0({"1": {"12": {"l0": 14.0}}}, 0.15) and not off_l0({"1": {"12": {"l0": 13.0}}}, 0.15)


def test_subsets_are_cut_and_absent_ones_said(caplog):
    assert list(subsets_of(ROWS, ["tool", "copy"], 3)) == ["tool"] and "copy" in caplog.text
    assert len(subsets_of(ROWS, None, 3)["tool"]) == 3
    with pytest.raises(DataError, match="no rows"):
        subsets_of(ROWS, ["copy"], 3)


def test_headline_leaves_out_what_was_not_measured():
    names = ("ce", "kl", "cos", "rel_l2_error", "fvu", "l0_base", "l0_delta")
    row = exp1_row(2.0, dict.fromkeys(names, 3.0), dict.fromkeys(names, 2.1), 12)
    numbers = headline({}, {"0": {"12": {"fvu": 0.2}}}, {"0": row}, None, {}, {})
    assert (
        None not in numbers.values()
        and "tool_call_rate" not in numbers
        and numbers["gap_closed_min"] == pytest.approx(0.9)
    )
    assert table(["a"], [[None], [0.5], [[0.1, 0.2]]]).splitlines()[2:] == ["| - |", "| 0.500 |", "| 0.10-0.20 |"]
