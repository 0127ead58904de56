"""Experiments on images in files from the command line: one process, two processes, and what cannot be read."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiment_setups import CPU, timeless
from image_trees import photos as draw_photos
from tailscope import paper, report
from tailscope.data import decoding, sources
from tailscope.data.subsets import resolve
from tailscope.device import form
from tailscope.errors import UserError
from tailscope.experiments.plans import geometry
from tailscope.experiments.runs import Settings
from tailscope.experiments.stages import IMAGENET, Stages
from tailscope.methods import augmentations
from tailscope.seeds import derive, keyed
from tailscope.store import Store
from tailscope.training.recipes import RECIPES, recipe_by_name

RECIPE = "imagenet(size=24, width=4, epochs=2, batch=32, learning_rate=0.005, views=2)"
COUNTS, TEST_COUNTS = [30, 30, 30], [8, 8, 8]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 training and 24 test photographs with their lists."""
    root = tmp_path_factory.mktemp("tree")
    draw_photos(root, COUNTS, split="train", side=20)
    draw_photos(root, TEST_COUNTS, split="test", seed=1, side=20)
    return root


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(report, "build", lambda *_, **__: None)


def swap(root: Path, out: Path, *more: object) -> list[str]:
    lists = f"list:{root / 'train.txt'},{root / 'test.txt'}"
    fixed = ("swap", "--data", lists, "--profile", "exp:6", "--recipe", RECIPE, "--seeds", "1", "--device", "cpu")
    return [*map(str, (*fixed, "--out", out, *more))]


def trained(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("store/stage1/*/meta.json")}


def test_two_processes_give_what_one_that_accumulates_gives(tailscope_, tree, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two processes: bfloat16 rounds otherwise where threads share a sum
    try:
        one = tailscope_(*swap(tree, tmp_path / "one", "--micro-batches", 2, "--data-root", tree))
    finally:
        torch.set_num_threads(threads)
    assert (one.code, one.err) == (0, "")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tailscope", *swap(tree, tmp_path / "two", "--devices", 2, "--workers", 1)]
    two = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stderr == ""
    printed, stored = json.loads(two.stdout), json.loads((tmp_path / "two" / "swap.json").read_text())
    assert printed == stored
    ours, theirs = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert ours.keys() == theirs.keys()  # the split is in no key
    assert len(ours) == 2
    for key, meta in ours.items():
        assert theirs[key]["losses"] == pytest.approx(meta["losses"], rel=1e-5)
        assert (meta["processes"], theirs[key]["processes"]) == (1, 2)
        states = [
            load_file(tmp_path / out / "store" / "stage1" / key / "tensors.safetensors") for out in ("one", "two")
        ]
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)
    alone = json.loads((tmp_path / "one" / "swap.json").read_text())
    assert stored["spec"] == alone["spec"]
    for row, cell in stored["cells"].items():  # rounding may move an item across a boundary
        assert cell["accuracy"] == pytest.approx(alone["cells"][row]["accuracy"], abs=1.5 / sum(TEST_COUNTS))
    assert {(card["micro_batches"], card["processes"]) for card in stored["provenance"]} == {(2, 2)}


@pytest.mark.slow
def test_torchrun_says_how_many_processes_there_are(tree, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--module", "tailscope"]
    ended = subprocess.run([*start, *swap(tree, tmp_path)], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {(meta["processes"], meta["spec"]["train"]["micro_batches"]) for meta in trained(tmp_path).values()} == {
        (2, 2)
    }
    refused = subprocess.run(
        [*start, *swap(tree, tmp_path / "3", "--devices", 3)], env=environment, capture_output=True, text=True
    )
    assert "--devices 3: torchrun has started 2 processes here" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_of_two_processes_goes_on_with_any_number(tree, tmp_path, devices):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    recipe = RECIPE.replace("epochs=2", "epochs=12")

    def command(out: str, *more: object) -> list[str]:
        arguments = swap(tree, tmp_path / out, *more)
        arguments[arguments.index("--recipe") + 1] = recipe
        return [sys.executable, "-m", "tailscope", *arguments]

    with subprocess.Popen(command("cut", "--devices", 2), env=environment, stderr=subprocess.PIPE) as running:
        while not list((tmp_path / "cut").glob("store/scratch/*/checkpoint.safetensors")):
            assert running.poll() is None
            time.sleep(0.05)
        running.kill()
    assert trained(tmp_path / "cut") == {}
    for out, processes in (("cut", devices), ("whole", 2)):
        ended = subprocess.run(command(out, "--devices", processes, "--micro-batches", 2), env=environment)
        assert ended.returncode == 0
    for key, meta in trained(tmp_path / "whole").items():
        assert trained(tmp_path / "cut")[key]["losses"] == pytest.approx(meta["losses"], rel=1e-4)


def children(pid: int) -> list[int]:
    """The followers that a process has started, by Linux's alone; workers that decode are forks of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"LOCAL_RANK=1" in stat.with_name("environ").read_bytes():
                found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the other process in /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "one is killed"])
def test_two_processes_end_together_with_one_true_line_and_go_on(tree, tmp_path, how):
    arguments = swap(tree, tmp_path / "out", "--devices", 2, "--workers", 0)
    arguments[arguments.index("--recipe") + 1] = RECIPE.replace("epochs=2", "epochs=12")
    command, environment = [sys.executable, "-m", "tailscope", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        while not list((tmp_path / "out").glob("store/scratch/*/checkpoint.safetensors")):
            assert running.poll() is None
            time.sleep(0.05)
        (follower,) = children(running.pid)
        if how == "Ctrl-C":
            os.killpg(running.pid, signal.SIGINT)
        else:
            os.kill(follower, signal.SIGKILL)
        said = running.communicate(timeout=300)[1].strip()
    if how == "Ctrl-C":
        assert (running.returncode, said) == (
            130, "interrupted; the same command keeps what is finished and does the rest",
        )  # fmt: skip
    else:
        assert running.returncode == 2
        assert said.startswith("error: another process of this run has ended, with a message of its own or killed")
        assert "\n" not in said
    assert trained(tmp_path / "out") == {}
    assert children(running.pid) == []
    assert subprocess.run(command, env=environment).returncode == 0
    assert {meta["epochs"] for meta in trained(tmp_path / "out").values()} == {12}


def test_the_same_again_trains_nothing_and_workers_do_not_matter(tailscope_, tree, tmp_path):
    first = tailscope_(*swap(tree, tmp_path, "--json"))
    assert first.code == 0
    again = tailscope_(*swap(tree, tmp_path, "--json", "--workers", 0))
    assert "Nothing was trained" in again.err
    assert timeless(json.loads(again.out)) == timeless(json.loads(first.out))


def test_folders_are_the_same_experiment_as_lists(tailscope_, tree, tmp_path):
    arguments = swap(tree, tmp_path, "--json")
    arguments[arguments.index("--data") + 1] = f"folder:{tree}"
    shown = tailscope_(*arguments)
    assert shown.code == 0
    result = json.loads(shown.out)
    assert result["dataset"] == {
        "name": tree.name, "class_names": ["n00", "n01", "n02"], "train_images": 90, "test_images": 24,
    }  # fmt: skip
    assert result["counts"] == [30, 12, 5]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    root = tmp_path / "damaged"
    draw_photos(root, COUNTS, split="train", side=20)
    draw_photos(root, TEST_COUNTS, split="test", seed=1, side=20)
    (root / "train" / "n00" / "3.jpg").unlink()
    file = root / "train" / "n02" / "9.jpg"
    file.write_bytes(file.read_bytes()[:200])
    (root / "test" / "n01" / "0.jpg").write_bytes(b"no image")
    return root


def test_verify_lists_all_that_cannot_be_read_and_stops(tailscope_, damaged, tmp_path):
    shown = tailscope_(*swap(damaged, tmp_path / "out", "--verify"))
    *lines, last = shown.err.splitlines()
    assert (shown.code, shown.out) == (2, "")
    assert [line.split(":")[0] for line in lines] == ["train.txt line 4", "train.txt line 70", "test.txt line 9"]
    assert lines[0] == "train.txt line 4: train/n00/3.jpg: missing"
    assert last.startswith("error: train: 3 images cannot be read: train.txt line 4: train/n00/3.jpg (missing); ")
    assert trained(tmp_path / "out") == {}


def test_a_broken_jpeg_in_a_folder_is_named_by_its_path(tailscope_, damaged, tmp_path):
    arguments = swap(damaged, tmp_path / "out", "--verify")
    arguments[arguments.index("--data") + 1] = f"folder:{damaged}"
    shown = tailscope_(*arguments)
    assert shown.code == 2
    first, *_, last = shown.err.splitlines()
    assert first.startswith("train/n02/9.jpg: cannot be decoded, ")
    assert "2 images cannot be read: train/n02/9.jpg (cannot be decoded, " in last  # the missing one is in no folder


def test_without_verify_they_take_no_part_and_are_counted(tailscope_, damaged, tmp_path, monkeypatch):
    shown = tailscope_(*swap(damaged, tmp_path / "out", "--json"))
    assert shown.code == 0
    result = json.loads(shown.out)
    assert (result["dataset"]["train_images"], result["dataset"]["test_images"]) == (88, 23)
    assert result["counts"] == [29, 11, 4]
    noted = [text for text in result["warnings"] if "took no part" in text]
    assert len(noted) == 1
    assert noted[0].startswith("3 images cannot be read and took no part: train.txt line 4: train/n00/3.jpg (missing)")
    looked_at, find = [], decoding.find_unreadable
    monkeypatch.setattr(decoding, "find_unreadable", lambda of, **how: looked_at.append(of.ids) or find(of, **how))
    again = tailscope_(*swap(damaged, tmp_path / "out", "--json"))
    assert timeless(json.loads(again.out)) == timeless(result)
    assert looked_at == [("train/n00/3.jpg", "train/n02/9.jpg"), ("test/n01/0.jpg",)]


def test_an_image_that_was_mended_takes_part_though_it_is_as_long_as_before(tailscope_, damaged, tmp_path):
    test, broken = damaged / "test" / "n01" / "1.jpg", damaged / "test" / "n01" / "0.jpg"
    broken.write_bytes(bytes(test.stat().st_size))
    first = json.loads(tailscope_(*swap(damaged, tmp_path / "out", "--json")).out)
    assert (first["dataset"]["train_images"], first["dataset"]["test_images"]) == (88, 23)
    broken.write_bytes(test.read_bytes())
    result = json.loads(tailscope_(*swap(damaged, tmp_path / "out", "--json", "--overwrite")).out)
    assert (result["dataset"]["train_images"], result["dataset"]["test_images"]) == (88, 24)
    (noted,) = (text for text in result["warnings"] if "took no part" in text)
    assert noted.startswith("2 images cannot be read and took no part")
    assert "test/n01/0.jpg" not in noted


def test_a_class_without_a_readable_image_is_refused(tailscope_, damaged, tmp_path):
    for file in (damaged / "train" / "n01").iterdir():
        file.write_bytes(b"")
    shown = tailscope_(*swap(damaged, tmp_path / "out"))
    assert shown.code == 2
    assert "class 1 has no training image that can be read" in shown.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"--recipe": "fast"},
            "need an augmentation that makes them one size, not crop(padding=4), flip; take --recipe",
        ),
        ({"--recipe": "imagenet(size=16)"}, "size must be at least 17"),
        ({"--recipe": "imagenet(width=0)"}, "size must be at least 17 and width 1"),
        ({"--recipe": "imagenet(epochs=0)"}, "--recipe imagenet(epochs=0): Input should be greater"),
        (
            {"--recipe": "imagenet(depth=4)"},
            "unknown argument 'depth'; did you mean 'width'? known: size, width",
        ),
        ({"--micro-batches": "17"}, "--micro-batches 17: must be a multiple of the 1 processes and at most half"),
        ({"--data": "digits"}, "images in memory cannot be trained with resized_crop"),
        ({"--data": "digits", "--recipe": "demo", "--devices": "2"}, "digits: --devices, --num-nodes"),
        ({"--data": "list:{tree}/train.txt"}, "needs images to train on and to test on; give list:TRAIN.txt,TEST.txt"),
        ({"--data": "folder:{tree}/train"}, "give folder:PATH with train/ and test/ (or val/)"),
    ],
    ids=str,
)
def test_mistakes(tailscope_, tree, tmp_path, change, says):
    arguments = swap(tree, tmp_path / "out")
    for option, value in change.items():
        value = value.format(tree=tree) if "tree" in value else value
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    shown = tailscope_(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_several_processes_without_lightning(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(UserError, match=r"pip install 'tailscope\[ddp\]'"):
        form(2, 1, "cpu")
    assert form(None, 1, "cpu").size == 1  # needs none


def test_features_and_views_are_the_plain_ones(tree, tmp_path):
    data = sources.load(f"folder:{tree}")
    lab = Stages(data, Store(tmp_path), CPU)
    recipe = recipe_by_name(RECIPE)
    settings = Settings(profile="exp:6", protocol="nested", recipe=recipe, seeds=(4,), permutations=9)
    result = geometry(lab, settings)
    assert [len(e["seeds"]["4"]["paper"]["classes"]) for e in result["encoders"].values()] == [3, 3, 3]
    backbone = lab.backbone(recipe.backbone(lab.true().spec), lab.true().rows, 4, "true")

    def features(rows: list[int], transform, *path: str | int) -> torch.Tensor:
        images = []
        for row in rows:
            with keyed(derive(4, *path, data.train.paths[row], 0)):
                images.append(transform(data.train.image(row)))
        x = ((torch.stack(images).float() - IMAGENET.mean) / IMAGENET.std).permute(0, 3, 1, 2)
        with torch.no_grad():
            return backbone.model.features(x)

    rows = [0, 31, 89]
    clean = features(rows, augmentations.evaluation(recipe.augment))
    torch.testing.assert_close(lab.clean_features(backbone, "train")[rows], clean, rtol=1e-4, atol=1e-5)
    stage2 = recipe.classifier(lab.true().spec)
    viewed = lab.views(backbone, stage2, np.array(rows), 4)[1]
    expected = features(rows, augmentations.training(recipe.augment), "stage2", "augment", 1)
    torch.testing.assert_close(viewed[0], expected, rtol=1e-4, atol=1e-5)
    assert viewed[1].tolist() == [0, 1, 2]


def test_the_papers_table_stands_beside_ours(tailscope_, tree, tmp_path, monkeypatch):
    monkeypatch.setitem(paper.BENCHMARKS, "imagenet-lt", replace(paper.BENCHMARKS["imagenet-lt"], profile="exp:6"))
    lists = f"list:{tree / 'train.txt'},{tree / 'test.txt'}"
    fixed = ("reproduce", "table1", "--dataset", "imagenet-lt", "--data", lists, "--data-root", tree, "--seeds", "1")
    shown = tailscope_(*fixed, "--recipe", RECIPE, "--out", tmp_path / "out", "--device", "cpu", "--json")
    assert shown.code == 0
    assert "backbone true: to train: 6 steps, 180 images" in shown.err
    table = json.loads(shown.out)["tables"]["table1"]
    assert {row["cell"]: row["paper"] for row in table if row["paper"]} == {
        "lt->lt": 0.3531, "lt->true": 0.4586, "true->lt": 0.5383, "true->true": 0.6393,
    }  # fmt: skip
    assert "35.31" in (tmp_path / "out" / "tables" / "paper-table1.md").read_text()


def test_the_counts_are_the_published_ones(published_imagenet_lt_counts):
    published = published_imagenet_lt_counts
    assert [published[str(k)] for k in range(1000)] == paper.read("imagenet_lt_counts.json")["counts"]
    profile = paper.BENCHMARKS["imagenet-lt"].profile
    assert resolve(profile, [1300] * 1000) == paper.read("imagenet_lt_counts.json")["counts"]


def test_the_papers_recipe_is_section_3():
    printed, stage1 = paper.read("published.json")["section3"]["imagenet_stage1"], RECIPES["imagenet"].stage1
    assert RECIPES["imagenet"].model == "resnet10(width=64)"
    for name in ("epochs", "batch", "learning_rate", "momentum", "weight_decay"):
        assert getattr(stage1, name) == printed[name]
    drops = tuple(printed["drop_epochs"])
    assert stage1.schedule == f"multistep(warmup=0, drops={drops}, factor={printed['drop_factor']})"
    assert RECIPES["imagenet"].stage2 == RECIPES["paper"].stage2
    assert recipe_by_name("imagenet(epochs=100)") is RECIPES["imagenet"]
    assert not recipe_by_name("imagenet(epochs=99)").converged
