"""Stages made ahead: their order, and the places that make them, where workers are lost, err or see no common store."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiment_setups import CPU, TINY, entries, lab, settings
from tailscope import plugins
from tailscope.errors import UserError
from tailscope.experiments import on_ray, places, workers
from tailscope.experiments.compare import CompareSettings, _waves, compare
from tailscope.experiments.options import Placing
from tailscope.experiments.places import Apart, Failed, Lost, Place, Processes
from tailscope.experiments.plans import swap, waves_of
from tailscope.experiments.stages import Stages, labeller, pretraining
from tailscope.experiments.trainings import Trainings, make_ahead
from tailscope.experiments.workers import Order, Outcome, work
from tailscope.progress import Deadline, Quiet, TimeIsUp
from tailscope.spec import TrainSpec, backbone_key
from tailscope.store import Store

LONG = TINY.model_copy(update={"stage1": TrainSpec(epochs=60, batch=64, learning_rate=0.05, precision="fp32")})
"""Long enough to be killed in the middle, with a checkpoint after the first epoch and others later."""
LONGER = LONG.model_copy(update={"stage1": LONG.stage1.model_copy(update={"epochs": 400})})
"""Long enough to be killed on a Ray cluster, where it is known only half a second later who works on what."""


class InThreads(Apart):
    """Workers that are threads of this process; `acts` may spoil what they do."""

    def __init__(self, tell, act=None):
        super().__init__(2, 1, "cpu", tell)
        self.act = act or (lambda job, answer: answer())
        self.jobs, self.given = [], []

    def _ask(self, lab, job, given):
        self.jobs.append(job)
        self.given.append(given)
        return self.act(job, lambda: work(job, lab.data, given, lambda *far: None))


@pytest.fixture(autouse=True)
def no_plug_ins(monkeypatch):
    """What other tests imported, whose files are gone, does not travel to workers."""
    monkeypatch.setattr(plugins, "named", [])


def ahead(made_in, waves, place):
    """Make what the waves need in a place."""
    with Trainings(place, CPU, Deadline(Quiet(), float("inf")), 0.0, place._tell) as at_work:
        for runs in waves:
            at_work.add(made_in, runs)
            while at_work.busy:
                time.sleep(0.01)
    return at_work


def same_stages(one: Store, other: Store) -> bool:
    keys = [(kind, key) for kind in ("stage1", "stage2") for key in one.keys(kind)]
    assert [(kind, key) for kind in ("stage1", "stage2") for key in other.keys(kind)] == keys
    for kind, key in keys:
        first, second = (store.read(kind, key).tensors for store in (one, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
    return bool(keys)


def without_times(result):
    """Return what a result says, without when it was made and how long that took."""
    text = json.dumps({k: v for k, v in result.items() if k not in ("created", "provenance", "environment", "command")})
    return re.sub(r'"seconds": \{[^}]*\}', "", text)


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory):
    """The swap of two seeds, without any of this."""
    stages = lab(tmp_path_factory.mktemp("alone"))
    return stages.store, swap(stages, settings())


# -- the order --------------------------------------------------------------------------------------------------------


class Recording(Place):
    """Makes nothing, and remembers what began and ended; what `fails` says ends with a mistake."""

    def __init__(self, slots, fails=()):
        self.slots, self.fails, self.begun, self.ended, self.lock = slots, fails, [], [], threading.Lock()
        self.apart = True

    def make(self, lab, order):
        with self.lock:
            self.begun.append((order, tuple(self.ended)))
        time.sleep(0.01)
        with self.lock:
            self.ended.append(order.key)
        if order.label in self.fails:
            raise UserError("no such thing")

    _tell = staticmethod(lambda text: None)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_every_stage_is_made_once_and_after_what_it_stands_on(tmp_path, slots):
    place, stages = Recording(slots), lab(tmp_path)
    chosen = CompareSettings(**dict(settings()), methods="ce; la; crt; lws; mixup + crt")
    done = ahead(stages, _waves(stages, chosen), place)
    keys = [order.key for order, _ in place.begun]
    assert len(keys) == len(set(keys)) == done.made
    assert done.total == 2 * 3  # lt, lt with mixup, and true
    for order, before in place.begun:
        if order.kind == "stage2":
            assert order.run.backbone_key in before
    views = {}  # those that share features come one after the other
    for order, before in place.begun:
        if order.kind == "stage2":
            seen = (order.run.backbone_key, order.run.stage2.augment, order.run.stage2.sampler)
            shared = views.setdefault(seen, [])
            assert not shared or shared[0] in before
            shared.append(order.key)


def test_classifiers_come_first_then_seeds_and_the_long_trainings_of_each(tmp_path):
    place, stages = Recording(1), lab(tmp_path)
    ahead(stages, waves_of(["swap"])(stages, settings()), place)
    assert [order.label for order, _ in place.begun] == [
        f"digits seed {seed} {name}"
        for seed in (0, 1)
        for name in ("true", "true->lt", "true->true", "lt", "lt->lt", "lt->true")
    ]


def test_what_stands_on_what_failed_is_not_begun_and_the_rest_is_made(tmp_path):
    place, stages = Recording(2, fails=["digits seed 0 lt"]), lab(tmp_path)
    done = ahead(stages, waves_of(["swap"])(stages, settings()), place)
    assert done.failed == ["digits seed 0 lt"]
    assert [str(error) for error in done.errors] == ["no such thing"]
    labels = {order.label for order, _ in place.begun}
    assert len(labels) == 4 + 6
    assert not {"digits seed 0 lt->lt", "digits seed 0 lt->true"} & labels


class Halfway(Recording):
    """Trains every backbone on 40 of 100 images, 10 of them before, and fails; then on another 30 of them."""

    def make(self, lab, order):
        first = order.key not in self.ended
        super().make(lab, order)
        if order.kind == "stage1":
            with lab.runtime.progress.task("a training", 100, 10 if first else 0) as advance:
                advance(30)
                if first:
                    raise RuntimeError("a kernel of this GPU")
                self.shares.append([piece.images for piece in self.at_work._all.values() if piece.trains])


def test_a_training_that_is_tried_once_more_goes_on_being_counted(tmp_path):
    """Otherwise it seems to stand still, and whoever watches ends a process that works."""
    stages, place = lab(tmp_path), Halfway(1)
    place.shares = []
    with Trainings(place, CPU, Deadline(Quiet(), float("inf")), 0.0, place._tell) as place.at_work:
        place.at_work.add(stages, next(waves_of(["swap"])(stages, settings()))[:1])
        while place.at_work.busy:
            time.sleep(0.01)
    backbone = next(n for n, piece in enumerate(place.at_work._all.values()) if piece.order.kind == "stage1")
    assert place.at_work.images()[backbone] == 30 + 30
    assert place.shares == [[30]]  # of 100, without what was in vain


def test_a_pre_training_that_two_backbones_share_is_made_once_and_first(tmp_path):
    place, stages = Recording(4), lab(tmp_path)
    chosen = CompareSettings(
        **dict(settings(seeds=(0,))), methods="rotation + ce; rotation + balanced_softmax", gaps="none"
    )
    ahead(stages, _waves(stages, chosen), place)
    assert [order.kind for order, _ in place.begun] == ["pretrained", "stage1", "stage1"]
    assert place.begun[1][1] == (place.begun[0][0].key,)


def test_a_backbone_waits_for_the_network_that_labels_its_images(tmp_path):
    place, stages = Recording(4), lab(tmp_path)
    chosen = CompareSettings(**dict(settings(seeds=(0,))), methods="ssp; ssp + pseudo_labels", gaps="none")
    runs = [run for run in next(_waves(stages, chosen)) if run.stage1.unlabelled]
    ahead(stages, [runs], place)
    labelling, labelled = labeller(runs[0].stage1), runs[0].backbone_key
    assert [(order.kind, order.key) for order, _ in place.begun] == [
        ("pretrained", backbone_key(pretraining(labelling), 0)),
        ("stage1", backbone_key(labelling, 0)),
        ("stage1", labelled),
    ]
    assert [len(before) for _, before in place.begun] == [0, 1, 2]


def test_what_is_stored_is_not_made_again(one_after_the_other, tmp_path):
    place, stages = Recording(2), lab(one_after_the_other[0].root)
    assert ahead(stages, waves_of(["swap"])(stages, settings()), place).made == 0
    assert place.begun == []


# -- workers ----------------------------------------------------------------------------------------------------------


def test_workers_that_see_the_store_make_the_same_to_the_bit(one_after_the_other, tmp_path):
    place, stages = InThreads(lambda text: None), lab(tmp_path)
    ahead(stages, waves_of(["swap"])(stages, settings()), place)
    assert same_stages(one_after_the_other[0], stages.store)
    assert not list(tmp_path.glob(".here-*"))
    before = stages.trained
    assert without_times(swap(stages, settings())) == without_times(one_after_the_other[1])
    assert stages.trained == before  # all of it was recalled


def test_workers_that_do_not_see_the_store_send_archives(one_after_the_other, tmp_path, monkeypatch):
    monkeypatch.setattr(Apart, "_mark", lambda self, store: None)
    told, extracted, extract = [], [], Stages._extract
    monkeypatch.setattr(Stages, "_extract", lambda *it: extracted.append(it[2]) or extract(*it))
    place, stages = InThreads(told.append), lab(tmp_path)
    ahead(stages, waves_of(["swap"])(stages, settings()), place)
    assert same_stages(one_after_the_other[0], stages.store)
    assert sum("does not see" in line and "begins anew" in line for line in told) == 1
    assert entries(stages.store, "features") == 4  # of the test images: what a worker computes on the way comes too
    assert len(extracted) == 4 + entries(stages.store, "views")  # and goes on to the next, which extracts none anew
    assert any(given for given in place.given)


def test_a_worker_that_does_not_see_the_store_gets_what_a_backbone_is_trained_from(tmp_path, monkeypatch):
    monkeypatch.setattr(Apart, "_mark", lambda self, store: None)
    place, stages = InThreads(lambda text: None), lab(tmp_path)
    chosen = CompareSettings(**dict(settings(seeds=(0,))), methods="ce; pseudo_labels; ssp", gaps="none")
    first, *others = next(_waves(stages, chosen))
    stages.backbone(first.stage1, first.trained_on.rows, 0, "")
    stages.pretrained(others[1].stage1, first.trained_on.rows, 0, "")
    for run in others:
        place.make(stages, Order("stage1", run, run.encoder))
    assert entries(stages.store, "stage1") == 3
    assert [bool(given) for given in place.given] == [False, True, True]  # it is asked once whether it sees the store


def test_a_lost_worker_is_replaced_and_the_next_one_goes_on(tmp_path):
    lost, told = [], []

    def act(job, answer):
        if job.order.kind == "stage1" and job.order.key not in lost:
            lost.append(job.order.key)
            raise Lost("process 7")
        return answer()

    place, stages = InThreads(told.append, act), lab(tmp_path)
    done = ahead(stages, waves_of(["swap"])(stages, settings(seeds=(0,))), place)
    assert not done.failed
    assert "digits seed 0 lt: its worker was lost (process 7); another one begins anew" in told
    assert entries(stages.store, "stage1") == 2


def test_a_stage_whose_workers_are_always_lost_is_given_up(tmp_path):
    def act(job, answer):
        raise Lost("process 7")

    place, stages = InThreads(lambda text: None, act), lab(tmp_path)
    done = ahead(stages, waves_of(["swap"])(stages, settings(seeds=(0,), backbones=("lt",))), place)
    assert len(place.jobs) == places.ATTEMPTS
    assert [str(error) for error in done.errors] == [
        "digits seed 0 lt: 4 workers were lost, the last one process 7; out of memory?"
    ]


def test_a_mistake_is_told_in_its_line_and_not_tried_again(tmp_path):
    told = []
    place = InThreads(told.append, lambda job, answer: Outcome("mistake", "vm, process 7", "the loss is not finite"))
    stages = lab(tmp_path)
    done = ahead(stages, waves_of(["swap"])(stages, settings(seeds=(0,), backbones=("lt",))), place)
    assert len(place.jobs) == 1
    assert "digits seed 0 lt failed: the loss is not finite" in told
    assert isinstance(done.errors[0], UserError)


def test_what_nobody_foresaw_is_tried_once_more_and_comes_with_its_traceback(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workers, "carry_out", lambda lab, order: 1 / 0)
    place, stages = InThreads(lambda text: None), lab(tmp_path)
    done = ahead(stages, waves_of(["swap"])(stages, settings(seeds=(0,), backbones=("lt",))), place)
    assert [job.engine for job in place.jobs] == ["auto", "eager"]
    assert isinstance(done.errors[0], Failed)
    assert "ZeroDivisionError" in caplog.text


def test_a_worker_stops_in_time_and_its_numbers_reach_the_loggers(tmp_path):
    stages = lab(tmp_path)
    run = next(waves_of(["swap"])(stages, settings()))[0]
    place = InThreads(lambda text: None)
    limited = stages.working(replace(CPU, progress=Deadline(Quiet(), 1e-9)))
    with pytest.raises(TimeIsUp):
        place.make(limited, Order("stage1", run, "x"))
    assert 0 > place.jobs[0].seconds > -60

    seen = []

    class Logging(Quiet):
        def log(self, run, step, numbers, *, last=False):
            seen.append((run, step, sorted(numbers), last))

    place.make(stages.working(replace(CPU, progress=Logging())), Order("stage1", run, "x"))
    assert seen[0] == ("x", 1, ["images_per_second", "learning_rate", "loss"], False)
    assert seen[-1][3]


def test_plug_ins_reach_a_machine_that_does_not_have_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "named", [])
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "far_away.py").write_text("import far_helper\nVALUE = far_helper.VALUE\n")
    (tmp_path / "far_helper.py").write_text("VALUE = 41\n")
    plugins.load(str(tmp_path / "far_away.py"))
    (named,) = plugins.named
    assert sorted(named.files) == ["far_away.py", "far_helper.py"]
    for name in ("far_away", "far_helper"):
        monkeypatch.delitem(plugins.sys.modules, name)
        (tmp_path / f"{name}.py").unlink()
    named.load()
    assert plugins.sys.modules["far_away"].VALUE == 41
    assert Path(plugins.sys.modules["far_away"].__file__).parent != tmp_path
    monkeypatch.delitem(plugins.sys.modules, "far_away")
    monkeypatch.delitem(plugins.sys.modules, "far_helper")


# -- processes of this machine ----------------------------------------------------------------------------------------


def killer(stages, told, recipe_label, recipe=LONG):
    """Return a `tell` that kills the first worker of a backbone once its checkpoint is there."""
    done = threading.Event()

    def kill(number):
        key = next(iter_key(stages, recipe_label, recipe))
        while not (stages.store.scratch("stage1", key) / "checkpoint.safetensors").exists():
            time.sleep(0.01)
        os.kill(number, signal.SIGKILL)

    def tell(text):
        told.append(text)
        begun = re.fullmatch(rf"{recipe_label}: begun (?:by|on .*,) process (\d+)", text)
        if begun and not done.is_set():
            done.set()
            threading.Thread(target=kill, args=(int(begun[1]),), daemon=True).start()

    return tell


def iter_key(stages, label, recipe=LONG):
    for run in next(waves_of(["swap"])(stages, settings(recipe=recipe))):
        if label == f"digits seed {run.seed} {run.encoder}":
            yield run.backbone_key


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_process_that_is_killed_is_replaced_and_the_numbers_are_the_same(tmp_path, one_thread):
    """The second worker goes on from the checkpoint, the backbone is trained once, all is recalled afterwards."""
    chosen, told = settings(recipe=LONG, seeds=(0,), backbones=("lt",)), []
    stages, alone = lab(tmp_path / "two"), lab(tmp_path / "one")
    tell = killer(stages, told, "digits seed 0 lt")
    make_ahead(stages, waves_of(["swap"])(stages, chosen), Placing(jobs=2), "cpu", tell)
    lost = re.compile(r"digits seed 0 lt: its worker was lost \(process \d+\); another one goes on after epoch \d+")
    assert any(map(lost.fullmatch, told))
    assert sum("done: digits seed 0 lt (" in line for line in told) == 1
    trained = stages.trained
    assert without_times(swap(stages, chosen)) == without_times(swap(alone, chosen))
    assert stages.trained == trained == 3
    assert same_stages(alone.store, stages.store)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers_as_one(one_after_the_other, tmp_path, one_thread):
    stages = lab(tmp_path)
    make_ahead(stages, waves_of(["swap"])(stages, settings()), Placing(jobs=2), "cpu", str)
    assert without_times(swap(stages, settings())) == without_times(one_after_the_other[1])
    assert same_stages(one_after_the_other[0], stages.store)


@pytest.mark.slow
def test_an_interrupt_ends_the_processes_and_keeps_what_is_finished(tmp_path):
    chosen, stages = settings(recipe=LONG, seeds=(0,)), lab(tmp_path)
    key = next(iter_key(stages, "digits seed 0 true"))
    place = Processes(1, "cpu", lambda text: None)

    def interrupted():
        with Trainings(place, CPU, Deadline(Quiet(), float("inf")), 0.0, str) as at_work:
            at_work.add(stages, next(waves_of(["swap"])(stages, chosen)))
            until = time.monotonic() + 60
            while stages.store.checkpoint("stage1", key) is None and time.monotonic() < until:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stages.store.checkpoint("stage1", key)["epochs"] > 0
    assert entries(stages.store, "stage1") == 0
    with stages.store.held("stage1", key) as free:
        assert free  # nobody works on it any more


SCRIPT = """
import torch
import tailscope
from tailscope.methods import LOSSES
@LOSSES.register("mine")
def mine(counts, /):
    '''Cross-entropy of one's own.'''
    return lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none")
def main():
    tailscope.swap("digits", recipe="miniature", loss="mine", seeds=1, backbones="lt", jobs=2, store="store")
"""


def of_script(folder, start):
    (folder / "script.py").write_text(SCRIPT + start)
    command = [sys.executable, "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_program_registers_methods_for_its_processes(tmp_path):
    ended = of_script(tmp_path, "if __name__ == '__main__': main()")
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "store" / "stage1").glob("*/DONE"))) == 1


@pytest.mark.slow
def test_a_script_that_starts_itself_again_is_told_how_to_begin(tmp_path):
    ended = of_script(tmp_path, "main()")
    last = ended.stderr.strip().splitlines()[-1]
    assert "UserError" in last
    assert places.NEVER_BEGAN in last


def test_code_that_ends_the_program_ends_its_piece_alone(tmp_path):
    class Ending(Recording):
        def make(self, lab, order):
            sys.exit("that is enough")

    done = ahead(lab(tmp_path), waves_of(["swap"])(lab(tmp_path), settings(seeds=(0,))), Ending(1))
    assert [str(error) for error in done.errors] == ["its code ends the program (exit that is enough)"] * 2


def test_a_store_that_a_worker_may_not_look_at_is_one_that_it_does_not_see(monkeypatch):
    def refused(self):
        raise PermissionError(13, "no", str(self))

    monkeypatch.setattr(Path, "is_file", refused)
    job = SimpleNamespace(imports=(), threads=1, seconds=None, device="cpu", engine="auto", store=Path("s"), marker="m")
    assert work(job, None, None, lambda *far: None).state == "unshared"


def test_jobs_do_not_go_with_torchrun(tailscope_, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = tailscope_("swap", "--data", "digits", "--jobs", 2, "--out", tmp_path)
    assert (refused.code, "--devices: several processes for one training" in refused.err) == (2, True)


def test_a_gpu_of_the_cluster_is_not_looked_for_here():
    assert Placing(on="ray").own_device("cuda") == "auto"
    assert (Placing().own_device("cuda"), Placing(on="ray").own_device("cpu")) == ("cuda", "cpu")


@pytest.mark.parametrize(("cpus", "slots"), [(1, 8), (3, 2), (4, 2), (5, None)])
def test_a_stage_fits_on_one_machine(monkeypatch, cpus, slots):
    """Two machines of four cores, and one that is gone."""

    class Remote:
        def __call__(self, *_, **__):
            return self

        options = remote = __call__

    nodes = [{"Resources": {"CPU": 4.0}, "Alive": alive} for alive in (True, True, False)]
    fake = SimpleNamespace(
        init=str, shutdown=lambda: None, cluster_resources=lambda: {"CPU": 8.0}, nodes=lambda: nodes, remote=Remote()
    )
    monkeypatch.setattr(on_ray, "imported", lambda: fake)
    monkeypatch.setattr(on_ray, "connect", lambda *_: None)
    if slots is None:
        with pytest.raises(UserError, match="no machine of the cluster has more cores and GPUs than 4 and 0, a stage"):
            on_ray.OnRay(Placing(on="ray", cpus=cpus), "cpu", str)
    else:
        assert on_ray.OnRay(Placing(on="ray", cpus=cpus), "cpu", str).slots == slots


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--on", "slurm"), "--on slurm: expected ray, or ray://HOST:PORT"),
        (("--cpus", 2), "--cpus: only with --on ray"),
        (("--gpus", 0.5), "--gpus: only with --on ray"),
        (("--jobs", 2, "--devices", 2), "--devices: several processes for one training"),
    ],
)
@pytest.mark.parametrize("verb", [("compare", "--data", "digits"), ("reproduce", "table1")])
def test_options_that_do_not_go_together_are_refused(tailscope_, tmp_path, verb, options, said):
    refused = tailscope_(*verb, *options, "--out", tmp_path)
    assert (refused.code, said in refused.err) == (2, True), refused.err


def test_without_ray_a_line_says_what_to_install(tailscope_, tmp_path, monkeypatch):
    monkeypatch.setitem(plugins.sys.modules, "ray", None)
    run = ("--data", "digits", "--profile", "exp:20", "--recipe", "demo", "--out", tmp_path)
    refused = tailscope_("swap", *run, "--on", "ray")
    assert (refused.code, refused.err) == (2, "error: --on ray: Ray is not installed; pip install 'tailscope[ray]'\n")
    assert not (tmp_path / "swap.json").exists()


@pytest.mark.parametrize(
    ("on", "address", "said"),
    [
        ("ray", None, "Ray could not be started on this machine (no answer)"),
        ("ray", "10.0.0.1:6379", "the cluster at 10.0.0.1:6379 cannot be reached (no answer); is its address right?"),
        ("ray://a:1", None, "the cluster at ray://a:1 cannot be reached (no answer); is its address right?"),
    ],
)
def test_a_cluster_that_does_not_answer_is_named(monkeypatch, on, address, said):
    def init(**given):
        raise ConnectionError("first line\nno answer")

    monkeypatch.setenv("RAY_ADDRESS", address) if address else monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=re.escape(f"--on {on}: {said}")):
        on_ray.connect(SimpleNamespace(init=init), on)


# -- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(monkeypatch):
    """A Ray cluster of two machines' worth of processes, a core each."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # beside other work the default would starve them
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_that_loses_a_worker_gives_the_same_numbers(two_nodes, tmp_path, one_thread):
    chosen, told = settings(recipe=LONGER), []
    stages, alone = lab(tmp_path / "ray"), lab(tmp_path / "one")
    tell = killer(stages, told, "digits seed 0 lt", LONGER)
    make_ahead(stages, waves_of(["swap"])(stages, chosen), Placing(on="ray"), "cpu", tell)
    assert told[0] == "Ray: 2 machines, 2 stages at a time, each 1 cores, 0 GPUs"
    assert any(
        re.search(r"lt: its worker was lost \(.*process \d+\); another one goes on after epoch", x) for x in told
    )
    backbones = [line for line in told if re.match(r"done: digits seed \d (lt|true) \(", line)]
    assert len(backbones) == 4
    trained = stages.trained
    assert without_times(swap(stages, chosen)) == without_times(swap(alone, chosen))
    assert stages.trained == trained == 12
    assert same_stages(alone.store, stages.store)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_without_a_common_store_sends_archives(two_nodes, tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr(Apart, "_mark", lambda self, store: None)
    told, stages, alone = [], lab(tmp_path / "ray"), lab(tmp_path / "one")
    chosen = CompareSettings(**dict(settings()), methods="ce; tau; crt", tune="cut")
    make_ahead(stages, _waves(stages, chosen), Placing(on="ray"), "cpu", told.append)
    assert sum("does not see" in line for line in told) == 1
    assert without_times(compare(stages, chosen)) == without_times(compare(alone, chosen))
    assert same_stages(alone.store, stages.store)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_interrupt_ends_what_a_ray_cluster_works_on(two_nodes, tmp_path):
    stages = lab(tmp_path)
    key = next(iter_key(stages, "digits seed 0 true", LONGER))

    def interrupt():
        while stages.store.checkpoint("stage1", key) is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        make_ahead(stages, waves_of(["swap"])(stages, settings(recipe=LONGER)), Placing(on="ray"), "cpu", str)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with stages.store.held("stage1", key) as free:
            if free:
                break
        time.sleep(0.1)
    assert free
    assert stages.store.checkpoint("stage1", key)["epochs"] > 0
    assert entries(stages.store, "stage1") == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_more_than_a_ray_cluster_has_is_refused(two_nodes, tmp_path):
    stages = lab(tmp_path)
    with pytest.raises(UserError, match=r"has more cores and GPUs than 1 and 0, a stage asks for 64"):
        make_ahead(stages, iter([[]]), Placing(on="ray", cpus=64), "cpu", str)


def test_test_images_stay_unread_while_hyper_parameters_are_chosen(tmp_path):
    stages = lab(tmp_path)
    chosen = CompareSettings(**dict(settings(seeds=(0,))), methods="ce; crt; tau", gaps="none", tune="cut")
    ahead(stages, [next(_waves(stages, chosen))], InThreads(lambda text: None))
    assert entries(stages.store, "stage1") == 1
    assert entries(stages.store, "features") == 0
