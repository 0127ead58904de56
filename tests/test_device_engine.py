"""Which engine trains: timed by a clock that tells what it is told to, remembered, kept by checkpoints, overridden."""

import itertools
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tailscope import device
from tailscope.device import COMPILED_FROM_SECONDS, ROUNDS, SECONDS, Runtime, Work, choose
from tailscope.errors import UserError
from tailscope.networks import norm_act
from tailscope.store.files import load_header
from tailscope.training import loop
from test_training_resume import Interrupting, Stopped, stop
from test_training_step_graph import Again
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1

BATCH = (128, 32, 32, 3)
LONG = 20_000
PLAIN, ALL = ["eager", "fused"], ["eager", "fused", "compiled"]
FUSED = pytest.mark.skipif(not norm_act.available(), reason="no C++ compiler")
QUICK = "resnet8(width=16)"


def work(steps=5_000, **alike):
    return Work({"model": "resnet32", "threads": 2, **alike}, BATCH, steps)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, which keeps the kernel that was built before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tailscope" / "engines"


class Machine:
    """Takes steps that last as long as it is told: seconds by engine, a number or one after the other."""

    def __init__(self, monkeypatch, **seconds):
        self.now, self.prepared, self.steps = 0.0, [], []
        self.seconds = {
            name: itertools.repeat(s) if isinstance(s, float | Exception) else iter(s) for name, s in seconds.items()
        }
        monkeypatch.setattr(device, "_clock", lambda: self.now)

    def prepare(self, name):
        self.prepared.append(name)

        def step():
            self.steps.append(name)
            took = next(self.seconds[name])
            if isinstance(took, Exception):
                raise took
            self.now += took

        return step


@pytest.mark.parametrize(("eager", "fused", "best"), [(0.2, 0.1, "fused"), (0.1, 0.2, "eager")])
def test_the_fastest_is_taken_and_remembered_in_at_most_three_seconds(monkeypatch, cache, eager, fused, best):
    machine, told = Machine(monkeypatch, eager=eager, fused=fused), []
    assert choose(PLAIN, work(), machine.prepare, told.append) == best
    assert machine.now <= SECONDS
    assert machine.steps[:4] == [*PLAIN, *PLAIN]  # in turn
    assert told == [f"engine {best}; seconds a step: eager {eager}, fused {fused}"]
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["alike"] == work().alike
    again = Machine(monkeypatch)  # knows no step
    for steps in (9_000, 1):
        assert choose(PLAIN, work(steps), again.prepare, told.append) == best
    assert (again.prepared, len(told)) == ([], 1)


def test_the_least_time_counts_whatever_else_the_machine_does(monkeypatch):
    busy = Machine(monkeypatch, eager=[0.9, 0.2, 0.2, 0.2, 0.2, 0.2], fused=[0.1, 0.5, 0.4, 0.3, 0.3, 0.3])
    assert choose(PLAIN, work(), busy.prepare) == "fused"


def test_a_machine_that_is_too_busy_to_tell_is_measured_another_time(monkeypatch, cache):
    for seconds, taken in (({"eager": 4.0}, 1), ({"eager": 0.7, "fused": 1.0}, 4)):
        machine = Machine(monkeypatch, **seconds)
        assert choose(PLAIN, work(), machine.prepare) == "fused"
        assert len(machine.steps) == taken
        assert not cache.exists()
    slow = Machine(monkeypatch, eager=0.6, fused=0.8)
    assert choose(PLAIN, work(), slow.prepare) == "eager"
    assert slow.now <= SECONDS


def test_compiled_steps_that_cannot_be_timed_are_not_taken(monkeypatch):
    slow = itertools.chain([60.0], itertools.repeat(2.0))
    machine = Machine(monkeypatch, eager=0.2, fused=0.1, compiled=slow)
    assert choose(ALL, work(LONG), machine.prepare) == "fused"


def test_quick_steps_are_not_timed_for_three_seconds(monkeypatch):
    machine = Machine(monkeypatch, eager=0.001, fused=0.002)
    assert choose(PLAIN, work(), machine.prepare) == "eager"
    assert len(machine.steps) == 2 * ROUNDS


def test_a_short_training_and_one_without_a_choice_are_not_timed(monkeypatch, cache):
    machine = Machine(monkeypatch)
    assert choose(PLAIN, work(steps=700), machine.prepare) == "fused"
    assert choose(ALL, work(steps=700), machine.prepare) == "fused"
    assert choose(["eager", "compiled"], work(steps=700), machine.prepare) == "eager"
    assert choose(["eager"], work(steps=10**9), machine.prepare) == "eager"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("compiled", "steps", "chosen"),
    [
        (0.05, LONG, "compiled"),
        (0.0999, LONG, "fused"),  # gains 2 s, and compiling takes 60
        (0.0999, 100 * LONG, "compiled"),
        (0.2, LONG, "fused"),
    ],
)
def test_compiling_is_taken_where_it_is_repaid(monkeypatch, compiled, steps, chosen):
    machine = Machine(monkeypatch, eager=0.2, fused=0.1, compiled=itertools.chain([60.0], itertools.repeat(compiled)))
    assert choose(ALL, work(steps), machine.prepare) == chosen
    assert machine.now <= SECONDS + 60
    # What was measured once decides for every length.
    assert choose(ALL, work(1_000), Machine(monkeypatch).prepare) == "fused"


def test_compiling_is_tried_by_the_first_training_that_is_long_enough(monkeypatch):
    machine = Machine(monkeypatch, eager=0.2, fused=0.1, compiled=itertools.chain([60.0], itertools.repeat(0.01)))
    short = int(COMPILED_FROM_SECONDS / 0.1) - 10
    assert choose(ALL, work(short), machine.prepare) == "fused"
    assert machine.prepared == PLAIN
    assert choose(ALL, work(LONG), machine.prepare) == "compiled"
    assert machine.prepared == [*PLAIN, "fused", "compiled"]
    assert choose(PLAIN, work(LONG), machine.prepare) == "fused"  # where the compiler has gone


@pytest.mark.parametrize(
    ("compiled", "chosen", "said"),
    [
        (itertools.chain([60.0], itertools.repeat(0.0999)), "fused", ""),  # gains 2 s, and compiling takes 60
        (itertools.repeat(0.0999), "compiled", ""),
        (iter([RuntimeError("no vector extension")]), "fused", "torch.compile fails here"),
    ],
)
def test_compiling_may_be_a_part_of_the_preparation(monkeypatch, caplog, compiled, chosen, said):
    """As it is where steps are captured: those before the capture compile."""
    machine = Machine(monkeypatch, eager=0.2, fused=0.1, compiled=compiled)

    def prepare(name):
        step = machine.prepare(name)
        if name == "compiled":
            step()
        return step

    assert choose(ALL, work(LONG), prepare) == chosen
    assert said in caplog.text


def test_a_compiler_that_fails_is_a_warning(monkeypatch, caplog):
    machine = Machine(monkeypatch, eager=0.2, fused=0.1, compiled=RuntimeError("no\nvector extension"))
    assert choose(ALL, work(LONG), machine.prepare) == "fused"
    assert "torch.compile fails here, training goes on without: no vector extension" in caplog.text


@pytest.mark.parametrize(
    "alike", [{"model": "resnet20"}, {"threads": 1}, {"precision": "float32"}, {"processor": "B"}, {"torch": "3"}]
)
def test_what_is_not_alike_is_timed_by_itself(monkeypatch, alike):
    choose(PLAIN, work(), Machine(monkeypatch, eager=0.2, fused=0.1).prepare)
    assert choose(PLAIN, work(**alike), Machine(monkeypatch, eager=0.1, fused=0.2).prepare) == "eager"
    assert choose(PLAIN, work(), Machine(monkeypatch).prepare) == "fused"


def test_an_engine_that_was_not_there_is_timed_when_it_comes(monkeypatch):
    choose(["eager", "compiled"], work(), Machine(monkeypatch, eager=0.2).prepare)
    assert choose(ALL, work(), Machine(monkeypatch, eager=0.2, fused=0.1).prepare) == "fused"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\udcff", '{"step": 5, "compiling": 0}', '{"step": {"eager": "x"}, "compiling": 0}',
     '{"step": {"eager": 0.1, "fused": -1}, "compiling": 0}', '{"step": {"eager": NaN}, "compiling": 0}',
     '{"step": {"eager": 0.1}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_cache_is_measured_again(monkeypatch, cache, content):
    choose(PLAIN, work(), Machine(monkeypatch, eager=0.1, fused=0.2).prepare)
    (kept,) = cache.iterdir()
    kept.write_bytes(content.encode(errors="surrogateescape"))
    for seconds in ({"eager": 0.2, "fused": 0.1}, {}):  # and then it is whole
        assert choose(PLAIN, work(), Machine(monkeypatch, **seconds).prepare) == "fused"


@pytest.mark.parametrize("home", ["file", "folder of another kind"])
def test_a_cache_that_cannot_be_written_is_measured_every_time(monkeypatch, tmp_path, home):
    place = tmp_path / "cache"
    if home == "file":
        place.write_text("")
    else:
        device._file(work()).mkdir(parents=True)
    for _ in range(2):
        machine = Machine(monkeypatch, eager=0.2, fused=0.1)
        assert choose(PLAIN, work(), machine.prepare) == "fused"
        assert machine.steps


# -- in a training --------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """Time the shortest training; the fake clock finds `timed.best` the fastest."""
    found = SimpleNamespace(best="eager", calls=[])

    def in_turn(steps, seconds):
        for step in steps.values():
            assert step() > 0  # the loss of a copy
        found.calls.append(list(steps))
        return {name: 0.1 if name == found.best else 0.2 for name in steps}

    monkeypatch.setattr(device, "TIMED_FROM_PIXELS", 1)
    monkeypatch.setattr(device, "_in_turn", in_turn)
    monkeypatch.setattr(device, "can_compile", lambda: False)
    return found


def stop_after(steps, spec, images, scratch, runtime=CPU):
    with pytest.raises(Stopped):
        train_stage1(spec, images, scratch, runtime=replace(runtime, progress=Interrupting(steps, stop)))


def card(meta):
    return meta["arithmetic"]["engine"], meta["fused"], meta["compiled"]


@FUSED
def test_a_training_times_its_engines_once_and_its_description_names_the_fastest(tmp_path, timed, cache):
    images = digits()
    spec = stage1_spec(images, steps=6, model=QUICK, mix="mixup")
    _, meta = train_stage1(spec, images, tmp_path / "a")
    assert card(meta) == ("eager", False, False)
    timed.best = "fused"
    _, again = train_stage1(spec, images, tmp_path / "b", seed=1)
    assert card(again) == ("eager", False, False)  # remembered
    assert timed.calls == [["eager", "fused"]]
    alike = json.loads(next(cache.iterdir()).read_text())["alike"]
    assert alike == {
        "model": QUICK, "images": [64, 8, 8, 1], "parts": ["cross_entropy", "linear", "mixup", None],
        "processor": device.cpu_name(), "threads": 1,
        "precision": "float32", "torch": torch.__version__,
    }  # fmt: skip


@FUSED
def test_what_is_timed_of_a_captured_step_is_its_replay(tmp_path, timed, monkeypatch):
    """Not the warm-up nor the capture; and times of steps that are captured are not those of others."""
    images, spec, captures, at_first = digits(), stage1_spec(digits(), steps=6, model=QUICK), [], []

    @contextmanager
    def standing_in(device):
        captures.append(Again())
        yield captures[-1]

    def in_turn(steps, seconds):
        (capture,) = captures
        at_first.append((capture.recorded, capture.replayed))
        for step in steps.values():
            step()
        at_first.append((capture.recorded, capture.replayed))
        return {"eager": 0.1, "fused": 0.2}

    train_stage1(spec, images, tmp_path / "plain")
    monkeypatch.setattr(loop, "capturing", standing_in)
    monkeypatch.setattr(device, "_in_turn", in_turn)
    train_stage1(spec, images, tmp_path / "captured")
    assert at_first == [(2, 2 * 2), (2, 2 * 2 + 2)]
    assert timed.calls == [["eager", "fused"]]


@FUSED
def test_timing_changes_no_bit_of_a_training(tmp_path, timed, monkeypatch):
    images, timed.best = digits(), "fused"
    spec = stage1_spec(images, steps=6, model=QUICK)
    state, _ = train_stage1(spec, images, tmp_path / "timed")
    monkeypatch.setattr(device, "TIMED_FROM_PIXELS", 1e18)
    untimed, _ = train_stage1(spec, images, tmp_path / "untimed")
    assert len(timed.calls) == 1
    assert_same_state(state, untimed)


def test_the_demo_is_not_timed(tmp_path, monkeypatch):
    from tailscope.training.recipes import RECIPES

    monkeypatch.setattr(device, "_in_turn", lambda *_: pytest.fail("engines were timed"))
    images = digits()
    demo = RECIPES["demo"].stage1
    planned = Work({}, (demo.batch, 8, 8, 1), demo.lengths(1_300)[1])
    assert choose(PLAIN, planned, lambda name: pytest.fail(name)) == "fused"
    train_stage1(stage1_spec(images, steps=2), images, tmp_path)


@FUSED
def test_a_resumed_training_keeps_its_engine(tmp_path, timed):
    images = digits()
    spec = stage1_spec(images, steps=10, model=QUICK)
    whole, _ = train_stage1(spec, images, tmp_path / "whole")
    stop_after(6, spec, images, tmp_path / "cut")
    (tmp_path / "cache" / "tailscope" / "engines").rename(tmp_path / "gone")
    timed.best = "fused"
    state, meta = train_stage1(spec, images, tmp_path / "cut")
    assert card(meta) == ("eager", False, False)
    assert len(timed.calls) == 1
    assert_same_state(state, whole)


@FUSED
def test_a_checkpoint_of_an_engine_that_is_gone_goes_on_with_another_and_both_are_named(tmp_path, timed, monkeypatch):
    images = digits()
    spec = stage1_spec(images, steps=10, model=QUICK)
    timed.best = "fused"
    stop_after(6, spec, images, tmp_path)
    assert load_header(tmp_path / "checkpoint.safetensors")["engines"] == ["fused"]
    monkeypatch.setattr(norm_act, "available", lambda: False)
    _, meta = train_stage1(spec, images, tmp_path)
    assert card(meta) == ("fused, then eager", True, False)


@FUSED
def test_what_is_asked_for_is_taken_whatever_was_before(tmp_path, timed):
    images = digits()
    spec = stage1_spec(images, steps=10, model=QUICK)
    asked = {name: replace(CPU, engine=name) for name in PLAIN}
    stop_after(6, spec, images, tmp_path / "a", runtime=asked["fused"])
    _, changed = train_stage1(spec, images, tmp_path / "a", runtime=asked["eager"])
    assert card(changed) == ("fused, then eager", True, False)
    _, finished = train_stage1(spec, images, tmp_path / "a", runtime=asked["fused"])  # nothing is left to train
    assert card(finished) == ("fused, then eager", True, False)
    assert timed.calls == []


@FUSED
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_engines_train_alike(tmp_path, low):
    images, losses, states = digits(), {}, {}
    spec = stage1_spec(images, steps=20, model=QUICK, train={"learning_rate": 0.02})
    for name in PLAIN:
        state, meta = train_stage1(spec, images, tmp_path / name, runtime=replace(CPU, low_precision=low, engine=name))
        assert meta["arithmetic"]["engine"] == name
        losses[name], states[name] = meta["losses"], state["conv1.weight"]
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-3 if low == torch.float32 else 0.03)
    assert not torch.equal(*states.values())  # else this would compare an engine with itself


def test_a_network_with_nothing_to_fuse_says_what_it_used(tmp_path):
    images = digits()
    _, meta = train_stage1(
        stage1_spec(images, steps=2, model="resnet8(width=1)"), images, tmp_path, runtime=replace(CPU, engine="fused")
    )
    assert card(meta) == ("eager", False, False)


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Fused", "", "jit"])
def test_an_unknown_engine_is_one_line(name):
    with pytest.raises(UserError, match=f"unknown --engine {name!r};.* known: auto, eager, fused, compiled"):
        Runtime.choose("cpu", engine=name)


def test_an_engine_that_the_machine_has_not_is_one_line(monkeypatch):
    monkeypatch.setattr(norm_act, "available", lambda: False)
    monkeypatch.setattr(device, "can_compile", lambda: False)
    assert Runtime.choose("cpu", engine="eager").engine == "eager"
    assert Runtime.choose("cpu").engine is None
    for name in ("fused", "compiled"):
        with pytest.raises(UserError, match=f"--engine {name}: .*; take auto or eager"):
            Runtime.choose("cpu", engine=name)


def test_without_compiler_or_headers_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(device.sysconfig, "get_path", lambda *_, **__: "/nowhere")
    assert not device.can_compile()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not device.can_compile()


def test_every_verb_that_trains_takes_it(tailscope_, tmp_path):
    for verb in (["demo"], *([v, "--data", "digits"] for v in ("swap", "ladder", "geometry")), ["reproduce", "table1"]):
        ended = tailscope_(*verb, "--out", tmp_path, "--engine", "x")
        assert (ended.code, ended.err) == (2, "error: unknown --engine 'x'; known: auto, eager, fused, compiled\n")
