"""exp1_summary: each configuration's means and maxima over layers, and two heatmaps of them."""

from stage import METRICS, PLOTS, run

from deltatc.config import configurations, load_params
from deltatc.files import read_json, write_json
from deltatc.plots import plot_heatmaps
from deltatc.report import summarize


def main() -> None:
    params = load_params()
    summary = {name: summarize(read_json(METRICS / "exp1" / f"{name}.json")) for name, *_ in configurations(params)}
    write_json(METRICS / "exp1_summary.json", summary)
    plot_heatmaps(summary, params.delta.d_new, params.delta.percentiles, PLOTS / "exp1_summary")


if __name__ == "__main__":
    run(main)
