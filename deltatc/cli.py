"""The `deltatc` command: chat, stats, summary and manifest. Argument parsing and printing only."""

import argparse
import sys
from pathlib import Path

from deltatc.errors import DeltatcError

FUSED = Path("artifacts/fused")
FINETUNED = Path("artifacts/finetuned")


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; bad input ends it with one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="deltatc", description="What did a finetune change inside a model?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chat = commands.add_parser("chat", help="answer prompts four ways: unfinetuned, raw, base-only, fused")
    chat.add_argument("--prompt", help="answer this one and stop (default: ask for prompts)")
    chat.add_argument("--layer", default="all", help="replace this layer's MLP, or all (default)")
    chat.add_argument("--max-new-tokens", type=int, default=64)
    stats = commands.add_parser("stats", help="each layer's L0, L1 and strongest latents at a prompt's last token")
    stats.add_argument("prompt")
    for command in (chat, stats):
        command.add_argument("--config", help="a configuration such as d32_p0.50 (default: the studied one)")
    commands.add_parser("summary", help="the headline numbers, and where the plots and the report lie")
    manifest = commands.add_parser("manifest", help="write the hashes of a large folder, for DVC to depend on")
    manifest.add_argument("folder", type=Path)
    manifest.add_argument("file", type=Path)
    for command, run in ((chat, _chat), (stats, _stats), (manifest, _manifest)):
        command.set_defaults(run=run)
    commands.choices["summary"].set_defaults(run=_summary)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except DeltatcError as error:
        sys.exit(f"deltatc: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _chat(options: argparse.Namespace) -> None:
    from deltatc.stats import side_by_side

    params, tokenizer, model, transcoders = _study(options.config, options.layer)
    from deltatc.models import load_model

    unfinetuned = load_model(params.model.path, params.device, params.dtype)
    where = "all layers" if options.layer == "all" else f"layer {options.layer}"
    for prompt in [options.prompt] if options.prompt is not None else _asked():
        print(f"\n{prompt!r}, replacing {where}")
        for answer in side_by_side(unfinetuned, model, tokenizer, prompt, transcoders, options.max_new_tokens):
            text, ended = answer.generation
            print(f"\n{answer.condition}\n  text   {text!r}{'' if ended else ' ... (no end within the limit)'}")
            print(f"  call   {answer.call} = {answer.value}" if answer.call else "  call   none")
            print("  next   " + "  ".join(f"{token!r} {p:.3f}" for token, p in answer.top_tokens))
            print(f"  CE     {answer.ce:.4f} nats a token on the raw model's answer (dCE {answer.delta_ce:+.4f})")


def _stats(options: argparse.Namespace) -> None:
    from deltatc.stats import last_token_latents

    _, tokenizer, model, transcoders = _study(options.config, "all")
    print("layer        L0       L1  strongest latents (number: act)")
    for report in last_token_latents(model, tokenizer, options.prompt, transcoders):
        for part in ("base", "delta"):
            top = "  ".join(f"{latent}: {act:.2f}" for latent, act in getattr(report, f"top_{part}"))
            l0, l1 = getattr(report, f"l0_{part}"), getattr(report, f"l1_{part}")
            print(f"{report.layer:>5} {part:<5} {l0:>3} {l1:>8.2f}  {top}")


def _summary(options: argparse.Namespace) -> None:
    from deltatc.files import read_json

    numbers = read_json("metrics/headline.json")
    width = max(map(len, numbers))
    print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in numbers.items()))
    print(
        "\nreport  report/report.md\nplots   "
        + "\n        ".join(sorted({str(p.parent) for p in Path("plots").rglob("*.png")}))
    )


def _manifest(options: argparse.Namespace) -> None:
    from deltatc.files import write_manifest

    n_files, n_bytes = write_manifest(options.folder, options.file)
    print(f"{options.file}: {n_files} files, {n_bytes / 1e9:.2f} GB")


def _study(config: str | None, layer: str):
    """Load (params, tokenizer, finetuned model, {layer: delta}) of a finished pipeline."""
    from deltatc.config import config_name, load_params, studied
    from deltatc.errors import ConfigError
    from deltatc.formats import load_fused_layers
    from deltatc.models import load_model, load_tokenizer

    params = load_params()
    folder = FUSED / (config or config_name(*studied(params)))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing; run `dvc repro`, or choose a configuration of {FUSED} with --config")
    if layer != "all" and not layer.isdigit():
        raise ConfigError(f"--layer {layer!r}; expected a layer's number or all")
    layers = None if layer == "all" else [int(layer)]
    tokenizer = load_tokenizer(params.model.path)
    model = load_model(FINETUNED, params.device, params.dtype)
    return params, tokenizer, model, load_fused_layers(folder, layers, params.device)


def _asked():
    """Yield prompts typed at a terminal, or lines piped in, until an empty line or the end."""
    while True:
        try:
            prompt = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt.strip():
            return
        yield prompt
