"""exp2b: base + alpha * delta during generation, for each alpha; alphas 0 and 1 are exp2a's no_delta and full."""

from stage import EXP2B, FINETUNED, FUSED, METRICS, PLOTS, PROMPTS, quiet_transformers, run
from tqdm import tqdm

from deltatc.config import config_name, load_params, studied
from deltatc.evaluate import subsets_of
from deltatc.files import read_json, read_jsonl, write_json
from deltatc.formats import load_fused_layers
from deltatc.intervene import alpha_name, cell_rows, run_condition, save_generations, write_cells
from deltatc.models import load_model, load_tokenizer
from deltatc.plots import plot_exp2b


def main() -> None:
    params = load_params()
    settings, study = params.exp2b, params.exp2a
    subsets = subsets_of(read_jsonl(PROMPTS / "eval.jsonl"), None, study.n)
    known = read_json(METRICS / "exp2a.json")
    fused = FUSED / config_name(*studied(params))
    quiet_transformers()
    tokenizer = load_tokenizer(params.model.path)
    model = load_model(FINETUNED, params.device, params.dtype)
    groups: dict[str, list[int] | None] = {str(layer): [layer] for layer in settings.layers}
    if settings.jointly:
        groups["all"] = None
    alphas = sorted({0.0, 1.0, *settings.alphas})
    result: dict[str, dict[str, dict]] = {}
    with tqdm(total=len(groups) * len(subsets) * (len(alphas) - 2), desc="exp2b", unit="run", disable=None) as bar:
        for group, layers in groups.items():
            transcoders = load_fused_layers(fused, layers, params.device)
            result[group] = {}
            for subset, rows in subsets.items():
                cells = result[group][subset] = {}
                for alpha in alphas:
                    name = alpha_name(alpha)
                    if alpha in (0.0, 1.0):
                        cells[name] = known[group][subset]["no_delta" if alpha == 0 else "full"]
                        continue
                    cells[name], found = run_condition(
                        model, tokenizer, rows, transcoders, alpha, params.batch_size, study.max_new_tokens, name
                    )
                    save_generations(EXP2B / f"layer_{group}_{subset}_alpha_{name}.jsonl", f"alpha_{name}", rows, found)
                    bar.update()
    write_json(METRICS / "exp2b.json", result)
    write_cells(METRICS / "exp2b.csv", cell_rows(result, *studied(params)))
    raw = {subset: known[group][subset]["raw"] for group in result for subset in subsets}
    plot_exp2b(result, raw, PLOTS / "exp2b")


if __name__ == "__main__":
    run(main)
