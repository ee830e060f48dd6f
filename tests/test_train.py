"""Training of coders and deltas: BatchTopK by its definition, planted structure found, seeds, freezing, grids.

pytest tests/test_train.py
"""

from dataclasses import replace

import pytest
import torch

from deltatc.config import Delta
from deltatc.delta import Job, Key, train_deltas
from deltatc.errors import DataError
from deltatc.finetune import finetune, mlp_change
from deltatc.harvest import harvest, take_tokens, transcoder_input
from deltatc.models import load_model
from deltatc.text import encode_text
from deltatc.train import CoderTrainer, Recipe, batch_topk, calibrate_threshold
from deltatc.transcoder import KEYS, Transcoder
from tests.helpers import random_transcoder, tiny_gemma2

SETTINGS = Delta(
    load_from=None, layers=None, d_new=[4], percentiles=[0.5], target="recon", l0_fraction=0.5, l0_fraction_also=None,
    n_tokens=1200, n_chunks=1, n_validation_tokens=300, n_steps=60, batch_tokens=64, lr=0.01, eval_every=20, patience=3,
    max_tokens=64, seed=0,
)  # fmt: skip


def test_batch_topk_keeps_the_largest_of_the_whole_batch():
    pre = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    acts = batch_topk(pre, 2.0)
    kept = pre[acts > 0]
    assert len(kept) == 26 and torch.equal(acts[acts > 0], kept)
    assert kept.min() > torch.relu(pre)[acts == 0].max()
    assert torch.equal(batch_topk(pre, 7.0), torch.relu(pre))  # never a negative act


def test_calibrated_thresholds_give_at_most_the_l0_asked_for():
    pre = torch.randn(101, 9, generator=torch.Generator().manual_seed(1))
    for l0 in (0.5, 2.0, 4.0, 9.0):
        threshold = calibrate_threshold(pre, l0)
        found = (pre > threshold.clamp_min(0)).double().sum(-1).mean()
        assert threshold.shape == (9,) and found <= l0 and (found > l0 - 0.05 or l0 > 4)


def planted(n, seed):
    """x, and a target that is a sparse function of it: six rectified directions."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(16, 6, generator=torch.Generator().manual_seed(99)) / 4
    V = torch.randn(6, 16, generator=torch.Generator().manual_seed(98))
    x = torch.randn(n, 16, generator=draw)
    return x, torch.relu(x @ W - 0.5) @ V


def trained(x, y, x_check, y_check, **changes):
    trainer = CoderTrainer(replace(Recipe(12, 4.0, 600, 0.01, 100, 10, 0), **changes), 16)
    order = torch.Generator().manual_seed(0)
    while not trainer.stopped:
        rows = torch.randint(len(x), (256,), generator=order)
        trainer.step(x[rows], y[rows])
        if trainer.n_done % trainer.recipe.eval_every == 0:
            trainer.validate(x_check, y_check)
    return trainer


def test_a_planted_sparse_function_is_found_and_noise_is_not():
    x, y = planted(4000, 0)
    check = planted(1000, 1)
    assert min(line.fvu for line in trained(x, y, *check).log) < 0.1
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert min(line.fvu for line in trained(x, shuffled, *check).log) > 0.8


def test_the_exported_weights_have_the_logged_fvu_and_l0():
    x, y = planted(2000, 0)
    x_check, y_check = planted(500, 1)
    trainer = trained(x, y, x_check, y_check)
    w, best = trainer.best, min(trainer.log, key=lambda line: line.fvu)
    pre = (x_check.double() @ w.W_enc.double() + w.b_enc).numpy()
    acts = pre * (pre > w.threshold.numpy()) * (pre > 0)
    error = y_check.double().numpy() - (acts @ w.W_dec.double().numpy() + w.b_dec.double().numpy())
    variance = ((y_check - y_check.mean(0)).double() ** 2).sum().item()
    assert (error**2).sum() / variance == pytest.approx(best.fvu, rel=1e-3, abs=1e-6)
    assert (acts > 0).sum(-1).mean() == pytest.approx(best.l0, abs=0.02) and best.l0 <= 4


def test_output_is_zero_at_the_start():
    trainer = CoderTrainer(Recipe(12, 4.0, 10, 0.01, 5, 2, 0), 16)
    weights = trainer.export(torch.randn(50, 16))
    assert not weights.W_dec.any() and not weights.b_dec.any()


def test_early_stopping_keeps_the_best_and_stops():
    x, y = planted(500, 0)
    trainer = trained(x, y, x, torch.randn(500, 16, generator=torch.Generator().manual_seed(5)), patience=2)
    fvus = [line.fvu for line in trainer.log]
    assert trainer.n_done < 600 and len(fvus) - 1 - fvus.index(min(fvus)) == 2
    # What is kept is the best validation's weights: a run that ends there has the same, one that goes on has others.
    best_step = trainer.log[fvus.index(min(fvus))].step
    for n_done, same in ((best_step, True), (trainer.n_done, False)):
        again = CoderTrainer(trainer.recipe, 16)
        order = torch.Generator().manual_seed(0)
        for _ in range(n_done):
            rows = torch.randint(len(x), (256,), generator=order)
            again.step(x[rows], y[rows])
        assert torch.equal(again.W_dec, trainer.best.W_dec) == same


def test_a_latent_that_never_fires_is_revived():
    x, y = planted(2000, 0)
    trainer = CoderTrainer(Recipe(12, 2.0, 400, 0.01, 400, 10, 0), 16)
    with torch.no_grad():
        trainer.W_enc[:, 6:] *= 0.05  # far too weak to be among the largest
    for _ in range(400):
        trainer.step(x, y)
    assert trainer.quiet_steps.max() < 400
    trainer.validate(x, y)
    assert trainer.log[-1].dead_frac < 0.5


def test_the_learning_rate_warms_up_stays_and_falls():
    trainer = CoderTrainer(Recipe(4, 1.0, 1000, 0.01, 100, 10, 0), 16)
    shares = []
    for trainer.n_done in (0, 9, 19, 400, 500, 750, 990, 999):
        shares.append(trainer._schedule())
    assert shares == pytest.approx([0.05, 0.5, 1, 1, 1, 0.5, 0.05, 0.05])


@pytest.mark.parametrize("where", ["x", "target"])
def test_a_loss_that_is_not_finite_stops_before_the_update(where):
    x, y = planted(64, 0)
    trainer = CoderTrainer(Recipe(12, 4.0, 10, 0.01, 5, 2, 0), 16)
    trainer.step(x, y)
    before = [p.detach().clone() for p in trainer.parameters]
    (x if where == "x" else y)[3, 3] = float("inf")
    with pytest.raises(DataError, match="step 1"):
        trainer.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_a_target_that_is_all_zero_is_learnt_and_a_validation_that_is_not_finite_is_refused():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    trainer = trained(x, torch.zeros(64, 16), x, torch.zeros(64, 16), n_steps=20, eval_every=10)
    assert [line.fvu for line in trainer.log] == [0.0, 0.0] and not trainer.best.W_dec.any()
    with pytest.raises(DataError, match="validation FVU is nan at step 20"):
        trainer.validate(x, torch.full((64, 16), float("nan")))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base_model, tokenizer = tiny_gemma2(folder)
    model = load_model(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight += 0.3 * torch.randn_like(layer.mlp.down_proj.weight)
    texts = [f"hello {i * 37 % 101} world, what is {i} plus {i * i}?" for i in range(80)]
    sequences = [encode_text(tokenizer, text) for text in texts]
    bases = {layer: {l0: random_transcoder(10 * layer + l0) for l0 in (5, 9)} for layer in (0, 2)}
    return model, base_model, tokenizer, sequences, bases


def run(study, jobs, settings=SETTINGS):
    model, base_model, tokenizer, sequences, bases = study
    return train_deltas(
        model, base_model, bases, jobs, sequences[:60], sequences[60:], settings, 16, tokenizer.pad_token_id
    )


def test_harvest_equals_one_text_at_a_time(study):
    model, base_model, tokenizer, sequences, _ = study
    found = harvest(model, sequences[:5], [1], 2, tokenizer.pad_token_id, base_model)[1]
    single = [
        harvest(model, [s], [1], 1, tokenizer.pad_token_id, base_model)[1]
        for s in sorted(sequences[:5], key=lambda s: len(s.ids))
    ]
    for kind in range(3):
        torch.testing.assert_close(found[kind], torch.cat([part[kind] for part in single]), rtol=1e-4, atol=1e-4)
    assert found.mlp_out.shape == (sum(len(s.ids) - 1 for s in sequences[:5]), 32)
    layer = base_model.model.layers[1]
    wanted = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(found.resid_mid)))
    torch.testing.assert_close(found.mlp_out_of_base, wanted.detach(), rtol=1e-4, atol=1e-4)
    assert sum(len(s.ids) - 1 for s in take_tokens(sequences, 100, 0)) >= 100


def test_a_grid_gives_what_each_delta_alone_gives_and_bases_stay(study):
    bases = study[-1]
    before = {(layer, l0): [t.clone() for t in base.weights] for layer, by in bases.items() for l0, base in by.items()}
    jobs = {Key(f"c{l0}", layer): Job(l0, 4, 2.0) for layer in (0, 2) for l0 in (5, 9)}
    together, energies = run(study, jobs)
    for (layer, l0), weights in before.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, bases[layer][l0].weights, strict=True))
    for key in (Key("c5", 0), Key("c9", 2)):
        alone, _ = run(study, {key: jobs[key]})
        pairs = zip(alone[key].delta.weights, together[key].delta.weights, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(result.log[-1].fvu < result.log[0].fvu for result in together.values())
    energy = energies[0][5]
    assert energy.finetune > 0 and energy.base_error > 0 and energy.target > 0


def test_training_touches_no_model_and_other_seeds_give_other_deltas(study):
    model, base_model, *_ = study
    before = [parameter.clone() for net in (model, base_model) for parameter in net.parameters()]
    key, job = Key("c", 2), Job(9, 4, 2.0)
    found = [run(study, {key: job}, replace(SETTINGS, seed=seed))[0][key].delta for seed in (0, 0, 1)]
    after = [parameter for net in (model, base_model) for parameter in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0].weights, found[1].weights, strict=True))
    assert not torch.equal(found[0].W_enc, found[2].W_enc)


@pytest.mark.parametrize(("target", "site_name"), [("recon", "normalized"), ("recon", "resid_mid_over_sqrt_d"),
                                                   ("mlp_diff", "resid_mid_over_sqrt_d")])  # fmt: skip
def test_the_logged_fvu_is_that_of_the_finished_delta_beside_its_base(study, target, site_name):
    """Independent of train_deltas: the held-out target is computed here, from plain hooks on both models."""
    model, base_model, tokenizer, sequences, bases = study
    plain = bases[0][5]
    base = Transcoder(*(getattr(plain, name) for name in KEYS), site=site_name)
    key = Key("c", 0)
    results, energies = train_deltas(
        model, base_model, {0: {5: base}}, {key: Job(5, 4, 2.0)}, sequences[:60], sequences[60:],
        replace(SETTINGS, target=target), 16, tokenizer.pad_token_id,
    )  # fmt: skip
    x, ft, of_base, scale = [], [], [], 1.0 if site_name == "normalized" else 32**0.5
    for sequence in take_tokens(sequences[60:], SETTINGS.n_validation_tokens, SETTINGS.seed):
        seen = {}
        layer, twin = model.model.layers[0], base_model.model.layers[0]
        handles = [
            layer.pre_feedforward_layernorm.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.update(h=args[0])
            ),
            layer.post_feedforward_layernorm.register_forward_hook(
                lambda _, args, out, seen=seen: seen.update(out=out)
            ),
        ]
        with torch.no_grad():
            model(torch.tensor([sequence.ids]))
            [handle.remove() for handle in handles]
            h = seen["h"][0, 1:]
            of_base.append(twin.post_feedforward_layernorm(twin.mlp(twin.pre_feedforward_layernorm(h))))
        unit = h / (h.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        x.append(unit if site_name == "normalized" else h / scale)
        ft.append(seen["out"][0, 1:])
    x, ft, of_base = torch.cat(x), torch.cat(ft), torch.cat(of_base)
    recon = base(x)
    wanted = (ft - (recon * scale if target == "recon" else of_base)) / scale
    delta = results[key].delta
    error = wanted - delta.delta_only(x).detach()
    fvu = error.double().pow(2).sum() / (wanted - wanted.mean(0)).double().pow(2).sum()
    best = min(results[key].log, key=lambda line: line.fvu)
    assert fvu.item() == pytest.approx(best.fvu, rel=1e-3)
    assert (delta.encode_delta(x) > 0).double().sum(-1).mean().item() == pytest.approx(best.l0, rel=0.02)

    def energy(part):
        return pytest.approx(part.double().pow(2).sum(-1).mean().item(), rel=1e-4)

    assert energies[0][5] == (energy(ft - of_base), energy(of_base - recon * scale), energy(ft - recon * scale))


def test_text_without_tokens_is_refused(study):
    model, base_model, tokenizer, sequences, bases = study
    jobs = {Key("c", 0): Job(5, 4, 2.0)}
    only_bos = [encode_text(tokenizer, "")]
    for train, validation, n_chunks, message in (
        ([], sequences, 1, "chunk 1 of 1 of the delta's training text has no tokens"),
        (only_bos, sequences, 1, "training text has no tokens"),
        (sequences[:2], sequences, 3, "chunk 3 of 3"),
        (sequences, only_bos, 1, "validation text has no tokens"),
    ):
        with pytest.raises(DataError, match=message):
            settings = replace(SETTINGS, n_chunks=n_chunks)
            train_deltas(model, base_model, bases, jobs, train, validation, settings, 16, tokenizer.pad_token_id)


def test_mlp_diff_targets_only_what_the_finetune_changed(study):
    model, base_model, tokenizer, sequences, bases = study
    job = {Key("c", 0): Job(5, 4, 2.0)}
    same = (base_model, base_model, tokenizer, sequences, bases)
    trained_, energies = run(same, job, replace(SETTINGS, target="mlp_diff"))
    x = transcoder_input(model, 0, "normalized", torch.randn(20, 32))
    assert trained_[Key("c", 0)].delta.delta_only(x).abs().max() < 1e-6  # nothing changed, nothing learnt
    assert energies[0][5].finetune < 1e-12 * energies[0][5].base_error


def test_chunks_bound_what_is_harvested_and_still_take_every_step(study):
    results, _ = run(study, {Key("c", 0): Job(5, 4, 2.0)}, replace(SETTINGS, n_chunks=3, patience=99))
    assert results[Key("c", 0)].log[-1].step == SETTINGS.n_steps


def test_attention_only_lora_leaves_every_mlp_and_merging_changes_no_logits(tmp_path, caplog, monkeypatch):
    from peft.tuners.lora import LoraModel

    from deltatc.config import load_params

    _, tokenizer = tiny_gemma2(tmp_path)
    settings = replace(load_params().finetune, batch_rows=4, checkpoints=1, n_validation=2, max_new_tokens=3)
    rows = [{"input": f"a{i}", "target": f"b{i}", "expr": None, "label": "copy"} for i in range(16)]
    rows += [{"input": f"{i}+1", "target": "<tool_call>", "expr": f"{i}+1", "label": "tool"} for i in range(16)]
    base = load_model(tmp_path)
    merged, history = finetune(
        load_model(tmp_path), tokenizer, rows, rows, replace(settings, target_modules="attention"), 8, 0
    )
    assert mlp_change(merged, base) == [0.0, 0.0, 0.0] and "no MLP projection" in caplog.text and len(history) == 1
    ids = torch.tensor([[2, 10, 20, 30]])
    unmerged = {}

    def merge_and_unload(adapted):
        with torch.no_grad():
            unmerged["logits"] = adapted(ids).logits
        return merge(adapted)

    merge = LoraModel.merge_and_unload
    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_and_unload)
    merged, _ = finetune(load_model(tmp_path), tokenizer, rows, rows, settings, 8, 0)
    assert min(mlp_change(merged, base)) > 0
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, unmerged["logits"], rtol=1e-4, atol=1e-4)
        assert (base(ids).logits - unmerged["logits"]).abs().max() > 0.1
        assert torch.equal(load_model(tmp_path / "merged")(ids).logits, merged(ids).logits)
