"""What can be reproduced: the paper's data sets, and which experiment each of its tables and figures needs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tailscope.errors import UserError

SUBSET_SEED = 0
"""The field draws its CIFAR-LT subsets with this seed and shares them between runs."""

EXPERIMENT = {"table1": "swap", "fig2": "swap", "fig3": "ladder"} | {f"fig{n}": "geometry" for n in range(4, 9)}
"""The experiment whose result each table or figure shows."""

_FIGURES = tuple(EXPERIMENT)


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
def imagenet_lt_counts() -> list[int]:
    """Return ImageNet-LT's published images per class, 115,846 in all (Liu et al. 2019: a draw from a Pareto law).

    >>> sum(imagenet_lt_counts()), max(imagenet_lt_counts()), min(imagenet_lt_counts())
    (115846, 1280, 5)
    """
    text = files("tailscope.paper").joinpath("imagenet_lt_counts.json").read_text(encoding="utf-8")
    counts: list[int] = json.loads(text)["counts"]
    return counts


_NO_LADDER = tuple(f for f in _FIGURES if f != "fig3")
BENCHMARKS: dict[str, Benchmark] = {
    "cifar10-lt": Benchmark("cifar10", "exp:100", "ldam", _FIGURES),
    "cifar100-lt": Benchmark("cifar100", "exp:100", "ldam", _NO_LADDER),
    "imagenet-lt": Benchmark(
        "imagenet",
        f"counts:{','.join(map(str, imagenet_lt_counts()))}",
        "nested",
        _NO_LADDER,
        recipe="imagenet",
        quick="imagenet-fast",
        in_files=True,
    ),
}


def benchmark(dataset: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        UserError: there is none; the known are listed.
    """
    if dataset not in BENCHMARKS:
        raise UserError(f"--dataset {dataset}: cannot be reproduced here; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[dataset]


def experiments(what: str, dataset: str) -> list[str]:
    """Return the experiments that a table, a figure or `all` needs, in the order in which they are run.

    >>> experiments("fig2", "cifar10-lt"), experiments("all", "cifar100-lt")
    (['swap'], ['swap', 'geometry'])

    Raises:
        UserError: the table or figure is unknown, or the paper has none of it for this data set.
    """
    shown = benchmark(dataset).shown
    if what == "all":
        return list(dict.fromkeys(EXPERIMENT[figure] for figure in shown))
    if what not in EXPERIMENT:
        raise UserError(f"reproduce {what}: unknown; known: {', '.join(EXPERIMENT)}, all")
    if what not in shown:
        raise UserError(
            f"reproduce {what} --dataset {dataset}: the paper has no such figure for it; "
            f"`tailscope {EXPERIMENT[what]} --data {_source(dataset)}` runs the experiment"
        )
    return [EXPERIMENT[what]]


def _source(dataset: str) -> str:
    known = benchmark(dataset)
    return "list:TRAIN.txt,TEST.txt" if known.in_files else known.data


def dataset_of(result: Mapping[str, Any]) -> str | None:
    """Return the benchmark that a stored result is about, by its data and profile; None for any other data."""
    spec = result["spec"]
    for name, known in BENCHMARKS.items():
        if (spec.get("data"), spec.get("profile")) == (known.data, known.profile):
            return name
    return None
