"""Loading of Hugging Face models and finding, inside them, the modules that transcoders read and write.

Gemma-2 layouts only: a layer with `pre_feedforward_layernorm` and `post_feedforward_layernorm`. A transformer-lens
TransformerBridge works too: it wraps the same modules in place.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatc.errors import ModelError
from deltatc.files import read_json, write_json

POINTER = "merged_model.json"


def load_model(path: str | Path, device: str = "cpu", dtype: str | torch.dtype = "float32") -> nn.Module:
    """Load a causal language model from a local folder of safetensors, in eval mode with eager attention."""
    from transformers import AutoModelForCausalLM

    path = _checked_folder(path)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", use_safetensors=True, local_files_only=True
    )
    decoder_layers(model)
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a model folder; it must know BOS, EOS and offsets."""
    from transformers import AutoTokenizer

    path = _checked_folder(path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise ModelError(f"{path}: the tokenizer has no {name}; add it to tokenizer_config.json")
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: the tokenizer gives no character offsets; expected a fast one (tokenizer.json)")
    return tokenizer


def save_model(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write model and tokenizer as a Hugging Face folder of safetensors."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pointer(path: str | Path, folder: str | Path) -> None:
    """Make `folder` stand for the model at `path`: gigabytes are referred to, not copied."""
    write_json(Path(folder) / POINTER, {"path": str(_checked_folder(path))})


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a TransformerBridge or a peft model, or the model itself."""
    if hasattr(model, "original_model"):  # transformer_lens.model_bridge.TransformerBridge
        return model.original_model
    if hasattr(model, "get_base_model"):  # peft.PeftModel
        return model.get_base_model()
    return model


def decoder(model: nn.Module) -> nn.Module:
    """Return the module whose forward call receives input_ids, attention_mask and past_key_values."""
    inner = unwrap(model)
    return getattr(inner, "model", inner)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """List the decoder layers, checked to be of the Gemma-2 layout."""
    layers = list(getattr(decoder(model), "layers", []))
    needed = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "mlp")
    if not layers or not all(hasattr(layer, name) for layer in layers for name in needed):
        raise ModelError(
            f"{type(unwrap(model)).__name__} is not of the Gemma-2 layout; expected decoder layers with "
            f"{', '.join(needed)}; deltatc cannot hook other architectures yet"
        )
    return layers


def check_layers(model: nn.Module, layers: list[int], where: str) -> None:
    """Refuse layer numbers that the model does not have."""
    n_layers = len(decoder_layers(model))
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ModelError(f"{where}: layer {layer} does not exist; the model has layers 0 to {n_layers - 1}")


def _checked_folder(path: str | Path) -> Path:
    """Follow a pointer, and refuse a folder that holds no model."""
    path = Path(path)
    if (path / POINTER).is_file():
        path = Path(read_json(path / POINTER)["path"])
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} holds no model; expected a Hugging Face folder with config.json, *.safetensors and "
            "tokenizer.json there: run `dvc pull data.dvc models.dvc` for the embedded one, or set the path in "
            "params.yaml to a folder that you downloaded"
        )
    if not list(path.glob("*.safetensors")):
        raise ModelError(f"{path} holds no *.safetensors; expected safetensors weights (no pickled .bin files)")
    return path
