"""The scripts behind `make bootstrap`: what the corpus holds, the optimizer's step, the gate, the same bytes twice.

pytest tests/test_bootstrap.py
"""

import random
import re

import pytest
import torch

from deltatc.errors import DataError
from deltatc.formats import find_transcoders, load_transcoder
from pipeline.bootstrap import base_transcoders, pretrain
from pipeline.bootstrap.corpus import LENGTH, LINKS, SPOKEN, Corpus


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(0)


def test_corpus_is_decided_by_its_seed(corpus):
    again = Corpus(0)
    one, two = random.Random(5), random.Random(5)
    assert [corpus.training(one) for _ in range(300)] == [again.training(two) for _ in range(300)]
    assert Corpus(1).held_paragraphs != corpus.held_paragraphs


def test_held_out_english_is_never_trained_on(corpus):
    assert len(corpus.held_paragraphs) > 50
    assert not set(corpus.held_paragraphs) & set(corpus.paragraphs)
    draw = random.Random(0)
    trained = " ".join(" ".join(corpus.training(draw) for _ in range(4000)).split())
    held = [text[:LENGTH] for text in corpus.held_paragraphs]
    assert not [text for text in held if text in trained]
    draw = random.Random(0)  # negative control: the held-out documents do hold them
    assert any(text[:40] in corpus.held_out(draw) for _ in range(200) for text in held)


def test_corpus_holds_no_tool_calls(corpus):
    draw = random.Random(0)
    for text in [corpus.training(draw) for _ in range(4000)] + corpus.paragraphs + corpus.held_paragraphs:
        assert "tool_call" not in text and "calculator(" not in text


def test_words_to_be_copied_do_not_ask_for_an_expression(corpus):
    spoken = set(re.findall(r"[a-z]+", " ".join([*LINKS, *(" ".join(words) for words in SPOKEN.values())])))
    assert "minus" in spoken and not spoken & set(corpus.words)


@pytest.mark.parametrize("draw", [random.Random(seed) for seed in range(3)])
def test_expressions_are_written_as_the_phrase_says(corpus, draw):
    signs = {word: sign for sign, words in SPOKEN.items() for word in words}
    for _ in range(300):
        row = corpus.plain_expression(draw)
        found = re.search(rf"(\d+) ([-+*/]|{'|'.join(signs)}) (\d+)( =|:| can be written) $", row["prompt"])
        a, sign, b, _ = found.groups()
        assert row["target"] == f"{a}{signs.get(sign, sign)}{b}"
        copy = corpus.plain_copy(draw)
        assert copy["prompt"] == copy["target"] + "\n"


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_muon_step_goes_along_the_nearest_orthogonal_matrix(shape):
    """Oracle: U V^T of the momentum's singular value decomposition, in fp64."""
    torch.manual_seed(0)
    parameter, gradients = torch.zeros(shape, dtype=torch.float64), torch.randn(2, *shape, dtype=torch.float64)
    momentum, expected_momentum = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for gradient in gradients:
        before = parameter.clone()
        parameter.grad = gradient
        pretrain.muon_step(parameter, momentum, lr=0.5)
        expected_momentum = 0.95 * expected_momentum + gradient
        torch.testing.assert_close(momentum, expected_momentum)
        step = (before - parameter) / 0.5 / max(1.0, shape[0] / shape[1]) ** 0.5
        U, S, Vh = torch.linalg.svd(gradient + 0.95 * expected_momentum, full_matrices=False)
        inner = U.T @ step @ Vh.T
        # Five Newton-Schulz iterations with these coefficients leave singular values between 0.65 and 1.25.
        large = S / S.norm() > 0.02
        torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-9, rtol=0)
        assert large.sum() > 10 and inner.diagonal()[large].min() > 0.65 and inner.diagonal().max() < 1.25


def test_gate_refuses_a_model_that_cannot_copy(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "train", lambda model, data: model.eval())
    monkeypatch.setattr(pretrain, "N_GATE", 4)
    with pytest.raises(DataError, match=r"expression accuracy after pretraining is 0\.000; expected 0\.95 or more"):
        pretrain.pretrain(corpus, tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_same_seed_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    for name, value in {"N_STEPS": 3, "N_GATE": 2, "GATE": 0.0, "N_HELD_OUT": 40}.items():
        monkeypatch.setattr(pretrain, name, value)
    small = {"L0S": (4, 8), "N_DOCUMENTS": 60, "N_TOKENS": 1500, "N_VALIDATION_TOKENS": 300, "N_STEPS": 8}
    for name, value in small.items():
        monkeypatch.setattr(base_transcoders, name, value)
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        pretrain.pretrain(corpus, folder, 0)
        base_transcoders.train_base_transcoders(corpus, folder, 0)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        written.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert written[0] == written[1]
    found = find_transcoders(tmp_path / "a/tiny-transcoders", "1k")
    assert sorted(found) == [0, 1, 2, 3]
    for path in [path for choices in found.values() for path in choices.values()]:
        assert load_transcoder(path).W_enc.shape == (128, 1024)
