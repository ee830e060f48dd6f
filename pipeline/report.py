"""report: the headline numbers (the declared DVC metric) and a Markdown report beside the plots."""

from stage import METRICS, REPORT, run

from deltatc.config import config_name, load_params, studied
from deltatc.files import read_json, write_json, write_text
from deltatc.report import headline, markdown


def main() -> None:
    params = load_params()
    d_new, percentile = studied(params)
    config = config_name(d_new, percentile)
    also = params.delta.l0_fraction_also
    names = ("prompts", "finetune", "site_check", "delta", "exp1_summary", "exp2a", "exp2b")
    metrics = {name: read_json(METRICS / f"{name}.json") for name in names}
    exp1 = read_json(METRICS / "exp1" / f"{config}.json")
    other = None if also is None else read_json(METRICS / "exp1" / f"{config_name(d_new, percentile, also)}.json")
    numbers = headline(
        metrics["finetune"], metrics["site_check"], exp1, other, metrics["exp2a"], metrics["delta"]["energy"]
    )
    write_text(REPORT / "report.md", markdown(metrics, exp1, config, numbers))
    write_json(METRICS / "headline.json", numbers)


if __name__ == "__main__":
    run(main)
