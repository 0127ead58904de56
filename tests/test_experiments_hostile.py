"""Data sets and seeds that nobody tries on purpose end in a valid result or in one line."""

import json

import pytest
import torch

from experiment_setups import CPU, EXPERIMENTS, entries, lab, random_images, settings
from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.experiments.plans import swap
from tailscope.experiments.runs import parse_seeds
from tailscope.experiments.stages import Stages
from tailscope.store import Store


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("1", (0,)),
        ("3", (0, 1, 2)),
        ("0,3", (0, 3)),
        ("7,", (7,)),
        (" 2 , 1 ", (2, 1)),
        (2, (0, 1)),
        ("9" * 30 + ",", (10**30 - 1,)),
    ],
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "a", ",", "1,1", "0,-3", "1e3", "²", "1001", "9" * 31 + ",", "9" * 9999]
)
def test_other_seeds_are_one_line(text):
    with pytest.raises(UserError, match="--seeds") as raised:
        parse_seeds(text)
    assert "\n" not in str(raised.value)


HOSTILE = {
    "two classes, one image in the second": ([40, 30], (8, 8, 1), "exp:30"),
    "three classes of 9 x 7": ([30, 20, 10], (9, 7, 1), "exp:10"),
    "one image a class": ([1, 1, 1, 1], (8, 8, 3), "full"),
    "imbalance factor 1": ([12, 12, 12], (8, 5, 3), "exp:1"),
    "full": ([25, 9, 3], (8, 8, 1), "full"),
    "step": ([20, 20, 20], (8, 8, 1), "step:20"),
}
NAMES = (
    "<script>alert('a, \"b\"')</script>",
    "[/bold] \\[red]",
    "\u202eRTL \U0001f600 caf\u00e9\n2\x00\x1b[2J\udce9",
    "=1+1|`$(x)`",
)


@pytest.mark.parametrize(("counts", "shape", "profile"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_data_sets_end_in_valid_results(counts, shape, profile, tmp_path):
    names = NAMES[: len(counts)]
    data = ImageData("hostile", random_images(counts, shape, names), random_images([5] * len(counts), shape, names))
    chosen = settings(profile=profile, seeds=(0, 10**20), matched=True)
    own = Stages(data, Store(tmp_path), CPU)
    for verb in EXPERIMENTS:
        result = EXPERIMENTS[verb](own, chosen)
        text = json.dumps(result, allow_nan=False)
        assert json.loads(text)["dataset"]["class_names"] == list(names)
        if len(counts) < 3:
            assert result["groups"] == [None] * len(counts)
            for cell in result.get("cells", {}).values():
                assert cell["groups"] == {"head": None, "body": None, "tail": None}


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_autoaugment_cannot_take_are_refused_before_the_first_training(channels, tmp_path):
    data = ImageData("rgba", *[random_images([5, 5], (8, 8, channels), ("a", "b"))] * 2)
    own = Stages(data, Store(tmp_path), CPU)
    with pytest.raises(UserError, match=f"images have {channels} channels"):
        EXPERIMENTS["ladder"](own, settings(profile="balanced"))
    assert entries(own.store, "stage1") == 0
    assert len(swap(own, settings(profile="balanced", seeds=(0,)))["cells"]) == 4


def test_a_class_without_test_images_has_no_accuracy(tmp_path):
    names = ("a", "b", "c")
    test = random_images([6, 5, 4], (8, 8, 1), names)
    data = ImageData("gap", random_images([9, 6, 3], (8, 8, 1), names), test.take(torch.arange(6)))
    for verb in EXPERIMENTS:
        result = EXPERIMENTS[verb](lab(tmp_path, data), settings(profile="full"))
        json.dumps(result, allow_nan=False)
    cell = swap(lab(tmp_path, data), settings(profile="full"))["cells"]["lt->lt"]
    assert cell["per_class"][1:] == [None, None]
