"""capture_mlp and replace_mlp against Hugging Face: independent hooks, KV cache, padding, TransformerBridge.

pytest tests/test_hooks.py
"""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from deltatc import DeltaTranscoder, Transcoder, capture_mlp, fuse, replace_mlp
from deltatc.errors import ModelError, PartsNotRecorded, PositionError, SiteError
from deltatc.hooks import find_positions
from deltatc.models import decoder_layers
from tests.helpers import random_transcoder, randomized, tiny_gemma2

TEXTS = ["hello world, what is 12 plus 30?", "hi", "what is 7?"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny_gemma2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def delta():
    return randomized(DeltaTranscoder(random_transcoder(0), 8))


def tokens(tokenizer, texts, side="right"):
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    length = max(map(len, ids))
    pad = [[tokenizer.pad_token_id] * (length - len(row)) for row in ids]
    rows = [p + row if side == "left" else row + p for p, row in zip(pad, ids, strict=True)]
    mask = [[0] * len(p) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(p)
            for p, row in zip(pad, ids, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(model, layers, transform, keep):
    """Replace post-norm outputs by plain PyTorch hooks: x recomputed here, `keep(input_ids)` says where not to."""
    state, handles = {}, []

    def ids(module, args, kwargs):
        state["keep"] = keep(kwargs["input_ids"])

    handles.append(model.model.register_forward_pre_hook(ids, with_kwargs=True))
    for layer in layers:
        block = model.model.layers[layer]

        def read(module, args, layer=layer):
            h = args[0].double()
            state[layer] = (h / (h.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()).float()

        def write(module, args, output, layer=layer):
            return torch.where(state["keep"].unsqueeze(-1), output, transform(state[layer]))

        handles.append(block.pre_feedforward_layernorm.register_forward_pre_hook(read))
        handles.append(block.post_feedforward_layernorm.register_forward_hook(write))
    return handles


def test_captured_tensors_are_what_hugging_face_computes(gemma):
    model, tokenizer = gemma
    batch = tokens(tokenizer, TEXTS)
    seen = {}
    block = model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: seen.update(out=output))
    with torch.no_grad(), capture_mlp(model) as captured:
        model(**batch)
    handle.remove()
    assert sorted(captured.mlp_out) == [0, 1, 2]
    torch.testing.assert_close(captured.resid_mid[1] + captured.mlp_out[1], seen["out"])
    norm = block.post_feedforward_layernorm
    assert torch.equal(norm(captured.before_post_norm[1]), captured.mlp_out[1])
    real = batch["attention_mask"].bool() & (batch["input_ids"] != tokenizer.bos_token_id)
    assert torch.equal(captured.positions.replaced, real)


def test_input_has_unit_rms_whatever_the_gain(gemma):
    from deltatc.harvest import transcoder_input

    model, tokenizer = gemma
    with torch.no_grad(), capture_mlp(model, [2]) as captured:
        model(**tokens(tokenizer, TEXTS))
    x = transcoder_input(model, 2, "normalized", captured.resid_mid[2])
    torch.testing.assert_close(x.pow(2).mean(-1), torch.ones(x.shape[:-1]), rtol=1e-4, atol=1e-4)
    norm = model.model.layers[2].pre_feedforward_layernorm
    gained = transcoder_input(model, 2, "normalized_with_gain", captured.resid_mid[2])
    torch.testing.assert_close(gained, norm(captured.resid_mid[2]))  # (1 + w), not w
    saved = norm.weight.detach().clone()
    norm.weight.data.normal_()
    assert torch.equal(transcoder_input(model, 2, "normalized", captured.resid_mid[2]), x)
    norm.weight.data.copy_(saved)


def test_replacing_by_the_original_output_changes_no_bit(gemma, monkeypatch):
    """A stand-in transcoder hands back what the MLP gave, so all that is left is the hooks' own arithmetic."""
    model, tokenizer = gemma
    batch = tokens(tokenizer, TEXTS)
    with torch.no_grad(), capture_mlp(model, [1]) as captured:
        wanted = model(**batch).logits
    echo = random_transcoder(0)
    monkeypatch.setattr(echo, "forward", lambda x: captured.mlp_out[1])
    with torch.no_grad(), replace_mlp(model, {1: echo}):
        assert torch.equal(model(**batch).logits, wanted)


def test_hooks_leave_no_trace_also_after_an_exception(gemma, delta):
    model, tokenizer = gemma
    batch, before = tokens(tokenizer, TEXTS), n_hooks(model)
    with torch.no_grad():
        wanted = model(**batch).logits
        with pytest.raises(RuntimeError), replace_mlp(model, {0: delta}), capture_mlp(model):
            assert not torch.equal(model(**batch).logits, wanted)
            raise RuntimeError
        with pytest.raises(SiteError), replace_mlp(model, {0: delta, 1: random_transcoder(0, d_model=16)}):
            pass
        assert n_hooks(model) == before and torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize(("mode", "alpha"), [("fused", 1.0), ("fused", 0.5), ("no_delta", 1.0)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_hooks_written_by_hand(gemma, delta, mode, alpha, side):
    model, tokenizer = gemma
    batch = tokens(tokenizer, TEXTS, side)
    strength = 0.0 if mode == "no_delta" else alpha
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.pad_token_id])
    handles = by_hand(model, [0, 2], lambda x: delta(x, strength), lambda ids: torch.isin(ids, special))
    with torch.no_grad():
        wanted = model(**batch).logits
        [handle.remove() for handle in handles]
        with replace_mlp(model, {0: delta, 2: fuse(delta.base, delta)}, mode, alpha):
            found = model(**batch).logits
    at = batch["attention_mask"].bool()
    torch.testing.assert_close(found[at], wanted[at], rtol=1e-4, atol=1e-4)


def test_generation_is_the_same_with_and_without_cache_alone_and_padded(gemma, delta):
    model, tokenizer = gemma
    replaced = {0: delta, 1: delta}
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.pad_token_id])
    batch = tokens(tokenizer, TEXTS, "left")
    with torch.no_grad(), replace_mlp(model, replaced):
        cached = model.generate(**batch, **options)[:, -10:]
        uncached = model.generate(**batch, **options, use_cache=False)[:, -10:]
        alone = [model.generate(**tokens(tokenizer, [text]), **options)[0, -10:] for text in TEXTS]
    handles = by_hand(model, replaced, delta, lambda ids: torch.isin(ids, special))
    with torch.no_grad():
        wanted = model.generate(**batch, **options)[:, -10:]
        [handle.remove() for handle in handles]
        # Negative control: a rule on the tensor's index 0 undoes the intervention at every cached step.
        naive = by_hand(model, replaced, delta, lambda ids: torch.arange(ids.shape[1]).eq(0).expand(ids.shape))
        by_index = model.generate(**tokens(tokenizer, TEXTS[:1]), **options)[:, -10:]
        [handle.remove() for handle in naive]
        raw = model.generate(**batch, **options)[:, -10:]
    assert torch.equal(cached, wanted) and torch.equal(uncached, wanted) and torch.equal(torch.stack(alone), wanted)
    assert not torch.equal(raw, wanted) and not torch.equal(by_index[0], wanted[0])


def test_transformer_bridge_generates_what_hugging_face_does(gemma, delta, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = tiny_gemma2(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=model, tokenizer=tokenizer, device="cpu")
    reference, _ = gemma
    batch = tokens(tokenizer, TEXTS[:1])
    seen = {}

    def watch(value, hook):
        seen["mlp_out"] = value.clone()

    with torch.no_grad():
        with replace_mlp(reference, {1: delta}), capture_mlp(reference, [1]) as captured:
            wanted = reference(**batch).logits
            text = reference.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
            reference(**batch)
        with replace_mlp(bridge, {1: delta}):
            with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", watch)]):
                found = bridge(batch["input_ids"])
            for cache in (True, False):
                again = bridge.generate(batch["input_ids"], max_new_tokens=8, do_sample=False, stop_at_eos=False,
                                        use_past_kv_cache=cache, return_type="tokens", verbose=False)  # fmt: skip
                assert torch.equal(again, text)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["mlp_out"], captured.mlp_out[1], rtol=1e-4, atol=1e-4)
    assert len(decoder_layers(bridge)) == 3


def test_transformer_bridge_pads_and_caches_like_hugging_face_and_is_left_as_found(gemma, delta, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = tiny_gemma2(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=model, tokenizer=tokenizer, device="cpu")
    reference, _ = gemma
    replaced = {0: delta, 2: delta}
    padded = tokens(tokenizer, TEXTS, "left")

    def by_bridge(cache):
        return bridge.generate(TEXTS, max_new_tokens=8, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache,
                               return_type="tokens", verbose=False)  # fmt: skip

    def by_hugging_face():
        return reference.generate(**padded, max_new_tokens=8, do_sample=False, eos_token_id=None)

    with torch.no_grad():
        raw = by_bridge(cache=True)
        before = n_hooks(bridge)  # the bridge's first call sets some of its own
        assert torch.equal(raw, by_hugging_face())
        for mode in ("fused", "no_delta"):
            with replace_mlp(reference, replaced, mode):
                wanted = by_hugging_face()
            with replace_mlp(bridge, replaced, mode):
                assert n_hooks(bridge) > before
                for cache in (True, False):
                    assert torch.equal(by_bridge(cache), wanted)
            assert not torch.equal(wanted, raw)
        with pytest.raises(RuntimeError), replace_mlp(bridge, replaced):
            raise RuntimeError
        assert n_hooks(bridge) == before and torch.equal(by_bridge(cache=True), raw)


def test_results_do_not_depend_on_batch_or_padding_side(gemma, delta):
    model, tokenizer = gemma
    found = {}
    for name, groups, side in (
        ("right", [TEXTS], "right"),
        ("left", [TEXTS], "left"),
        ("one", [[t] for t in TEXTS], "left"),
    ):
        with torch.no_grad(), replace_mlp(model, {0: delta, 1: delta}, collect_stats=True) as stats:
            logits = []
            for texts in groups:
                batch = tokens(tokenizer, texts, side)
                out = model(**batch).logits
                logits += [row[mask.bool()] for row, mask in zip(out, batch["attention_mask"], strict=True)]
        found[name] = torch.cat(logits), stats
    for name in ("left", "one"):
        torch.testing.assert_close(found[name][0], found["right"][0], rtol=1e-4, atol=1e-4)
        for layer in (0, 1):
            a, b = found[name][1][layer], found["right"][1][layer]
            assert a.n_tokens == b.n_tokens == sum(len(tokenizer.encode(t, add_special_tokens=False)) for t in TEXTS)
            assert (a.l0_base, a.l0_delta) == (b.l0_base, b.l0_delta)
            assert a.l1_delta == pytest.approx(b.l1_delta, rel=1e-4) and a.l1_base == pytest.approx(b.l1_base, rel=1e-4)


def test_stats_are_the_acts_of_encode(gemma, delta):
    from deltatc.harvest import transcoder_input

    model, tokenizer = gemma
    batch = tokens(tokenizer, TEXTS)
    with torch.no_grad(), capture_mlp(model, [0]) as captured:
        model(**batch)
        with replace_mlp(model, {0: delta}, collect_stats=True) as stats:
            model(**batch)
    x = transcoder_input(model, 0, "normalized", captured.resid_mid[0])[captured.positions.counted]
    base, new = delta.base.encode(x), delta.encode_delta(x)
    assert stats[0].l0_base == (base > 0).sum() and stats[0].l0_delta == (new > 0).sum()
    assert stats[0].l1_base == pytest.approx(base.sum().item(), rel=1e-4)
    assert stats[0].l1_delta == pytest.approx(new.sum().item(), rel=1e-4)


def test_calls_whose_positions_cannot_be_known_are_refused(gemma, delta):
    model, tokenizer = gemma
    batch = tokens(tokenizer, TEXTS)
    embeds = model.model.embed_tokens(batch["input_ids"])
    with torch.no_grad(), replace_mlp(model, {0: delta}):
        with pytest.raises(PositionError, match="no attention_mask"):
            model(inputs_embeds=embeds)
        with pytest.raises(PositionError, match="attention_mask is not of shape"):
            model(input_ids=batch["input_ids"], attention_mask=torch.ones(3, 1, 1, batch["input_ids"].shape[1]))
        with pytest.raises(PositionError, match="dynamic KV cache"):
            model.generate(**batch, max_new_tokens=3, do_sample=False, cache_implementation="static")
        cache = DynamicCache(config=model.config)
        model(input_ids=batch["input_ids"][:, :5], past_key_values=cache, use_cache=True)
        for n_columns in (1, 5, 7):  # 5 cached positions and 1 new one are 6
            with pytest.raises(PositionError, match=rf"shape \[3, {n_columns}\]; expected \[3, 6\]"):
                model(
                    input_ids=batch["input_ids"][:, 5:6], attention_mask=torch.ones(3, n_columns), past_key_values=cache
                )
        with pytest.raises(PositionError, match="neither input_ids nor inputs_embeds"):
            find_positions(None, None, None, 0, model.config)
        by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        by_ids = model(**batch).logits
    at = batch["attention_mask"].bool()
    torch.testing.assert_close(by_embeds[at], by_ids[at])


def test_positions_are_absolute():
    config = type("Config", (), {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0})()
    ids, mask = torch.tensor([[0, 0, 2, 7, 1], [2, 7, 8, 9, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    replaced, counted = find_positions(ids, None, mask, 0, config)
    assert replaced.tolist() == [[False, False, False, True, True], [False, True, True, True, True]]
    assert counted.tolist() == [[False, False, False, True, False], [False, True, True, True, False]]
    # A cached step has length 1 and is no sequence's first position; without a mask the cache says where it is.
    assert find_positions(torch.tensor([[7]]), None, torch.ones(1, 6), 5, config)[0].tolist() == [[True]]
    assert find_positions(torch.tensor([[7]]), None, None, 5, config)[0].tolist() == [[True]]
    assert find_positions(torch.tensor([[7]]), None, None, 0, config)[0].tolist() == [[False]]
    # A finished row of a batch is fed pad tokens under a mask of ones.
    assert find_positions(torch.tensor([[0]]), None, torch.ones(1, 6), 5, config)[0].tolist() == [[False]]


def test_bad_arguments_are_refused_before_any_hook(gemma, delta):
    model, _ = gemma
    before = n_hooks(model)
    base = random_transcoder(0)
    bad = (
        ({9: delta}, {}, ModelError, "layer 9 does not exist"),
        ({0: delta}, {"mode": "off"}, SiteError, "mode"),
        ({0: base}, {"alpha": 0.5}, PartsNotRecorded, "records no delta"),
        ({0: base}, {"mode": "no_delta"}, PartsNotRecorded, "records no delta"),
        ({0: random_transcoder(0, d_model=16)}, {}, SiteError, "width 16"),
    )
    for transcoders, options, error, message in bad:
        with pytest.raises(error, match=message), replace_mlp(model, transcoders, **options):
            pass
    with pytest.raises(ModelError, match="not of the Gemma-2 layout"):
        decoder_layers(nn.Linear(2, 2))
    assert n_hooks(model) == before


def test_the_original_systems_site_scales_both_ways(gemma):
    model, tokenizer = gemma
    base = random_transcoder(0)
    old = Transcoder(
        *(getattr(base, k) for k in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")), site="resid_mid_over_sqrt_d"
    )
    batch = tokens(tokenizer, TEXTS[:1])
    with torch.no_grad(), capture_mlp(model, [1]) as captured:
        model(**batch)
        with replace_mlp(model, {1: old}), capture_mlp(model, [1]) as replaced:
            model(**batch)
    scale = 32**0.5
    wanted = base(captured.resid_mid[1] / scale) * scale
    torch.testing.assert_close(replaced.mlp_out[1][:, 1:], wanted[:, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(replaced.mlp_out[1][:, :1], captured.mlp_out[1][:, :1])  # BOS keeps its own
