"""Hours and disk of trainings on files: the arithmetic written out, rates given and measured, from the command line."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from image_trees import photos as draw_photos
from tailscope.data.made import photograph, promised, write_tree
from tailscope.data.sources import load
from tailscope.errors import UserError
from tailscope.experiments import hours
from tailscope.experiments.hours import FileRates, rates_of

RATES = FileRates(
    read=400.0, augmented=200.0, cropped=250.0, step=3_000.0, trained=None, view=9_000.0, clean=5_000.0,
    fitted=50_000.0, cores=32, processor="a GPU", gpu=True, kilobytes=110.0, origin="measured here",
)  # fmt: skip
CPU = replace(RATES, gpu=False, step=10.0, view=30.0, clean=20.0, processor="a CPU")
RECIPE = "imagenet(size=24, width=4, epochs=2, batch=32, learning_rate=0.005, views=2)"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(hours, "SECONDS", 0.05)


@pytest.mark.parametrize(
    ("what", "devices", "workers", "seconds", "bound"),
    [
        ("backbones", 1, None, 6_000 / (8 * 200), "decoding"),  # 8 cores for each GPU
        ("backbones", 1, 16, 6_000 / 3_000, "the GPU"),
        ("backbones", 4, None, 6_000 / (32 * 200), "decoding"),
        ("backbones", 8, None, 6_000 / (32 * 200), "decoding"),  # no more cores than there are
        ("backbones", 8, 8, 6_000 / (64 * 200), "decoding"),  # unless somebody says that there are
        ("views", 1, 64, 6_000 / 9_000, "the GPU"),
        ("features", 1, 64, 6_000 / 5_000, "the GPU"),
        ("check", 8, None, 6_000 / (8 * 400), "decoding"),  # the leader does it alone
        ("classifiers", 8, None, 6_000 / 50_000, "the CPU"),
    ],
)
def test_a_phase_takes_as_long_as_its_slower_station(what, devices, workers, seconds, bound):
    timed = hours._timed((what, 6_000), RATES, devices, True, workers)
    assert timed["seconds"] == pytest.approx(seconds)
    assert timed["bound"] == bound


def test_a_cpu_does_both_one_after_the_other():
    timed = hours._timed(("backbones", 600), CPU, 1, False, None)
    assert timed["seconds"] == pytest.approx(600 / 10 + 600 / (32 * 200))
    whole = hours._timed(("backbones", 600), replace(CPU, trained=8.0), 1, False, None)
    assert whole["seconds"] == pytest.approx(600 / 8)  # what the store remembers has decoding in it


def test_no_hours_of_a_gpu_that_is_not_known():
    timed = [hours._timed((what, 600), CPU, 4, True, None) for what in ("check", "backbones", "classifiers")]
    total = hours._total(timed)
    assert (total["seconds"], total["bound"], timed[1]["seconds"]) == (None, None, None)
    assert total["at_least"] == pytest.approx(600 / (8 * 400) + 600 / (32 * 200) + 600 / 50_000)


def test_a_rate_is_a_number_or_what_another_machine_printed(tmp_path):
    given = rates_of("2500", lambda: CPU)
    assert (given.step, given.view, given.gpu, given.augmented) == (2_500.0, 2_500.0, True, CPU.augmented)
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": asdict(RATES)}))
    assert rates_of(str(file), pytest.fail) == replace(RATES, origin="read from rates.json")
    assert rates_of(None, lambda: CPU) == CPU


@pytest.mark.parametrize("text", ["0", "-3", "inf", "nan", "nowhere.json", "empty.json", "other.json", "zero.json"])
def test_what_is_no_rate_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("{}")
    Path("other.json").write_text("no JSON")
    Path("zero.json").write_text(json.dumps({"rates": {**asdict(RATES), "augmented": 0}}))
    with pytest.raises(UserError, match=f"^--rate {text}: expected"):
        rates_of(text, lambda: CPU)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    draw_photos(root, [30, 30, 30], split="train", side=20)
    draw_photos(root, [8, 8, 8], split="test", seed=1, side=20)
    return root


def planned(root: Path, out: Path, *more: str) -> tuple[str, ...]:
    fixed = ("swap", "--data", f"folder:{root}", "--profile", "exp:6", "--recipe", RECIPE, "--seeds", "1", "--plan")
    return (*fixed, "--device", "cpu", "--out", str(out), *more)


def test_a_plan_from_the_command_line_trains_nothing(tailscope_, tree, tmp_path):
    shown = tailscope_(*planned(tree, tmp_path / "out", "--json"))
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert [b["stored"] for b in found["plan"]["backbones"]] == [False, False]
    assert found["plan"]["views"] == 2 * 2 * 90
    images = {phase["what"]: phase["images"] for phase in found["estimates"][0]["phases"]}
    lt = sum((30, 12, 5))
    assert images == {
        "check": 90 + 24, "backbones": 2 * (lt + 90), "views": 360, "features": 2 * 24,
        "classifiers": 10 * 2 * (lt + 90),
    }  # fmt: skip
    assert [(one["devices"], one["gpu"]) for one in found["estimates"]] == [(1, False), (1, True), (4, True), (8, True)]
    assert found["estimates"][0]["seconds"] > 0
    assert found["estimates"][1]["seconds"] is None
    assert any("no rate of a GPU is known here" in line for line in found["told"])
    assert found["disk_bytes"]["features"] == 2 * 24 * 32 * 4  # eight times the width, float32
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": asdict(RATES)}))
    text = tailscope_(*planned(tree, tmp_path / "out", "--rate", str(file), "--devices", "2"))
    assert text.code == 0
    assert "a GPU trains 3,000 images a second (read from rates.json, decoding apart)" in text.out
    assert "2 GPUs: 1 min" in text.out


def test_a_rate_without_a_plan_is_refused(tailscope_, tree, tmp_path):
    arguments = [word for word in planned(tree, tmp_path, "--rate", "3") if word != "--plan"]
    shown = tailscope_(*arguments)
    assert (shown.code, shown.err) == (2, "error: --rate: only with --plan\n")


@pytest.mark.parametrize("rate", ["-3", "nonsense.json", "500"])
def test_a_rate_is_of_images_in_files_alone(tailscope_, rate):
    shown = tailscope_("swap", "--data", "digits", "--recipe", "demo", "--plan", "--rate", rate)
    assert (shown.code, shown.out, shown.err) == (2, "", "error: --rate: only with --plan, of images in files\n")


@pytest.mark.slow
def test_imagenet_is_planned_without_an_image(tailscope_, tmp_path):
    fixed = ("reproduce", "table1", "--dataset", "imagenet-lt", "--plan", "--seeds", "1", "--device", "cpu")
    shown = tailscope_(*fixed, "--recipe", RECIPE, "--out", str(tmp_path), "--json")
    assert shown.code == 0
    backbones = json.loads(shown.out)["plan"]["backbones"]
    assert [b["images"] for b in backbones] == [2 * 115_846, 2 * 1_281_167]


def test_photographs_are_made_once_and_the_same_again(tmp_path):
    sizes = list(write_tree(tmp_path, [2, 1], split="train")) + list(write_tree(tmp_path, [1, 1], split="test"))
    assert all(30_000 < size < 130_000 for size in sizes)
    data = load(f"folder:{tmp_path}")
    assert (data.train.counts(), data.test.counts()) == ([2, 1], [1, 1])
    assert max(data.train.image(0).size) == 500
    assert (tmp_path / "train" / "n00001" / "00000.jpg").read_bytes() == photograph(1, 0)
    assert photograph(1, 0) != photograph(1, 0, seed=1)  # a test photograph is no training photograph


def test_promised_images_are_numbers_alone():
    data = promised("imagenet", [3, 2], [1, 1])
    assert data.train.take([4, 0]).labels.tolist() == [1, 0]
    assert data.train.image(1).mode == "RGB"
    assert data.fingerprint != promised("imagenet", [2, 3], [1, 1]).fingerprint


def test_a_plan_counts_pre_training(tailscope_, tree, tmp_path):
    shown = tailscope_(*planned(tree, tmp_path / "out", "--pretrain", "rotation(length=5)", "--json"))
    found = json.loads(shown.out)
    names = [backbone["encoder"] for backbone in found["plan"]["backbones"]]
    assert names == ["lt, pre-training", "lt", "true, pre-training", "true"]
    images = {phase["what"]: phase["images"] for phase in found["estimates"][0]["phases"]}
    assert images["backbones"] == (1 + 5) * 2 * (47 + 90)


@pytest.mark.parametrize("verb", ["compare", "memorization"])
def test_a_plan_reads_no_image_and_writes_nothing(tailscope_, tree, tmp_path, monkeypatch, verb):
    def unread(*_):
        raise AssertionError("an image is read")

    monkeypatch.setattr("PIL.Image.open", unread)
    fixed = (verb, "--data", f"folder:{tree}", "--profile", "exp:6", "--recipe", RECIPE, "--seeds", "1", "--plan")
    shown = tailscope_(*fixed, "--device", "cpu", "--out", str(tmp_path / "out"), "--on", "ray", "--gpus", "0.25")
    assert (shown.code, shown.err) == (0, "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    refused = tailscope_(*fixed, "--out", str(tmp_path / "out"), "--gpus", "0.25")
    assert (refused.code, refused.err) == (2, "error: --gpus: only with --on ray\n")
