"""finetune: LoRA on tool and copy rows, merged to safetensors; or a ready merged model; then rates by generation."""

from stage import FINETUNED, METRICS, PROMPTS, quiet_transformers, run

from deltatc.config import load_params
from deltatc.files import check_manifest, read_jsonl, write_json
from deltatc.finetune import Validation, finetune, mlp_change
from deltatc.generate import generate, rates
from deltatc.models import load_model, load_tokenizer, save_model, save_pointer


def main() -> None:
    params = load_params()
    settings = params.finetune
    check_manifest(params.model.path, params.model.manifest)
    rows = {name: read_jsonl(PROMPTS / f"{name}.jsonl") for name in ("finetune_train", "finetune_validation", "eval")}
    quiet_transformers()
    tokenizer = load_tokenizer(params.model.path)
    base = load_model(params.model.path, params.device, params.dtype)
    history: list[Validation] = []
    if settings.merged_model is not None:
        model = load_model(settings.merged_model, params.device, params.dtype)
        save_pointer(settings.merged_model, FINETUNED)
    else:
        model, history = finetune(
            load_model(params.model.path, params.device, params.dtype), tokenizer, rows["finetune_train"],
            rows["finetune_validation"], settings, params.batch_size, params.seed,
        )  # fmt: skip
        save_model(model, tokenizer, FINETUNED)
    write_json(
        FINETUNED / "validation.json",
        {"validations": [v._asdict() for v in history], "mlp_change": mlp_change(model, base)},
    )
    metrics = {}
    for subset in dict.fromkeys(row["label"] for row in rows["eval"]):
        part = [row for row in rows["eval"] if row["label"] == subset]
        found = generate(model, tokenizer, part, params.batch_size, settings.max_new_tokens, f"generate {subset}")
        metrics[subset] = rates(part, found)
    write_json(METRICS / "finetune.json", metrics)


if __name__ == "__main__":
    run(main)
