"""`reproduce` under a time limit: the order of the pieces, stopping in time, going on, and the folder it leaves."""

import json
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from tailscope import paper
from tailscope.data.sources import load
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments.places import Here
from tailscope.experiments.stages import Stages
from tailscope.experiments.trainings import Trainings, answers
from tailscope.progress import Deadline, Quiet, TimeIsUp
from tailscope.reproduce import queue
from tailscope.reproduce.queue import Piece, order, parse_duration, run_queue
from tailscope.reproduce.reproduce import Reproduction, run_reproduce, runs
from tailscope.results import write
from tailscope.store import Store, add, packed_bytes
from tailscope.store.files import save_tensors
from tailscope.training import loop
from tailscope.training.recipes import RECIPES, Recipe

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
            known = paper.Benchmark("digits", profile, "nested", SHOWN[name])
            patch.setitem(paper.BENCHMARKS, name, known)
        patch.setattr(queue, "DATASETS", tuple(SHOWN))
        patch.setattr("tailscope.reproduce.reproduce.SECONDS", 0.05)
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


real_train = Trainings._train


def reproduction_of(out, what="all", **options):
    return Reproduction(what, "digits-lt", out, **{"seeds": "2", "recipe": "tiny", "time_limit": "1h", **options})


def state(document):
    return [piece["done"] for piece in document["pieces"]]


# -- the order -----------------------------------------------------------------------------------------------------


def test_the_most_valuable_comes_first():
    wanted = {name: paper.experiments("all", name) for name in ("cifar10-lt", "cifar100-lt")}
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
    assert "UNFINISHED, left: swap of digits-lt, seed 0; " in next(line for line in told if "pieces done" in line)
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


# -- the command line -------------------------------------------------------------------------------


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


def test_what_only_a_queue_can_do_is_refused_elsewhere(tmp_path, tailscope_):
    command = ("reproduce", "table1", "--dataset", "digits-lt", "--recipe", "tiny", "--out", tmp_path)
    for option in (("--wait-for-data",), ("--bundle", tmp_path / "bundle")):
        refused = tailscope_(*command, *option)
        assert refused.code == 2
        assert f"{option[0]}: only with --time-limit or `everything`" in refused.err
    refused = tailscope_(*command, "--time-limit", "1m", "--wait-for-data")
    assert (refused.code, "--wait-for-data: give --data-root" in refused.err) == (2, True)


def test_a_failed_training_shows_in_the_exit_code(tmp_path, tailscope_, monkeypatch):
    monkeypatch.setattr(Trainings, "_train", lambda self, training, progress: setattr(training, "state", "failed"))
    command = ("reproduce", "table1", "--dataset", "digits-lt", "--recipe", "tiny", "--seeds", "1", "--out", tmp_path)
    shown = tailscope_(*command, "--time-limit", "5m")
    assert shown.code == 1
    assert "FAILED: digits seed 0 lt, digits seed 0 true" in shown.out


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
    monkeypatch.setattr(Trainings, "_train", lambda self, training, progress: acts[0](self, training, progress))
    return acts


def unfinished(trainings, training, progress):
    training.state = "unfinished"


def test_with_jobs_too_a_piece_is_written_while_later_ones_are_trained(tmp_path, monkeypatch, workers):
    """The limit is enough for the first piece alone: for its backbones and, beside the next ones, its classifiers."""
    monkeypatch.setattr(queue, "Deadline", Expiring)
    monkeypatch.setattr(Expiring, "expired", threading.Event())
    asked = []

    def act(trainings, training, progress):
        if training.order.kind == "stage1":
            asked.append(training.run.backbone_key)
        if training.order.kind == "stage2" or len(asked) <= 2:
            return real_train(trainings, training, Deadline(Quiet(), 60))
        until = time.monotonic() + 20
        while not (tmp_path / "swap.json").is_file() and time.monotonic() < until:
            time.sleep(0.01)
        Expiring.expired.set()
        return unfinished(trainings, training, progress)

    workers.append(act)
    said = []
    document = run_queue(reproduction_of(tmp_path, jobs=2), tell=said.append)
    assert json.loads((tmp_path / "swap.json").read_text())["seeds"] == [0]
    assert state(document) == [True, False, False, False]
    assert "2 of 10 backbones trained" in said
    assert len(asked) == len(set(asked))


def trainings_of(store, jobs, *, seeds="2", what="table1", seconds=60.0, closing=0.0, tell=lambda text: None):
    """Return trainings that are not begun, with the lab and the runs of a reproduction."""
    runtime = Runtime.choose("cpu")
    lab = Stages(load("digits"), Store(store), runtime)
    settings = reproduction_of(store, what, seeds=seeds).settings()
    found = [run for verb in paper.experiments(what, "digits-lt") for run in runs(lab, settings, verb)]
    return Trainings(Here(jobs), runtime, Deadline(Quiet(), seconds), closing, tell), lab, found


def test_trainings_in_threads_do_not_disturb_one_another(tmp_path):
    """Four at a time give the same weights, to the bit, as one after the other."""
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for jobs in (1, 4):
            trainings, lab, needed = trainings_of(tmp_path / str(jobs), jobs)
            with trainings:
                trainings.add(lab, needed)
                assert trainings.total == 4
                while trainings.train(run.backbone_key for run in needed):
                    pass
                while trainings.busy:
                    time.sleep(0.01)
            keys = list(dict.fromkeys(run.backbone_key for run in needed))
            found.append([lab.store.read("stage1", key).tensors for key in keys])
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) == 4
    for one, four in zip(*found, strict=True):
        assert one.keys() == four.keys()
        assert all(torch.equal(one[name], four[name]) for name in one)


def test_an_exception_ends_trainings_at_their_next_step_and_finished_epochs_are_kept(tmp_path, monkeypatch):
    second = threading.Event()

    def epoch(self, number, steps, progress):
        for batch in real(self, number, steps, progress):
            yield batch
            if number == 1:
                second.set()
                time.sleep(0.2)

    real = loop._Batches.epoch
    monkeypatch.setattr(loop._Batches, "epoch", epoch)
    trainings, lab, needed = trainings_of(tmp_path, 2)

    def interrupted():
        with trainings:
            trainings.add(lab, needed)
            _ = 1 / (not second.wait(20))

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not any(thread.name.startswith("training") for thread in threading.enumerate())
    saved = [lab.store.checkpoint("stage1", key) for key in {run.backbone_key for run in needed}]
    assert [checkpoint["epochs"] for checkpoint in saved if checkpoint] in ([1], [1, 1])
    assert lab.store.keys("stage1") == []


def test_what_could_not_be_trained_in_time_is_not_begun_again(tmp_path, workers):
    workers.append(unfinished)
    document = run_queue(reproduction_of(tmp_path, "table1", jobs=2), tell=lambda text: None)
    assert state(document) == [False, False]
    assert not (tmp_path / "store" / "stage1").exists()


def test_the_long_trainings_of_a_seed_come_first_whenever_they_were_added(tmp_path, workers):
    """One thread is held by the first; what is added meanwhile is worked off by its value."""
    began, go, asked = threading.Event(), threading.Event(), []

    def act(trainings, training, progress):
        asked.append((training.run.seed, len(training.run.trained_on.rows)))
        if len(asked) == 2:  # both threads have begun
            began.set()
        go.wait(20)
        unfinished(trainings, training, progress)

    workers.append(act)
    trainings, lab, needed = trainings_of(tmp_path, 2, what="all")
    later = {run.backbone_key for run in needed if run.encoder == "true"}
    with trainings:
        trainings.add(lab, [run for run in needed if run.backbone_key not in later])
        assert began.wait(20)
        trainings.add(lab, needed)
        go.set()
        while trainings.busy:
            time.sleep(0.01)
    rest = asked[2:]  # two threads had begun before
    assert len(asked) == 10
    assert rest == sorted(rest, key=lambda one: (one[0], -one[1]))
    assert rest[0] == (0, 1297)


@pytest.mark.parametrize("jobs", [1, 2])
def test_shortly_before_the_time_is_up_no_training_begins(tmp_path, workers, jobs):
    workers.append(lambda *_: pytest.fail("began"))
    trainings, lab, needed = trainings_of(tmp_path, jobs, seconds=50.0, closing=60.0)
    with trainings:
        trainings.add(lab, needed)
        assert not trainings.train(run.backbone_key for run in needed)
        assert not trainings.busy
    assert trainings._backbones("waiting", "queued") == trainings.total == 4


def test_the_last_minute_of_a_short_limit_is_a_tenth_of_it(tmp_path, monkeypatch):
    seen = []
    real = Trainings.__init__
    monkeypatch.setattr(Trainings, "__init__", lambda self, *rest: (seen.append(rest[3]), real(self, *rest))[1])
    monkeypatch.setattr(queue._Queue, "work", lambda self: None)
    for limit in ("1h", "50s", None):
        run_queue(reproduction_of(tmp_path, time_limit=limit), tell=lambda text: None)
    assert seen == [60.0, 5.0, 0.0]


@pytest.mark.parametrize(
    "option", [{"devices": 2}, {"num_nodes": 2}, {"micro_batches": 2}, {"workers": 1}, {"verify": True}]
)
def test_options_for_files_are_refused_under_a_time_limit_too(tmp_path, option):
    with pytest.raises(UserError, match="are for images in files"):
        reproduction_of(tmp_path, **option).check()


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_training_that_fails_costs_only_itself(tmp_path, monkeypatch, jobs, engine, caplog):
    """It is tried once more with PyTorch's own operations, unless it had them; the pieces of the others are written."""
    tried, real = [], Stages.backbone

    def backbone(self, stage, rows, seed, label):
        if label == "digits seed 0 lt+mixup":
            tried.append(self.runtime.engine)
            raise RuntimeError("a kernel of this GPU")
        return real(self, stage, rows, seed, label)

    monkeypatch.setattr(Stages, "backbone", backbone)
    said = []
    document = run_queue(reproduction_of(tmp_path, seeds="1", jobs=jobs, engine=engine), tell=said.append)
    assert tried == ([None, "eager"] if engine == "auto" else ["eager"])
    assert document["failed"] == ["digits seed 0 lt+mixup"]
    assert document["left"] == ["ladder of digits-lt, seed 0"]
    assert "FAILED: digits seed 0 lt+mixup" in said[-1]
    assert json.loads((tmp_path / "swap.json").read_text())["seeds"] == [0]
    assert "a kernel of this GPU" in caplog.text
    assert len(Store(tmp_path / "store").keys("stage1")) == 4  # every other backbone


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("fails", "dead", "waits"),
    [
        ("digits", False, False),  # everything does
        ("digits seed 0 lt+mixup", True, False),  # a CUDA context that died on its way fails whatever comes
        ("digits seed 0 lt+mixup", False, True),  # a reason of its own
    ],
)
def test_data_are_waited_for_unless_what_comes_would_fail_too(tmp_path, monkeypatch, jobs, fails, dead, waits):
    """The second data set comes some looks after the first has come to its end, where anybody still looks."""
    looks, failed, at_work, real, has_come = [], [], [], Stages.backbone, queue._Part.has_come

    class Kept(Trainings):
        def __enter__(self):
            at_work.append(self)
            return super().__enter__()

    def backbone(self, stage, rows, seed, label):
        if label.startswith(fails) and len(looks) <= 30:
            failed.append(label)
            raise RuntimeError("a kernel of this GPU")
        return real(self, stage, rows, seed, label)

    def comes(part):
        if part.reproduction.dataset == "digits-lt":
            return has_come(part)
        if failed and at_work and not at_work[0].busy:
            looks.append(part)
        return len(looks) > 30

    monkeypatch.setattr(queue, "Trainings", Kept)
    monkeypatch.setattr(Stages, "backbone", backbone)
    monkeypatch.setattr(queue._Part, "has_come", comes)
    monkeypatch.setattr(queue, "WAIT", 0.02)
    monkeypatch.setattr("tailscope.experiments.trainings.answers", lambda device: not dead)
    said = []
    document = run_queue(reproduction_of(tmp_path / "out", "everything", seeds="1", jobs=jobs), tell=said.append)
    assert ("no longer waiting for the data of digits-step: what is to come would fail, too" in said) is not waits
    assert any("the data of digits-step have come" in line for line in said) is waits
    assert any(piece["done"] for piece in document["pieces"] if piece["dataset"] == "digits-step") is waits
    assert document["failed"]


def test_data_that_are_still_being_copied_have_not_come(tmp_path):
    waiting = reproduction_of(tmp_path / "out", seeds="1", data_root=tmp_path, wait_for_data=True)
    part, path = queue._Part(waiting), tmp_path / "digits.npz"
    assert not part.has_come()
    np.savez(path, images=np.zeros((200, 8)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not part.has_come()
    path.write_bytes(whole)
    assert part.has_come()
    path.write_text("never to be an archive")
    os.utime(path, (time.time() - 2 * queue.COPIED,) * 2)
    assert part.has_come()  # and is refused by name when it is opened


def test_a_piece_that_another_process_wrote_meanwhile_stays(tmp_path, monkeypatch):
    def slow(lab, settings):
        result = swap(lab, settings)
        write(tmp_path, "swap", {**result, "created": "by another", "spec": {**result["spec"], **elsewhere}})
        return result

    swap, said = queue.EXPERIMENTS["swap"], []
    monkeypatch.setitem(queue.EXPERIMENTS, "swap", slow)
    elsewhere = {}
    assert run_queue(reproduction_of(tmp_path, "table1", seeds="1"), tell=said.append)["finished"]
    assert json.loads((tmp_path / "swap.json").read_text())["created"] == "by another"
    (tmp_path / "swap.json").unlink()
    elsewhere = {"profile": "exp:7"}
    with pytest.raises(UserError, match="another spec"):
        run_queue(reproduction_of(tmp_path, "table1", seeds="1"), tell=said.append)
    assert json.loads((tmp_path / "swap.json").read_text())["created"] == "by another"


def test_a_device_that_answers_no_more_is_noticed(monkeypatch):
    def refuse(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    assert answers(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", refuse)
    assert not answers(torch.device("cpu"))


def test_a_mistake_in_one_training_is_told_in_a_line_and_not_repeated(tmp_path, monkeypatch):
    def backbone(self, stage, rows, seed, label):
        raise UserError("the loss is not finite")

    monkeypatch.setattr(Stages, "backbone", backbone)
    said = []
    document = run_queue(reproduction_of(tmp_path, "table1", seeds="1"), tell=said.append)
    assert [line for line in said if "not finite" in line] == [
        "digits seed 0 lt failed: the loss is not finite",
        "digits seed 0 true failed: the loss is not finite",
    ]
    assert len(document["failed"]) == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_piece_that_cannot_be_written_costs_the_trainings_nothing(tmp_path, monkeypatch, jobs, caplog):
    """Beside threads that train, it is left and named; alone it ends the run. A bundle is written either way."""

    def fail(lab, settings):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(queue.EXPERIMENTS, "swap", fail)
    wanted = reproduction_of(tmp_path, seeds="1", jobs=jobs, bundle=tmp_path / "bundle")
    if jobs == 1:
        with pytest.raises(RuntimeError, match="out of memory"):
            run_queue(wanted, tell=lambda text: None)
    else:
        document = run_queue(wanted, tell=lambda text: None)
        assert document["failed"] == ["swap of digits-lt, seed 0"]
        assert document["left"] == ["swap of digits-lt, seed 0"]
        assert "out of memory" in caplog.text
        assert len(Store(tmp_path / "store").keys("stage1")) == 5
    assert json.loads((tmp_path / "reproduce.json").read_text())["finished"] is False
    assert (tmp_path / "bundle" / "stages.tar").is_file()


def test_threads_say_every_minute_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("tailscope.experiments.trainings.STATUS", 0.05)
    said = []
    run_queue(reproduction_of(tmp_path, "table1", seeds="1", jobs=2), tell=said.append)
    lines = [line for line in said if "images/s" in line]
    assert any(
        re.fullmatch(r"0 min: 0 of 2 backbones trained, [\d,]+ images/s; .*digits seed 0 lt \d+%.*", x) for x in lines
    )


# -- the bundle ---------------------------------------------------------------------------------------------------


def test_a_bundle_holds_the_most_valuable_in_as_many_bytes_as_it_may(tmp_path, monkeypatch):
    """Its room is made so small that one of the two checkpoints, or everything but results, stays behind."""
    reproduction = reproduction_of(tmp_path / "out", "table1", bundle=tmp_path / "bundle", store=tmp_path / "store")
    run_queue(reproduction, tell=lambda text: None)
    store = Store(tmp_path / "store")
    _, _, needed = trainings_of(tmp_path / "store", 1)
    backbones = sorted(
        {run.backbone_key: run for run in needed}.values(), key=lambda run: (run.seed, run.encoder != "true")
    )
    assert [(run.seed, run.encoder) for run in backbones] == [(0, "true"), (0, "lt"), (1, "true"), (1, "lt")]
    for run in backbones[2:]:  # seed 1 as if its backbones had been stopped
        scratch = store.scratch("stage1", run.backbone_key)
        scratch.mkdir(parents=True)
        save_tensors(scratch / "checkpoint.safetensors", store.read("stage1", run.backbone_key).tensors, {"epochs": 1})
        shutil.rmtree(store.entry("stage1", run.backbone_key))
    one = packed_bytes(store, "stage1", backbones[0].backbone_key)
    archive = one + 2 * queue.TAR_END
    stages = sum(packed_bytes(store, "stage2", key) for key in store.keys("stage2")) + 2 * one
    monkeypatch.setattr(queue, "ARCHIVE", archive)
    monkeypatch.setattr(queue._Queue, "work", lambda self: self._take_in())
    bundle, said = tmp_path / "bundle", []
    (bundle / "stages-9.tar").touch()  # of an earlier run
    (bundle / "stages-thesis.tar").touch()  # the user's own
    damaged = store.keys("stage2")[0]
    path = store.tensors_file("stage2", damaged)
    whole = path.read_bytes()
    results = (bundle / "results.tar.gz").stat().st_size + queue.TAR_END * (queue.FILES - 1)

    def names(room):
        monkeypatch.setattr(queue, "ROOM", results + room)
        run_queue(reproduction, tell=said.append)
        found = {file.name: file.stat().st_size for file in bundle.iterdir()}
        del found["stages-thesis.tar"]
        assert sum(found.values()) <= results + room
        assert all(size <= archive for name, size in found.items() if name != "results.tar.gz")
        return sorted(found)

    assert names(1024) == ["results.tar.gz"]
    assert "0 stages (10 are there)" in said[-2] + said[-1]
    names(stages + one)
    assert "10 stages, 1 checkpoints (2 are there)" in said[-2] + said[-1]
    everything = names(100 * one)
    assert everything[:3] == ["results.tar.gz", "stages-1.tar", "stages-2.tar"]
    assert "stages-9.tar" not in everything
    path.write_bytes(whole[:-1] + b"\x11")
    names(100 * one)
    assert f"not in the bundle: {path}: damaged" in "".join(said)
    assert "bundle: results, 9 stages, 2 checkpoints; " in said[-2] + said[-1]
    path.write_bytes(whole)
    with monkeypatch.context() as patched:
        patched.setattr(queue, "pack", lambda *_, **__: (_ for _ in ()).throw(UserError("full")))
        with pytest.raises(UserError, match="full"):
            run_queue(reproduction, tell=said.append)
    assert {"results.tar.gz", "stages-1.tar", "stages-2.tar"} <= {file.name for file in bundle.iterdir()}
    names(100 * one)
    assert "bundle: results, 10 stages, 2 checkpoints; " in said[-2] + said[-1]
    home = Store(tmp_path / "home")
    add(home, *sorted(bundle.glob("stages-[0-9].tar")))
    assert home.keys("stage1") == store.keys("stage1")
    assert all(home.checkpoint("stage1", run.backbone_key)["epochs"] == 1 for run in backbones[2:])


# -- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["altair", "vl_convert"])
def test_without_a_drawing_library_only_the_figures_are_missing(tmp_path, monkeypatch, library):
    def build(out):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    monkeypatch.setattr("tailscope.report.build", build)
    said = []
    document = run_queue(reproduction_of(tmp_path, "table1", seeds="1"), tell=said.append)
    assert document["finished"]
    assert [line for line in said if library in line] == [said[-1]]
    assert {"paper-table1.md", "swap.md"} <= {path.name for path in (tmp_path / "tables").iterdir()}
    monkeypatch.setattr("tailscope.report.build", lambda out: build(out) if library == "x" else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # anything else is no missing library
        run_queue(reproduction_of(tmp_path, "table1", seeds="1"), tell=said.append)


def test_the_report_is_built_once_and_only_where_something_is_new(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr("tailscope.report.build", lambda out: (built.append(out), (out / "report.html").touch()))
    for _ in range(2):
        run_queue(reproduction_of(tmp_path, seeds="1"), tell=lambda text: None)
    assert built == [tmp_path]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_leaves_what_is_done_and_says_so(tmp_path, monkeypatch, jobs):
    real = queue._Queue._write

    def write(self, piece, part):
        real(self, piece, part)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue._Queue, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        run_queue(reproduction_of(tmp_path, jobs=jobs), tell=lambda text: None)
    document = json.loads((tmp_path / "reproduce.json").read_text())
    assert state(document) == [True, False, False, False]
    assert not (tmp_path / "report.html").exists()


def test_a_limit_ends_the_wait_for_another_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(queue, "Deadline", Impatient)
    monkeypatch.setattr("tailscope.store.entries.STEP", 0.01)
    Impatient.allowed = 3
    reproduction = reproduction_of(tmp_path, "table1", seeds="1")
    settings = reproduction.settings()
    lab = Stages(load("digits"), Store(tmp_path / "store"), Runtime.choose("cpu"))
    key = next(runs(lab, settings, "swap")).backbone_key
    (tmp_path / "store" / "locks").mkdir()
    with FileLock(tmp_path / "store" / "locks" / f"stage1-{key}.lock"):
        document = run_queue(reproduction, tell=lambda text: None)
    assert not document["finished"]
    assert "another run is working on" in caplog.text
