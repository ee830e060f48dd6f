"""Base transcoders of the tiny model: three L0s a layer, in Gemma Scope's layout, trained on pretraining text alone."""

import random
from pathlib import Path

import torch
from tqdm import tqdm

from deltatc.files import read_jsonl
from deltatc.formats import save_transcoder
from deltatc.harvest import harvest, take_tokens, transcoder_input
from deltatc.models import decoder_layers, load_model, load_tokenizer
from deltatc.sites import DEFAULT_SITE
from deltatc.text import encode_text
from deltatc.train import CoderTrainer, Recipe
from deltatc.transcoder import Transcoder
from pipeline.bootstrap.corpus import Corpus

D_SAE, WIDTH = 1024, "1k"
L0S = (12, 24, 48)
N_DOCUMENTS = 12_000
N_TOKENS, N_VALIDATION_TOKENS, MAX_TOKENS = 300_000, 12_000, 192
N_STEPS, BATCH_TOKENS, LR = 1600, 512, 0.01


def train_base_transcoders(corpus: Corpus, folder: Path, seed: int) -> None:
    """Write folder/tiny-transcoders/layer_L/width_1k/average_l0_N/params.npz for every layer and L0."""
    model, tokenizer = load_model(folder / "tiny"), load_tokenizer(folder / "tiny")
    draw = random.Random(seed + 2)
    texts = [corpus.training(draw) for _ in range(N_DOCUMENTS)]
    held_out = [row["text"] for row in read_jsonl(folder / "tiny-text" / "heldout.jsonl")]
    layers = range(len(decoder_layers(model)))
    train, check = (
        harvest(model, take_tokens([encode_text(tokenizer, text, MAX_TOKENS) for text in part], n, seed), layers, 64,
                tokenizer.pad_token_id)
        for part, n in ((texts, N_TOKENS), (held_out, N_VALIDATION_TOKENS))
    )  # fmt: skip
    for layer, l0 in tqdm([(layer, l0) for layer in layers for l0 in L0S], desc="base transcoders", disable=None):
        x, x_check = (
            transcoder_input(model, layer, DEFAULT_SITE, part[layer].resid_mid).clone() for part in (train, check)
        )
        y, y_check = train[layer].mlp_out.clone(), check[layer].mlp_out.clone()
        trainer = CoderTrainer(Recipe(D_SAE, l0, N_STEPS, LR, N_STEPS // 4, N_STEPS, seed + layer), x.shape[1])
        order, queue = torch.Generator().manual_seed(seed + layer), torch.empty(0, dtype=torch.long)
        while not trainer.stopped:
            if len(queue) < BATCH_TOKENS:
                queue = torch.cat([queue, torch.randperm(len(x), generator=order)])
            rows, queue = queue[:BATCH_TOKENS], queue[BATCH_TOKENS:]
            trainer.step(x[rows], y[rows])
            if trainer.n_done % trainer.recipe.eval_every == 0:
                trainer.validate(x_check, y_check)
        best = trainer.best
        assert best is not None
        name = f"average_l0_{round(trainer.log[-1].l0)}"
        transcoder = Transcoder(best.W_enc, best.b_enc, best.W_dec, best.b_dec, best.threshold)
        save_transcoder(
            transcoder, folder / "tiny-transcoders" / f"layer_{layer}" / f"width_{WIDTH}" / name / "params.npz"
        )
