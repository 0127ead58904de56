"""Beside other tools: loggers write what was trained, and a diagnosis during a training changes nothing of it."""

import csv
import importlib
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import experiment_setups
import tailscope
from tailscope.errors import UserError
from tailscope.progress import Deadline, Logged, Progress, Quiet, _Run, logging_to
from tailscope.training.recipes import RECIPES

QUICK = {"verdict": False, "report": False}

# -- loggers --------------------------------------------------------------------------------------------------------


def swap(out: Path, monkeypatch, **options):
    monkeypatch.setitem(RECIPES, "tiny", experiment_setups.TINY)
    return tailscope.swap("digits", recipe="tiny", profile="exp:20", out=out, **options)


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_csv_files_hold_every_epoch_and_every_cell(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.setattr("tailscope.report.build", lambda out: None)
    result = swap(tmp_path, monkeypatch, seeds=2, logger="csv")
    logs = tmp_path / "logs"
    trained = {path.parent.parent.name: rows(path) for path in logs.glob("*/version_0/metrics.csv")}
    cells = [f"seed-{s}-{b}-{c}" for s in (0, 1) for b in ("lt", "true") for c in ("lt", "true")]
    backbones = [f"seed-{s}-backbone-on-{b}" for s in (0, 1) for b in ("lt", "true")]
    assert set(trained) == {*cells, *backbones, "digits-swap"}

    for card in result["provenance"]:
        if card["stage2"] is None:
            logged = trained[f"seed-{card['seed']}-backbone-on-{card['stage1']}"]
            assert [row["step"] for row in logged] == list(range(1, card["epochs"] + 1))
            meta = experiment_setups.Store(tmp_path / "store").meta("stage1", card["key"])
            assert [row["loss"] for row in logged] == pytest.approx(meta["losses"])
            images, batch, left = sum(card["counts"]), card["batch"], card["steps"]
            seconds = 0.0
            for row in logged:
                steps = min(left, -(-images // batch))  # the last epoch may be cut short
                seconds, left = seconds + min(images, steps * batch) / row["images_per_second"], left - steps
            assert seconds == pytest.approx(meta["seconds"], rel=0.01)
            assert 0 < max(row["learning_rate"] for row in logged) <= card["learning_rate"]

    by_seed = trained["digits-swap"]
    assert [row["step"] for row in by_seed] == [0, 1]
    for name, cell in result["cells"].items():
        assert [row[f"accuracy/{name}"] for row in by_seed] == pytest.approx(cell["accuracy"])
    for name, cell in result["stage1"].items():
        assert [row[f"accuracy/{name} stage1"] for row in by_seed] == pytest.approx(cell["accuracy"])


def test_what_the_store_has_is_not_logged_again(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.setattr("tailscope.report.build", lambda out: None)
    swap(tmp_path, monkeypatch, seeds=1)
    swap(tmp_path, monkeypatch, seeds=1, logger="csv")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["digits-swap"]


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logging_to(Quiet(), "tensorboard", tmp_path) as progress:
        for step, loss in enumerate((2.0, 1.0, 0.5)):
            progress.log("seed 0: backbone on lt", step, {"loss": loss}, last=step == 2)
    found = EventAccumulator(str(tmp_path / "logs" / "seed-0-backbone-on-lt" / "version_0"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 2.0), (1, 1.0), (2, 0.5)]


def test_runs_of_wandb_stay_on_this_machine(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    seen = {}
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: seen.setdefault(given["name"], init(**given)))
    with logging_to(Quiet(), "wandb", tmp_path / "out") as progress:
        progress.log("a", 1, {"loss": 2.0})
        progress.log("b", 1, {"loss": 5.0})  # runs are open at the same time
        progress.log("a", 2, {"loss": 1.0}, last=True)
        told = [(name, run.group, run.offline, run.dir.startswith(str(tmp_path))) for name, run in seen.items()]
    assert told == [("a", "out", True, True), ("b", "out", True, True)]
    written = {run.id: run for run in seen.values()}
    files = list((tmp_path / "out" / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem.removeprefix("run-") for file in files} == set(written)
    until = time.monotonic() + 60  # wandb's own process writes the files, also after a run is said to be finished
    while not all(b"loss" in file.read_bytes() for file in files) and time.monotonic() < until:
        time.sleep(0.2)
    assert all(b"loss" in file.read_bytes() for file in files)


@pytest.mark.parametrize(
    ("logger", "package", "extra"),
    [("csv", "lightning.fabric.loggers", "lightning"), ("tensorboard", "tensorboard", "tensorboard"), ("wandb",) * 3],
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, logger, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f"\n{extra} = [" in pyproject
    said = rf"^--logger {logger}: needs the package \w+; pip install 'tailscope\[{extra}\]'$"
    with pytest.raises(UserError, match=said), logging_to(Quiet(), logger, tmp_path):
        pass


def test_a_logger_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--logger"):
        swap(tmp_path, monkeypatch, logger="cvs")
    with pytest.raises(UserError, match=r"--logger csv: its files are written to OUT/logs; give --out"):
        swap(None, monkeypatch, logger="csv")
    assert not list(tmp_path.rglob("*.safetensors"))


class Told:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.runs = []

    def begin(self, name):
        steps, ended = [], []
        self.runs.append((name, steps, ended))
        return _Run(lambda numbers, step: steps.append((step, dict(numbers))), lambda: ended.append(True))


def test_a_run_ends_with_its_last_numbers_or_with_everything():
    told = Told()
    progress = Logged(Progress(), told.begin)
    progress.log("a", 1, {"x": 1.0})
    Deadline(progress, 60).log("a", 2, {"x": 2.0}, last=True)
    progress.log("a", 1, {"x": 3.0})
    assert told.runs == [("a", [(1, {"x": 1.0}), (2, {"x": 2.0})], [True]), ("a", [(1, {"x": 3.0})], [])]
    progress.close()
    assert [ended for _, _, ended in told.runs] == [[True], [True]]


def test_runs_of_many_threads_are_kept_apart():
    told = Told()
    progress = Logged(Progress(), told.begin)

    def train(name):
        for step in range(200):
            progress.log(name, step, {"x": float(step)}, last=step == 199)

    threads = [threading.Thread(target=train, args=(str(k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = [(step, {"x": float(step)}) for step in range(200)]
    assert sorted(name for name, _, _ in told.runs) == ["0", "1", "2", "3"]
    assert all(steps == whole and ended == [True] for _, steps, ended in told.runs)


def test_a_diagnosis_logs_its_main_numbers(tmp_path):
    pytest.importorskip("lightning")
    stream = np.random.default_rng(0)
    train, held_out = (
        (2 * np.eye(3, 6)[y := np.repeat(np.arange(3), n)] + stream.normal(size=(len(y), 6)), y)
        for n in ([30, 10, 5], [12] * 3)
    )
    result = tailscope.diagnose(train, held_out, permutations=0, out=tmp_path, report=False, logger="csv")
    (logged,) = rows(tmp_path / "logs" / "diagnosis" / "version_0" / "metrics.csv")
    verdict = result["verdict"]
    assert logged["accuracy"] == verdict["current"]
    assert logged["accuracy_tail"] == verdict["groups"]["tail"]["current"]
    for gap in ("classifier_gap", "representation_gap"):
        low, high = verdict[gap]["ci95"]
        assert [logged[gap], logged[f"{gap}_low"], logged[f"{gap}_high"]] == [verdict[gap]["points"], low, high]
    assert set(logged) == {*result.scalars(), "step"}


def test_numbers_that_are_not_there_are_left_out():
    from tailscope.report.objects import Diagnosis

    assert Diagnosis({"verdict": None}).scalars() == {}
    gap = {"points": 0.1, "ci95": None}
    stored = {"verdict": {"current": 0.5, "classifier_bound": None, "groups": {"tail": None}, "classifier_gap": gap}}
    assert Diagnosis(stored).scalars() == {"accuracy": 0.5, "classifier_gap": 0.1}


# -- while somebody else trains -------------------------------------------------------------------------------------

CLASSES = 3


def pictures(counts, seed):
    stream = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shift = torch.nn.functional.one_hot(labels, 4).float().reshape(-1, 1, 2, 2)
    return 2 * shift + torch.randn(len(labels), 1, 2, 2, generator=stream), labels


TRAIN, HELD_OUT = pictures([24, 12, 6], 0), pictures([10] * CLASSES, 1)


class Noisy(TensorDataset):
    """Images with noise from all three generators that programs use."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        noise = torch.randn(()) + np.random.normal() + random.random()
        return image + 0.1 * noise.float(), label


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    )


def trained(monitor=None, epochs=3):
    """Train with shuffling, dropout and noise, and return the network with all that a generator says afterwards."""
    random.seed(1), np.random.seed(1)
    net = network()
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(Noisy(*TRAIN), batch_size=8, shuffle=True, generator=own)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    net.train()
    net[1].eval()  # a frozen batch norm stays so
    for epoch in range(epochs):
        for images, labels in loader:
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            monitor(loader)(net, epoch)
    modes = [module.training for module in net.modules()]
    drawn = random.random(), np.random.normal(), torch.rand(()).item(), torch.rand((), generator=own).item()
    return net.state_dict(), modes, drawn


@pytest.mark.parametrize("same_loader", [True, False])
def test_a_training_ends_the_same_with_and_without_a_monitor(same_loader):
    made = []

    def monitor(loader):
        if not made:
            given = loader if same_loader else DataLoader(Noisy(*TRAIN), batch_size=8, shuffle=True)
            made.append(tailscope.Monitor(given, DataLoader(Noisy(*HELD_OUT), batch_size=8), **QUICK))
        return made[0]

    with_it, modes, drawn = trained(monitor)
    without, modes_before, drawn_before = trained()
    assert len(made[0].history) == 3
    assert {name for name in without if not torch.equal(with_it[name], without[name])} == set()
    assert (modes, drawn) == (modes_before, drawn_before)


def test_a_monitor_that_disturbed_the_training_would_be_seen():
    def disturbing(loader):
        return lambda net, epoch: next(iter(loader))

    with_it, _, drawn = trained(disturbing)
    without, _, drawn_before = trained()
    assert drawn != drawn_before
    assert any(not torch.equal(with_it[name], without[name]) for name in without)


def test_a_monitor_says_what_diagnose_says_of_the_network_at_that_time(tmp_path):
    net = network().eval()
    monitor = tailscope.Monitor(TRAIN, HELD_OUT, every=2, out=tmp_path, report=False)
    assert [monitor(net, epoch) is not None for epoch in range(4)] == [False, True, False, True]
    plain = tailscope.diagnose(TRAIN, HELD_OUT, model=net, permutations=0)
    first, second = monitor.history
    assert (first.epoch, second.epoch) == (1, 3)
    assert first.result["verdict"] == second.result["verdict"] == plain["verdict"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/diagnosis.json")) == ["epoch-0001", "epoch-0003"]

    frame = monitor.history.to_frame()
    assert list(frame["epoch"]) == [1, 3]
    assert list(frame["verdict"]) == [plain["verdict"]["bottleneck"]] * 2
    assert list(frame["accuracy"]) == [plain["verdict"]["current"]] * 2

    band, line = monitor.history.plot().to_dict()["layer"]
    assert {band["mark"]["type"], line["mark"]["type"]} == {"area", "line"}
    drawn = {(row["epoch"], row["of"]): row for row in monitor.history.plot().to_dict()["data"]["values"]}
    gap = plain["verdict"]["representation_gap"]
    at = drawn[3, "representation"]
    assert [at["gap"], at["low"], at["high"]] == [gap["points"], *gap["ci95"]]
    assert len(drawn) == 4

    with pytest.raises(UserError, match="has the diagnoses of an earlier training"):
        tailscope.Monitor(TRAIN, HELD_OUT, out=tmp_path)
    tailscope.Monitor(TRAIN, HELD_OUT, out=tmp_path, overwrite=True)


def test_what_cannot_be_diagnosed_is_a_warning_and_training_goes_on():
    net = network()
    with torch.no_grad():
        net[3].weight.fill_(torch.nan)
    monitor = tailscope.Monitor(TRAIN, HELD_OUT, **QUICK)
    with pytest.warns(UserWarning, match="epoch 7: not diagnosed: "):
        assert monitor(net, 7) is None
    assert monitor.history == []
    with pytest.raises(UserError):
        monitor.diagnose(net, 7)


def test_a_monitor_refuses_what_cannot_work_at_once():
    with pytest.raises(UserError, match="every: 0; give a number of epochs of at least 1"):
        tailscope.Monitor(TRAIN, HELD_OUT, every=0)
    with pytest.raises(TypeError, match="permutation"):
        tailscope.Monitor(TRAIN, HELD_OUT, permutation=9)


def fit(tmp_path, callbacks=(), epochs=2, **options):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    torch.manual_seed(0)
    module = Module()
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=8, shuffle=True)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=CSVLogger(tmp_path, "", ""),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, loader)
    return module.state_dict(), torch.rand(()).item()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_callback_of_lightning(tmp_path):
    pytest.importorskip("lightning")
    from tailscope.integrations.lightning import DiagnosisCallback

    callback = DiagnosisCallback(TRAIN, HELD_OUT, every=2, network="net")
    with_it, drawn = fit(tmp_path / "with", [callback])
    without, drawn_before = fit(tmp_path / "without")
    assert {name for name in without if not torch.equal(with_it[name], without[name])} == set()
    assert drawn == drawn_before
    ((epoch, result),) = callback.history
    assert epoch == 1
    with (tmp_path / "with" / "metrics.csv").open(newline="") as file:
        (logged,) = [row for row in csv.DictReader(file) if row["tailscope/accuracy"]]
    assert float(logged["tailscope/accuracy"]) == result["verdict"]["current"]
    assert float(logged["tailscope/representation_gap"]) == result["verdict"]["representation_gap"]["points"]
    assert int(logged["step"]) == 2 * -(-len(TRAIN[1]) // 8)

    with pytest.raises(UserError, match="network: Module has no module 'body'"):
        fit(tmp_path / "wrong", [DiagnosisCallback(TRAIN, HELD_OUT, network="body")])


def test_the_callback_works_in_one_process_only():
    pytest.importorskip("lightning")
    from types import SimpleNamespace

    from tailscope.integrations.lightning import DiagnosisCallback

    with pytest.raises(UserError, match="2 processes train, and it works in one only"):
        DiagnosisCallback(TRAIN, HELD_OUT).setup(SimpleNamespace(world_size=2), network(), "fit")


def test_without_lightning_the_callback_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "tailscope.integrations.lightning", raising=False)
    with pytest.raises(UserError, match=r"needs the package lightning; pip install 'tailscope\[lightning\]'"):
        importlib.import_module("tailscope.integrations.lightning")
