"""delta: train every delta of the grid (layers x d_new x percentile) beside its frozen base; or take ready ones."""

from dataclasses import asdict

from stage import DELTA, FINETUNED, METRICS, PROMPTS, quiet_transformers, run

from deltatc.config import configurations, load_params
from deltatc.delta import Job, Key, train_deltas
from deltatc.files import read_jsonl, write_csv, write_json
from deltatc.formats import at_percentile, find_transcoders, load_delta, load_transcoder, save_delta
from deltatc.models import check_layers, load_model, load_tokenizer
from deltatc.text import encode_text, full_text


def main() -> None:
    params = load_params()
    settings = params.delta
    found = find_transcoders(params.transcoders.path, params.transcoders.width)
    quiet_transformers()
    tokenizer = load_tokenizer(params.model.path)
    model = load_model(FINETUNED, params.device, params.dtype)
    layers = sorted(found) if settings.layers is None else settings.layers
    check_layers(model, layers, "params.yaml: delta.layers")
    check_layers(model, sorted(found), params.transcoders.path)
    jobs = {
        Key(name, layer): Job(at_percentile(found[layer], percentile), d_new, fraction * d_new)
        for name, d_new, percentile, fraction in configurations(params)
        for layer in layers
    }
    needed = {layer: sorted({job.base_l0 for key, job in jobs.items() if key.layer == layer}) for layer in layers}
    bases = {
        layer: {
            l0: load_transcoder(found[layer][l0], params.transcoders.site).to(params.device) for l0 in needed[layer]
        }
        for layer in layers
    }
    metrics: dict = {"configurations": {}, "energy": {}}
    log = []
    if settings.load_from is not None:
        deltas = {
            key: load_delta(
                f"{settings.load_from}/{key.config}/layer_{key.layer}.safetensors", bases[key.layer][job.base_l0]
            )
            for key, job in jobs.items()
        }
    else:
        texts = {
            name: [
                encode_text(tokenizer, full_text(row), settings.max_tokens)
                for row in read_jsonl(PROMPTS / f"delta_{name}.jsonl")
            ]
            for name in ("train", "validation")
        }
        base_model = load_model(params.model.path, params.device, params.dtype)
        trained, energies = train_deltas(
            model, base_model, bases, jobs, texts["train"], texts["validation"], settings, params.batch_size,
            tokenizer.pad_token_id,
        )  # fmt: skip
        deltas = {key: result.delta for key, result in trained.items()}
        for key, result in trained.items():
            log += [{"configuration": key.config, "layer": key.layer, **line._asdict()} for line in result.log]
            best = min(result.log, key=lambda line: line.fvu)
            cell = metrics["configurations"].setdefault(key.config, {})
            cell[str(key.layer)] = {"l0_folder": jobs[key].base_l0, "l0_target": jobs[key].l0, **best._asdict()}
        metrics["energy"] = {
            str(layer): {str(l0): energy._asdict() for l0, energy in by_l0.items()} for layer, by_l0 in energies.items()
        }
    for key, delta in deltas.items():
        source = {"layer": str(key.layer), "base_l0": str(jobs[key].base_l0), "configuration": key.config}
        save_delta(delta, DELTA / key.config / f"layer_{key.layer}.safetensors", source)
    write_json(DELTA / "jobs.json", [{**key._asdict(), **asdict(job)} for key, job in jobs.items()])
    write_json(METRICS / "delta.json", metrics)
    write_csv(METRICS / "delta_log.csv", log, ("configuration", "layer", "step", "loss", "fvu", "l0", "dead_frac"))


if __name__ == "__main__":
    run(main)
