"""`reproduce` under a time limit: the order of the pieces, stopping in time, going on, and the folder it leaves."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from conftest import REPOSITORY
from tailscope.data.sources import load
from tailscope.errors import UserError
from tailscope.experiments.lab import Lab
from tailscope.paper import ahead, queue, targets
from tailscope.paper.queue import Piece, order, run_queue
from tailscope.paper.reproduce import Reproduction, run_reproduce
from tailscope.paper.runs import runs
from tailscope.paper.timing import parse_duration
from tailscope.progress import Deadline, Quiet, TimeIsUp
from tailscope.store import Store
from tailscope.training import stage1
from tailscope.training.recipes import RECIPES, Recipe
from tailscope.training.runtime import Runtime

TINY = Recipe.model_validate(
    RECIPES["demo"].model_dump()
    | {
        "name": "tiny",
        "stage1": {"epochs": 2, "batch": 64, "learning_rate": 0.1, "precision": "fp32"},
        "stage2": {"steps": 20, "batch": 64, "learning_rate": 0.1, "precision": "fp32"},
        "views": 1,
    }
)
SHOWN = {"digits-lt": ("table1", "fig2", "fig3"), "digits-step": ("table1", "fig2")}


@pytest.fixture(autouse=True, scope="module")
def _known():
    """Two data sets that are trained in a second, and no report, which has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", TINY)
        for name, profile in (("digits-lt", "exp:20"), ("digits-step", "step:20")):
            known = targets.Benchmark("digits", profile, "nested", SHOWN[name])
            patch.setitem(targets.BENCHMARKS, name, known)
        patch.setattr(queue, "DATASETS", tuple(SHOWN))
        patch.setattr("tailscope.paper.timing.SECONDS", 0.05)
        patch.setattr("tailscope.report.build", lambda out: out / "report.html")
        yield


class Impatient(Deadline):
    """Is up after a number of safe points, whatever the time."""

    allowed = 0

    @property
    def passed(self):
        return Impatient.allowed <= 0

    def safe_point(self):
        Impatient.allowed -= 1
        if Impatient.allowed < 0:
            raise TimeIsUp


ahead_train = ahead._train


def reproduction_of(out, what="all", **options):
    return Reproduction(what, "digits-lt", out, **{"seeds": "2", "recipe": "tiny", "time_limit": "1h", **options})


def state(document):
    return [piece["done"] for piece in document["pieces"]]


# -- the order -----------------------------------------------------------------------------------------------------


def test_the_most_valuable_comes_first():
    wanted = {name: targets.experiments("all", name) for name in ("cifar10-lt", "cifar100-lt")}
    assert [(p.dataset, p.experiment, p.seeds) for p in order(wanted, [0, 1])][:6] == [
        ("cifar10-lt", "swap", (0,)),
        ("cifar10-lt", "ladder", (0,)),
        ("cifar10-lt", "geometry", (0,)),
        ("cifar100-lt", "swap", (0,)),
        ("cifar100-lt", "geometry", (0,)),
        ("cifar10-lt", "swap", (0, 1)),
    ]


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from(["swap", "ladder", "geometry"]), unique=True)),
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
)
def test_every_result_grows_seed_by_seed_to_all_of_them(wanted, seeds):
    pieces = order(wanted, seeds)
    assert len(pieces) == len(set(pieces)) == len(seeds) * sum(map(len, wanted.values()))
    lengths = [len(piece.seeds) for piece in pieces]
    assert lengths == sorted(lengths)
    for dataset, experiments in wanted.items():
        for experiment in experiments:
            grown = [p.seeds for p in pieces if (p.dataset, p.experiment) == (dataset, experiment)]
            assert grown == [tuple(seeds[: n + 1]) for n in range(len(seeds))]


@pytest.mark.parametrize("text", ["", "0m", "m", "nine", "-3m", "9m9h", "1d"])
def test_times_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="expected a time like 9m"):
        parse_duration(text)


# -- working it off ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("at-once")
    return out, run_queue(reproduction_of(out), tell=lambda text: None)


def test_without_a_need_to_stop_everything_is_done_and_written(at_once):
    out, document = at_once
    assert document["finished"] is True
    assert document["left"] == []
    assert state(document) == [True] * 4
    assert json.loads((out / "reproduce.json").read_text()) == document
    for experiment in ("swap", "ladder"):
        assert json.loads((out / f"{experiment}.json").read_text())["seeds"] == [0, 1]
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert {claim["seeds"] for claim in claims} == {2}


def test_the_results_are_those_of_an_ordinary_run(at_once, tmp_path):
    ordinary = run_reproduce(reproduction_of(tmp_path, "table1", time_limit=None), tell=lambda text: None)
    queued = json.loads((at_once[0] / "swap.json").read_text())
    assert queued["cells"] == ordinary["results"]["swap"]["cells"]
    assert queued["spec"] == ordinary["results"]["swap"]["spec"]


def test_stopped_again_and_again_it_gets_to_the_same_end(at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "Deadline", Impatient)
    told, documents = [], []
    for _ in range(30):
        Impatient.allowed = 7
        documents.append(run_queue(reproduction_of(tmp_path), tell=told.append))
        if documents[-1]["finished"]:
            break
    assert documents[-1]["finished"]
    assert len(documents) > 4
    assert documents[0]["left"] == [
        "swap of digits-lt, seed 0",
        "ladder of digits-lt, seed 0",
        "swap of digits-lt, seeds 0 1",
        "ladder of digits-lt, seeds 0 1",
    ]
    assert "UNFINISHED, left: swap of digits-lt, seed 0; " in told[2]
    assert told[-1].endswith("nothing is left")
    done = [sum(state(document)) for document in documents]
    assert done == sorted(done)
    for name in ("swap", "ladder", "claims"):
        here, there = (json.loads((folder / f"{name}.json").read_text()) for folder in (tmp_path, at_once[0]))
        field = {"swap": "cells", "ladder": "augmentations", "claims": "claims"}[name]
        assert here[field] == there[field]
    trained = len(list((tmp_path / "store" / "stage1").glob("*/DONE")))
    assert trained == len(list((at_once[0] / "store" / "stage1").glob("*/DONE")))


def test_results_of_different_seeds_share_their_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "Deadline", Impatient)
    while True:
        Impatient.allowed = 11
        document = run_queue(reproduction_of(tmp_path), tell=lambda text: None)
        if state(document)[:3] == [True] * 3:
            break
    assert not document["finished"]
    seeds = {name: json.loads((tmp_path / f"{name}.json").read_text())["seeds"] for name in ("swap", "ladder")}
    assert seeds == {"swap": [0, 1], "ladder": [0]}
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert {(claim["figure"], claim["seeds"]) for claim in claims} == {("Table 1, Figure 2", 2)}
    assert (tmp_path / "tables" / "paper-fig3.md").is_file()


def test_a_second_call_does_nothing_again(at_once, monkeypatch):
    monkeypatch.setattr(queue, "EXPERIMENTS", {})  # whatever is run would fail
    again = run_queue(reproduction_of(at_once[0], seeds="1"), tell=lambda text: None)
    assert again["finished"]
    assert state(again) == [True, True]
    assert len(json.loads((at_once[0] / "swap.json").read_text())["seeds"]) == 2  # kept: it holds more


def test_results_of_another_recipe_are_refused_before_any_work(at_once):
    with pytest.raises(UserError, match="another spec"):
        run_queue(reproduction_of(at_once[0], recipe="demo"), tell=lambda text: None)


def test_everything_leaves_a_bundle_without_weights(tmp_path):
    document = run_queue(reproduction_of(tmp_path / "bundle", "everything", seeds="1"), tell=lambda text: None)
    assert document["finished"]
    folders = {"digits-lt": "digits-tiny", "digits-step": "digits-step-tiny"}
    assert {piece["dataset"]: piece["folder"] for piece in document["pieces"]} == folders
    assert all((tmp_path / "bundle" / folder / "swap.json").is_file() for folder in folders.values())
    assert not list((tmp_path / "bundle").rglob("*.safetensors"))
    assert list((tmp_path / "bundle-store").rglob("*.safetensors"))


# -- half of Table 1 -----------------------------------------------------------------------------------------------


def test_table_1_with_the_lt_backbone_alone(tmp_path):
    told = []
    done = run_reproduce(
        reproduction_of(tmp_path, "table1", seeds="1", time_limit=None, backbones="lt"), tell=told.append
    )
    assert [line for line in told if "to train" in line] == [line for line in told if "backbone lt:" in line]
    assert done["results"]["swap"]["attribution"] is None
    rows = {row["cell"]: row for row in done["tables"]["table1"]}
    assert {cell for cell in rows if rows[cell]["ours"] is not None} == {"lt->lt", "lt->true", "lt stage1"}
    verdicts = {claim["id"]: claim for claim in done["claims"]}
    assert verdicts["table1/representation-is-the-bottleneck"]["reason"] == "not run: true→lt"
    assert verdicts["table1/better-classifier-helps"]["ci95_kind"] == "item"
    # Growing to the whole table later is what a queue may do, keeping the backbone.
    grown = run_queue(reproduction_of(tmp_path, "table1", seeds="1"), tell=told.append)
    assert grown["finished"]
    assert len(json.loads((tmp_path / "swap.json").read_text())["cells"]) == 4


@pytest.mark.parametrize("what", ["all", "fig3"])
def test_other_figures_need_all_backbones(tmp_path, what):
    with pytest.raises(UserError, match="--backbones lt: only table1 and fig2"):
        run_reproduce(reproduction_of(tmp_path, what, backbones="lt"))


# -- the command line and the script -------------------------------------------------------------------------------


def test_the_verb_tells_what_is_left_and_exits_with_0(at_once, tailscope_):
    out = at_once[0]
    command = ("reproduce", "all", "--dataset", "digits-lt", "--recipe", "tiny", "--seeds", "2", "--out", out)
    shown = tailscope_(*command, "--time-limit", "5m", "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["finished"] is True
    assert "4 pieces, 4 done before" in shown.err
    refused = tailscope_(*command, "--time-limit", "soon")
    assert (refused.code, refused.out) == (2, "")
    assert "--time-limit soon: expected a time" in refused.err
    assert tailscope_(*command, "--time-limit", "5m", "--plan").code == 2


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 3)])
def test_the_script_passes_everything_on_and_says_by_its_status_whether_it_is_done(tmp_path, finished, code):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then echo "$@"; mkdir -p \'{tmp_path}/out\'; '
        f"echo '{json.dumps({'finished': finished})}' > '{tmp_path}/out/reproduce.json'; "
        f"else exec '{sys.executable}' \"$@\"; fi\n"
    )
    python.chmod(0o755)
    script = REPOSITORY / "scripts" / "gpu_reproduce.sh"
    command = [script, "cifar data", "9", tmp_path / "out", "--quick"]
    ran = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert ran.returncode == code
    expected = f"-m tailscope reproduce everything --data-root cifar data --time-limit 9m --out {tmp_path}/out --quick"
    assert ran.stdout.strip() == expected
    assert subprocess.run([script], capture_output=True).returncode == 2


def test_pieces_read_well():
    assert str(Piece("cifar10-lt", "swap", (0, 3))) == "swap of cifar10-lt, seeds 0 3"


# -- several backbones at a time -----------------------------------------------------------------------------------


def test_backbones_trained_ahead_give_the_same_results(tmp_path):
    """Two threads train every backbone; the pieces recall them and add nothing but classifiers."""
    said = []
    one = run_queue(reproduction_of(tmp_path / "one", "table1", seeds="1"), tell=said.append)
    two = run_queue(reproduction_of(tmp_path / "two", "table1", seeds="1", jobs=2), tell=said.append)
    assert "2 backbones to train, 2 at a time" in said
    assert "2 of 2 backbones trained" in said
    assert one["finished"]
    assert two["finished"]
    cells = [json.loads((tmp_path / name / "swap.json").read_text())["cells"] for name in ("one", "two")]
    for name, cell in cells[0].items():
        assert cells[1][name]["accuracy"] == pytest.approx(cell["accuracy"], abs=0.02)


def test_backbones_are_trained_ahead_within_the_time_limit(tmp_path):
    said = []
    document = run_queue(reproduction_of(tmp_path, "table1", time_limit="0.001s", jobs=2), tell=said.append)
    assert "0 of 4 backbones trained" in said
    assert not document["finished"]


class Expiring(Deadline):
    """Is up when the test says so."""

    expired = threading.Event()

    @property
    def passed(self):
        return Expiring.expired.is_set()


@pytest.fixture
def workers(monkeypatch):
    """Each training does what the test puts into the list."""
    acts = []
    monkeypatch.setattr(ahead, "_train", lambda backbone, deadline, stop: acts[0](backbone, deadline, stop))
    return acts


def test_with_jobs_too_a_piece_is_written_while_later_ones_are_trained(tmp_path, monkeypatch, workers):
    """The limit is enough for the first piece alone: for its backbones and, beside the next ones, its classifiers."""
    monkeypatch.setattr(queue, "Deadline", Expiring)
    monkeypatch.setattr(Expiring, "expired", threading.Event())
    asked = []

    def act(backbone, deadline, stop):
        asked.append(backbone.run.backbone_key)
        if len(asked) <= 2:
            return ahead_train(backbone, Deadline(Quiet(), 60), stop)
        until = time.monotonic() + 20
        while not (tmp_path / "swap.json").is_file() and time.monotonic() < until:
            time.sleep(0.01)
        Expiring.expired.set()
        return False

    workers.append(act)
    said = []
    document = run_queue(reproduction_of(tmp_path, jobs=2), tell=said.append)
    assert json.loads((tmp_path / "swap.json").read_text())["seeds"] == [0]
    assert state(document) == [True, False, False, False]
    assert "2 of 10 backbones trained" in said
    assert len(asked) == len(set(asked)) == 10


def missing_backbones(tmp_path, seeds="2"):
    """Return an empty store and what to train into it for Table 1."""
    settings = reproduction_of(tmp_path, "table1", seeds=seeds).settings()
    lab = Lab(load("digits"), Store(tmp_path), Runtime.choose("cpu"))
    return lab.store, list(ahead.missing(lab, settings, "swap").values())


def test_trainings_in_threads_do_not_disturb_one_another(tmp_path):
    """Four at a time give the same weights, to the bit, as one after the other."""
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for jobs in (1, 4):
            store, backbones = missing_backbones(tmp_path / str(jobs))
            with ahead.training(backbones, jobs, Deadline(Quiet(), 60)) as trained:
                assert all(trained(backbone.run.backbone_key) for backbone in backbones)
            found.append([store.read("stage1", backbone.run.backbone_key).tensors for backbone in backbones])
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) == 4
    for one, four in zip(*found, strict=True):
        assert one.keys() == four.keys()
        assert all(torch.equal(one[name], four[name]) for name in one)


def test_an_exception_ends_trainings_at_their_next_step_and_finished_epochs_are_kept(tmp_path, monkeypatch):
    second = threading.Event()

    def epoch(self, number, steps):
        for batch in real(self, number, steps):
            yield batch
            if number == 1:
                second.set()
                time.sleep(0.2)

    real = stage1._Batches.epoch
    monkeypatch.setattr(stage1._Batches, "epoch", epoch)
    store, backbones = missing_backbones(tmp_path)
    with pytest.raises(ZeroDivisionError), ahead.training(backbones, 1, Deadline(Quiet(), 60)):
        _ = 1 / (not second.wait(20))
    assert not any(thread.name.startswith("training") for thread in threading.enumerate())
    first, *others = (backbone.run.backbone_key for backbone in backbones)
    assert store.checkpoint("stage1", first)["epochs"] == 1
    assert not any(store.checkpoint("stage1", key) for key in others)
    assert store.keys("stage1") == []


def test_what_could_not_be_trained_in_time_is_not_begun_again(tmp_path, workers):
    workers.append(lambda *_: False)
    document = run_queue(reproduction_of(tmp_path, "table1", jobs=2), tell=lambda text: None)
    assert state(document) == [False, False]
    assert not (tmp_path / "store" / "stage1").exists()


def test_a_limit_ends_the_wait_for_another_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(queue, "Deadline", Impatient)
    monkeypatch.setattr("tailscope.store.entries.STEP", 0.01)
    Impatient.allowed = 3
    reproduction = reproduction_of(tmp_path, "table1", seeds="1")
    settings = reproduction.settings()
    lab = Lab(load("digits"), Store(tmp_path / "store"), Runtime.choose("cpu"))
    key = next(runs(lab, settings, "swap")).backbone_key
    (tmp_path / "store" / "locks").mkdir()
    with FileLock(tmp_path / "store" / "locks" / f"stage1-{key}.lock"):
        document = run_queue(reproduction, tell=lambda text: None)
    assert not document["finished"]
    assert "another run is working on" in caplog.text
