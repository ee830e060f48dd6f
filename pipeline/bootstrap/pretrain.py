"""Tokenizer and pretraining of the tiny model; refuses to write a model that cannot copy.

Muon on the matrices (Jordan 2024) and AdamW on embedding and norms: with AdamW alone, copying appears much later.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deltatc.errors import DataError
from deltatc.files import write_jsonl
from deltatc.models import save_model
from pipeline.bootstrap.corpus import Corpus

VOCABULARY = 1024
N_STEPS = 2000
BATCH_ROWS, LENGTH = 28, 128
MUON_LR, ADAM_LR = 0.02, 0.005
N_GATE = 1000  # held-out prompts of each kind: with 200 the gate measures luck
GATE = 0.95  # share of them that have to be exactly right
N_HELD_OUT = 1500  # documents


def pretrain(corpus: Corpus, folder: Path, seed: int) -> None:
    """Write folder/tiny (model and tokenizer) and folder/tiny-text/heldout.jsonl."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokenizer = train_tokenizer(corpus, draw)
    model = build_model(tokenizer)
    train(model, packed(corpus, tokenizer, draw))
    check = random.Random(seed + 1)
    for kind, example in (("expression", corpus.plain_expression), ("copy", corpus.plain_copy)):
        accuracy = exact_match(model, tokenizer, [example(check) for _ in range(N_GATE)])
        print(f"{kind} accuracy {accuracy:.3f}")
        if accuracy < GATE:
            raise DataError(
                f"{kind} accuracy after pretraining is {accuracy:.3f}; expected {GATE} or more: train longer"
            )
    save_model(model, tokenizer, folder / "tiny")
    draw_held = random.Random(seed + 3)
    held_out = [{"text": corpus.held_out(draw_held)} for _ in range(N_HELD_OUT)]
    write_jsonl(folder / "tiny-text" / "heldout.jsonl", held_out)


def train_tokenizer(corpus: Corpus, draw: random.Random) -> Any:
    """Train byte-level BPE with single digits; its encoding starts with BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator((corpus.training(draw) for _ in range(12_000)), trainer)
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def build_model(tokenizer: Any) -> nn.Module:
    """Return an untrained Gemma-2-architecture model of 0.9 M parameters."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=64,
        max_position_embeddings=512, initializer_range=0.04, tie_word_embeddings=True, attn_implementation="eager",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    # Times sqrt(d_model) the residual stream starts at about unit RMS; smaller, and copying hardly appears.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.08)
    return model


def packed(corpus: Corpus, tokenizer: Any, draw: random.Random) -> Iterator[Tensor]:
    """Yield [rows, length] of <bos>document<eos> joined end to end."""
    buffer: list[int] = []
    while True:
        while len(buffer) < BATCH_ROWS * LENGTH:
            buffer += [*tokenizer.encode(corpus.training(draw)), tokenizer.eos_token_id]
        yield torch.tensor(buffer[: BATCH_ROWS * LENGTH]).view(BATCH_ROWS, LENGTH)
        buffer = buffer[BATCH_ROWS * LENGTH :]


def train(model: nn.Module, data: Iterator[Tensor]) -> None:
    """Train N_STEPS steps: a short warm-up, constant to the half, then linear to zero."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    momenta = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    with tqdm(range(N_STEPS), desc="pretrain", unit="step", disable=None) as bar:
        for step in bar:
            rate = min(1.0, (step + 1) / 30, 2 * (1 - step / N_STEPS))
            batch = next(data)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            for parameter, momentum in zip(matrices, momenta, strict=True):
                muon_step(parameter, momentum, MUON_LR * rate)
            for group in adam.param_groups:
                group["lr"] = ADAM_LR * rate
            adam.step()
            model.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()


@torch.no_grad()
def muon_step(parameter: Tensor, momentum: Tensor, lr: float) -> None:
    """Take a Nesterov momentum step along the nearest orthogonal matrix, by five Newton-Schulz iterations."""
    momentum.mul_(0.95).add_(parameter.grad)
    x = parameter.grad + 0.95 * momentum
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if tall else x
    parameter.add_(x, alpha=-lr * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)


def exact_match(model: nn.Module, tokenizer: Any, rows: list[dict]) -> float:
    """Return the share of rows whose every target token is the model's most likely one."""
    right = 0
    for row in rows:
        text, start = row["prompt"] + row["target"], len(row["prompt"])
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        n_prompt = 1 + sum(end <= start for _, end in found["offset_mapping"])
        ids = [tokenizer.bos_token_id, *found["input_ids"]]
        with torch.inference_mode():
            guesses = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        right += guesses[n_prompt - 1 : -1].tolist() == ids[n_prompt:]
    return right / len(rows)
