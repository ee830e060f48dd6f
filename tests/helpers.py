"""A small random Gemma-2 with a byte-level tokenizer: random NON-ZERO norm gains, as zeros hide (1 + w) mistakes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from deltatc.models import load_model
from deltatc.transcoder import Transcoder

N_LAYERS, D_MODEL = 3, 32


def tiny_gemma2(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Write a model folder of 3 layers and width 32, and return it loaded."""
    torch.manual_seed(0)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(["hello world, what is 12 plus 30?"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=48, num_hidden_layers=N_LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
        max_position_embeddings=256, bos_token_id=2, eos_token_id=1, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            parameter.data *= 4  # away from the near-uniform logits of a fresh model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder), AutoTokenizer.from_pretrained(folder)


def random_transcoder(
    seed: int, d_model: int = D_MODEL, d_sae: int = 40, dtype: torch.dtype = torch.float32
) -> Transcoder:
    """Return a transcoder with about half of its latents active on unit-RMS input."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * std).to(dtype)

    W_enc, W_dec = normal(d_model, d_sae, std=0.3), normal(d_sae, d_model, std=0.3)
    threshold = normal(d_sae, std=0.2).abs()
    return Transcoder(W_enc, normal(d_sae, std=0.1), W_dec, normal(d_model, std=0.2), threshold)


def randomized(delta):
    """Give a fresh delta weights that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (delta.W_dec, delta.b_dec, delta.b_enc):
            parameter.normal_(std=0.3)
        delta.threshold.uniform_(0, 0.2)
    return delta
