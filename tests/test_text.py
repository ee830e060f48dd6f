"""Token batches: one BOS, a target mask by characters, padding on either side.

pytest tests/test_text.py
"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deltatc.text import Encoded, batches, encode_prompt, encode_row, encode_text, full_text, pad

SPECIAL = ["<pad>", "<eos>", "<bos>"]
PAD, EOS, BOS = range(3)
ROWS = [
    {"input": "what is 12 plus 30?", "target": "12+30"},
    {"input": "ends in newlines\n\n", "target": "\nbegins with one"},
    {"input": "naïve café 🙂", "target": "🙂 ünïcode\n✓"},
    {"input": "", "target": "x"},
    {"input": "one", "target": "two\nlines\n"},
]


def byte_tokenizer(corpus, use_regex):
    """A byte-level BPE that, like Gemma's, adds BOS of its own; without the regex, merges cross the newline."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    inner.train_from_iterator(corpus, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([full_text(row) for row in ROWS] * 3, use_regex=True)


def n_bytes(tokenizer, ids):
    """Bytes that each token stands for: one a symbol of the byte-level alphabet."""
    return [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def n_prompt_by_bytes(tokenizer, row, ids):
    """Tokens that end before the target's first byte, BOS included; counted in bytes, without offsets."""
    limit, ends, total = len((row["input"] + "\n").encode()), 1, 0
    for size in n_bytes(tokenizer, ids[1:-1]):
        total += size
        ends += total <= limit
    return ends


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_the_target_begins_at_its_first_character(tokenizer, row):
    ids, n_prompt = encode_row(tokenizer, row)
    assert ids.count(BOS) == 1 and ids[0] == BOS and ids.count(EOS) == 1 and ids[-1] == EOS
    assert n_prompt == n_prompt_by_bytes(tokenizer, row, ids)
    assert tokenizer.decode(ids[1:-1]) == row["input"] + "\n" + row["target"]
    assert (
        tokenizer.decode(ids[n_prompt:-1]) == row["target"] and tokenizer.decode(ids[1:n_prompt]) == row["input"] + "\n"
    )
    mask = pad([Encoded(ids, n_prompt)], PAD, "right").target_mask[0].tolist()
    assert mask == [False] * n_prompt + [True] * (len(ids) - n_prompt)  # EOS is True


def test_a_token_that_straddles_the_boundary_is_target():
    row = {"input": "say", "target": "yes"}
    straddling = byte_tokenizer([full_text(row)] * 50, use_regex=False)
    ids, n_prompt = encode_row(straddling, row)
    pieces = [straddling.decode([token]) for token in ids[1:-1]]
    crossing = [i for i, piece in enumerate(pieces) if "\n" in piece and not piece.endswith("\n")]
    assert len(crossing) == 1  # the tokenizer does what this test is about
    assert n_prompt == 1 + crossing[0] == n_prompt_by_bytes(straddling, row, ids)


def test_bos_comes_once_though_the_tokenizer_adds_its_own(tokenizer):
    assert tokenizer("x").input_ids[0] == BOS  # or else nothing is tested here
    for encoded in (encode_text(tokenizer, "x y"), encode_prompt(tokenizer, ROWS[0]), encode_row(tokenizer, ROWS[0])):
        assert encoded.ids[0] == BOS and encoded.ids.count(BOS) == 1
    assert EOS not in encode_text(tokenizer, "x y").ids and EOS not in encode_prompt(tokenizer, ROWS[0]).ids


def test_a_prompt_ends_in_the_newline_that_the_target_follows(tokenizer):
    for row in ROWS[:1] + ROWS[2:]:
        ids, n_prompt = encode_row(tokenizer, row)
        prompt = encode_prompt(tokenizer, row)
        assert prompt == Encoded(ids[:n_prompt], n_prompt)


def test_text_is_cut_and_rows_are_left_out_when_too_long(tokenizer):
    whole = encode_text(tokenizer, "hello world")
    assert encode_text(tokenizer, "hello world", 4) == Encoded(whole.ids[:4], 4)
    row, n = ROWS[0], len(encode_row(tokenizer, ROWS[0]).ids)
    assert encode_row(tokenizer, row, n) == encode_row(tokenizer, row) and encode_row(tokenizer, row, n - 1) is None


def test_a_row_without_a_target_is_its_input(tokenizer):
    row = {"input": "just this", "target": ""}
    assert full_text(row) == "just this" and full_text(ROWS[0]) == "what is 12 plus 30?\n12+30"
    ids, n_prompt = encode_row(tokenizer, row)
    assert tokenizer.decode(ids[1:-1]) == "just this" and n_prompt == len(ids) - 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_its_side_and_masked(side):
    sequences = [Encoded([2, 7, 8, 9, 1], 3), Encoded([2, 5], 2), Encoded([2, 6, 1], 1)]
    batch = pad(sequences, 99, side)
    rows = {"right": [[2, 7, 8, 9, 1], [2, 5, 99, 99, 99], [2, 6, 1, 99, 99]],
            "left": [[2, 7, 8, 9, 1], [99, 99, 99, 2, 5], [99, 99, 2, 6, 1]]}[side]  # fmt: skip
    targets = {"right": ["00011", "00000", "01100"], "left": ["00011", "00000", "00011"]}[side]
    assert batch.input_ids.tolist() == rows
    assert batch.attention_mask.tolist() == [[int(token != 99) for token in row] for row in rows]
    assert batch.target_mask.tolist() == [[c == "1" for c in row] for row in targets]
    assert batch.attention_mask.dtype == torch.long and batch.target_mask.dtype == torch.bool


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_hold_every_sequence_once_under_its_own_index(batch_size):
    lengths = [5, 2, 9, 2, 7, 3, 3]
    sequences = [Encoded([2, *[10 + i] * (n - 1)], n) for i, n in enumerate(lengths)]
    seen = []
    for indices, batch in batches(sequences, batch_size, 0):
        assert len(indices) == batch.input_ids.shape[0] <= batch_size
        assert batch.input_ids.shape[1] == max(lengths[i] for i in indices)
        for i, ids, mask in zip(indices, batch.input_ids, batch.attention_mask, strict=True):
            assert ids[mask.bool()].tolist() == sequences[i].ids
        seen += indices
    assert sorted(seen) == list(range(7)) and [lengths[i] for i in seen] == sorted(lengths)
    assert list(batches([], batch_size, 0)) == []
