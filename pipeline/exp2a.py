"""exp2a: raw, fused and no_delta, in each chosen layer and in all jointly: what does the model then generate?"""

from stage import EXP2A, FINETUNED, FUSED, METRICS, PLOTS, PROMPTS, quiet_transformers, run
from tqdm import tqdm

from deltatc.config import config_name, load_params, studied
from deltatc.evaluate import subsets_of
from deltatc.files import read_jsonl, write_json
from deltatc.formats import load_fused_layers
from deltatc.intervene import CONDITIONS, cell_rows, run_condition, save_generations, write_cells
from deltatc.models import check_layers, load_model, load_tokenizer
from deltatc.plots import plot_exp2a


def main() -> None:
    params = load_params()
    settings = params.exp2a
    subsets = subsets_of(read_jsonl(PROMPTS / "eval.jsonl"), None, settings.n)
    fused = FUSED / config_name(*studied(params))
    quiet_transformers()
    tokenizer = load_tokenizer(params.model.path)
    model = load_model(FINETUNED, params.device, params.dtype)
    check_layers(model, settings.layers, "params.yaml: exp2a.layers")
    groups: dict[str, list[int] | None] = {str(layer): [layer] for layer in settings.layers}
    if settings.jointly:
        groups["all"] = None  # every layer that was fused
    result: dict[str, dict[str, dict]] = {}
    with tqdm(total=len(subsets) * (1 + 2 * len(groups)), desc="exp2a", unit="run", disable=None) as bar:
        for group, layers in {"raw": [], **groups}.items():
            transcoders = load_fused_layers(fused, layers, params.device)
            result[group] = {subset: {} for subset in subsets}
            for subset, rows in subsets.items():
                for condition, alpha in CONDITIONS[group == "raw"].items():
                    cell, found = run_condition(
                        model,
                        tokenizer,
                        rows,
                        transcoders,
                        alpha,
                        params.batch_size,
                        settings.max_new_tokens,
                        condition,
                    )
                    save_generations(EXP2A / f"layer_{group}_{subset}_{condition}.jsonl", condition, rows, found)
                    result[group][subset][condition] = cell
                    bar.update()
    raw = result.pop("raw")
    for cells in result.values():
        for subset in subsets:
            cells[subset] = raw[subset] | cells[subset]
    write_json(METRICS / "exp2a.json", result)
    write_cells(METRICS / "exp2a.csv", cell_rows(result, *studied(params)))
    plot_exp2a(result, PLOTS / "exp2a")


if __name__ == "__main__":
    run(main)
