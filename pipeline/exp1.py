"""exp1: how well does base-only, and base + delta, stand in for each layer's MLP of the finetuned model?"""

from stage import FINETUNED, FUSED, METRICS, PLOTS, PROMPTS, quiet_transformers, run

from deltatc.config import configurations, load_params
from deltatc.evaluate import Condition, Sums, compare_replacements, encode_rows, subsets_of
from deltatc.files import read_jsonl, write_csv, write_json
from deltatc.formats import load_transcoder
from deltatc.models import load_model, load_tokenizer
from deltatc.plots import plot_exp1
from deltatc.report import exp1_row
from deltatc.transcoder import DeltaTranscoder, Transcoder


def main() -> None:
    params = load_params()
    settings = params.exp1
    rows = read_jsonl(PROMPTS / "eval.jsonl")
    quiet_transformers()
    tokenizer = load_tokenizer(params.model.path)
    model = load_model(FINETUNED, params.device, params.dtype)
    sequences = {
        subset: encode_rows(tokenizer, part, settings.max_tokens)
        for subset, part in subsets_of(rows, settings.subsets, settings.n).items()
    }
    names = [name for name, *_ in configurations(params)]
    layers = sorted(int(folder.name.removeprefix("layer_")) for folder in (FUSED / names[0]).iterdir())
    by_config: dict[str, dict] = {name: {} for name in names}
    table: dict[str, list] = {name: [] for name in names}
    for layer in layers:  # one layer's transcoders in memory at a time
        conditions: dict[Condition, Transcoder | DeltaTranscoder] = {}
        base_of: dict[str, int] = {}
        for name in names:
            base, delta = load_transcoder(FUSED / name / f"layer_{layer}").to(params.device).unfuse()
            base_of[name] = int(base.metadata["base_l0"])
            conditions.setdefault(Condition(layer, f"base_{base_of[name]}"), base)
            conditions[Condition(layer, name)] = delta
        pooled: dict[Condition, Sums] = {condition: Sums() for condition in conditions}
        raw = Sums()
        for subset, part in sequences.items():
            ran, sums = compare_replacements(
                model, part, conditions, params.batch_size, tokenizer.pad_token_id, f"exp1 layer {layer} {subset}"
            )
            raw.merge(ran)
            for condition, found in sums.items():
                pooled[condition].merge(found)
            for name in names:
                row = _row(ran, sums, layer, name, base_of[name])
                table[name].append({"layer": layer, "subset": subset, "n": len(part), **row})
        for name in names:
            by_config[name][str(layer)] = _row(raw, pooled, layer, name, base_of[name])
    for name in names:
        write_json(METRICS / "exp1" / f"{name}.json", by_config[name])
        write_csv(METRICS / "exp1" / f"{name}.csv", table[name], list(table[name][0]))
        plot_exp1(by_config[name], name, PLOTS / "exp1")


def _row(raw: Sums, sums: dict[Condition, Sums], layer: int, name: str, l0_folder: int) -> dict:
    base, full = sums[Condition(layer, f"base_{l0_folder}")], sums[Condition(layer, name)]
    return exp1_row(raw.means()["ce"], base.means(), full.means(), l0_folder)


if __name__ == "__main__":
    run(main)
