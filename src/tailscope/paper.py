"""What the paper says: its data sets, what it shows of each, and the numbers that it prints.

It is "Where are the bottlenecks in long-tailed classification?", an anonymous conference submission without public
code. Table 1 and Figure 3 print their numbers (`published.json`); Figures 4 to 8 are plots whose values are printed
nowhere.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tailscope.errors import UserError, unknown

SUBSET_SEED = 0
"""The field draws its CIFAR-LT subsets with this seed and shares them between runs."""

EXPERIMENT = {"table1": "swap", "fig2": "swap", "fig3": "ladder"} | {f"fig{n}": "geometry" for n in range(4, 9)}
"""The experiment whose result each table or figure shows."""


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's long-tailed data sets.

    Attributes:
        data: name of the balanced data set that it is a subset of.
        profile: the counts that are kept.
        protocol: the rule that draws them.
        shown: the tables and figures that the paper has of it, or may have: Figures 6 to 8 do not say.
        recipe: the paper's, and `quick` a shortened one.
        in_files: whether the user brings the images, with `--data`.
    """

    data: str
    profile: str
    protocol: str
    shown: tuple[str, ...]
    recipe: str = "paper"
    quick: str = "fast"
    in_files: bool = False


@cache
def read(name: str) -> dict[str, Any]:
    """Return a JSON file of the package.

    >>> counts = read("imagenet_lt_counts.json")["counts"]  # a draw from a Pareto law (Liu et al. 2019)
    >>> sum(counts), max(counts), min(counts)
    (115846, 1280, 5)
    >>> read("published.json")["table1"]["where"]
    'Table 1 (drawn again as Figure 2)'
    """
    document: dict[str, Any] = json.loads(files("tailscope").joinpath("data_files", name).read_text(encoding="utf-8"))
    return document


_ALL = tuple(EXPERIMENT)
_NO_LADDER = tuple(figure for figure in _ALL if figure != "fig3")
_IMAGENET_LT = f"counts:{','.join(map(str, read('imagenet_lt_counts.json')['counts']))}"
BENCHMARKS: dict[str, Benchmark] = {
    "cifar10-lt": Benchmark("cifar10", "exp:100", "ldam", _ALL),
    "cifar100-lt": Benchmark("cifar100", "exp:100", "ldam", _NO_LADDER),
    "imagenet-lt": Benchmark("imagenet", _IMAGENET_LT, "nested", _NO_LADDER, "imagenet", "imagenet-fast", True),
}


IMAGENET_TRAIN, IMAGENET_TEST = [1_282] * 167 + [1_281] * 833, [50] * 1_000
"""About how many images each class of ImageNet has (732 to 1,300), 1,281,167 in all, and exactly of its test split."""


def benchmark(dataset: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        UserError: there is none; the known are listed.
    """
    if dataset not in BENCHMARKS:
        raise unknown("--dataset", dataset, BENCHMARKS)
    return BENCHMARKS[dataset]


def dataset_of(result: Mapping[str, Any]) -> str | None:
    """Return the benchmark that a stored result is about, by its data and profile; None for any other data."""
    spec = result["spec"]
    for name, known in BENCHMARKS.items():
        if (spec.get("data"), spec.get("profile")) == (known.data, known.profile):
            return name
    return None


def experiments(what: str, dataset: str) -> list[str]:
    """Return the experiments that a table, a figure or `all` needs, in the order in which they are run.

    >>> experiments("fig2", "cifar10-lt"), experiments("all", "cifar100-lt")
    (['swap'], ['swap', 'geometry'])

    Raises:
        UserError: the table or figure is unknown, or the paper has none of it for this data set.
    """
    known = benchmark(dataset)
    if what == "all":
        return list(dict.fromkeys(EXPERIMENT[figure] for figure in known.shown))
    if what not in EXPERIMENT:
        raise unknown("table or figure", what, [*EXPERIMENT, "all", "everything"])
    if what not in known.shown:
        source = "list:TRAIN.txt,TEST.txt" if known.in_files else known.data
        raise UserError(
            f"reproduce {what} --dataset {dataset}: the paper has no such figure for it; "
            f"`tailscope {EXPERIMENT[what]} --data {source}` runs the experiment"
        )
    return [EXPERIMENT[what]]


# -- printed numbers: fractions, empty where the paper has none of this data set -----------------------------------


def table1(dataset: str | None) -> dict[str, float]:
    """Return Table 1's accuracies by `backbone->classifier`.

    >>> table1("cifar10-lt")["true->lt"], table1("digits")
    (0.9106, {})
    """
    return dict(read("published.json")["table1"]["accuracy"].get(dataset, {}))


def figure3(dataset: str | None) -> dict[str, float]:
    """Return Figure 3's accuracies by `augmentation: rung`.

    >>> figure3("cifar10-lt")["autoaugment+mixup: stage2"], figure3("cifar100-lt")
    (0.825, {})
    """
    columns: Mapping[str, Mapping[str, float]] = read("published.json")["fig3"]["accuracy"].get(dataset, {})
    # Printed in per cent; rounding takes off what dividing by 100 adds beyond the printed digits.
    return {f"{name}: {rung}": round(v / 100, 6) for name, column in columns.items() for rung, v in column.items()}


def stage1(dataset: str | None) -> dict[str, float]:
    """Return the lt backbone's own accuracy, which the paper prints in Figure 3 alone.

    >>> stage1("cifar10-lt"), stage1("cifar100-lt")
    ({'lt stage1': 0.7178}, {})
    """
    printed = figure3(dataset)
    return {"lt stage1": printed["none: stage1"]} if printed else {}
