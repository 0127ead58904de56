"""Captured steps: everything but CUDA's own capture is tested on the CPU, with one that replays by running again."""

import gc
import threading
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tailscope.device import Runtime
from tailscope.methods.mixing import Mix
from tailscope.spec import TrainSpec
from tailscope.training import loop, step
from tailscope.training.loop import new_model
from tailscope.training.objective import Objective
from tailscope.training.step import WARM_UP, CudaCapture, GraphedStep, Normalizer, Stepper, capturing, loss_function
from test_training_resume import Interrupting, Stopped, stop
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1

TRAIN = TrainSpec(
    steps=12, batch=16, learning_rate=0.05, momentum=0.9, weight_decay=1e-3, schedule="one_cycle()", precision="fp32"
)


class Again:
    """Replays by running what was recorded again, on the tensors that were there at the recording."""

    def __init__(self):
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def warm_up(self, step, *given):
        self.warmed += 1
        return step(*given)

    def record(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


class Refuses(Again):
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


def stepper_of(capture):
    images = digits()
    model = new_model("resnet8", images.images.shape[-1], images.num_classes, 0).train()
    objective = Objective(stage1_spec(images), images.counts(), model.feature_dim, 0, CPU.device)
    compute = loss_function(model, objective, Normalizer.of(images.images), torch.float32)
    return Stepper(model, objective, compute, TRAIN, capture=capture)


def trained(capture, mix, batches=8, tail=True):
    """Return the losses and the state after some full batches and, now and then, a short one."""
    images, stepper = digits(), stepper_of(capture)
    if isinstance(capture, BreaksOff):
        capture.stepper = stepper
    stream, losses = torch.Generator().manual_seed(0), []
    for number in range(batches):
        rows = torch.randint(len(images), (5 if tail and number % 3 == 2 else 16,), generator=stream)
        lam = torch.rand((1,), generator=stream)
        mixed = Mix(lam.view(1, 1, 1, 1), lam, torch.randperm(len(rows), generator=stream)) if mix else Mix()
        losses.append(stepper(images.images[rows], images.labels[rows], 1 / (number + 1), mixed))
    return torch.stack(losses), stepper.state()


@pytest.mark.parametrize("mix", [False, True])
def test_a_captured_step_takes_every_batch_rate_and_mixture_that_it_is_given(mix):
    capture = Again()
    losses, state = trained(capture, mix, batches=13)
    expected_losses, expected = trained(None, mix, batches=13)
    full, short = 13 - 4, 4  # every third batch is short: they have a graph of their own
    assert (capture.warmed, capture.recorded) == (2 * WARM_UP, 2)
    assert capture.replayed == full - WARM_UP + short - WARM_UP
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)  # the rate is rounded to float32
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len({float(loss) for loss in losses}) == len(losses)  # a loss that is handed out is not overwritten


def test_where_the_capture_fails_steps_go_on_as_they_are(caplog):
    losses, state = trained(Refuses(), mix=False)
    assert caplog.text.count("training will be slower") == 1
    assert "not permitted" in caplog.text
    expected_losses, expected = trained(Again(), mix=False)
    assert torch.equal(losses, expected_losses)
    assert_same_state(state, expected)


class BreaksOff(Again):
    """Its captures fail after backward: gradients lie where nothing wrote, and nothing else has moved."""

    def record(self, work):
        before = {name: tensor.clone() for name, tensor in self.stepper.model.state_dict().items()}

        def refuse():
            for parameter in self.stepper.model.parameters():
                parameter.grad.fill_(torch.nan)
            raise RuntimeError("the capture was invalidated")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.stepper.optimizer, "step", refuse)
            try:
                work()
            finally:
                self.stepper.model.load_state_dict(before)


def test_a_capture_that_breaks_off_leaves_no_gradient_to_the_next_step():
    losses, state = trained(BreaksOff(), mix=False, tail=False)
    expected_losses, expected = trained(Again(), mix=False, tail=False)
    assert torch.equal(losses, expected_losses)
    assert_same_state(state, expected)


def test_a_stepper_and_its_graphs_go_without_the_garbage_collector():
    stepper = stepper_of(Again())
    alive = weakref.ref(stepper), weakref.ref(stepper._full), weakref.ref(stepper._short)
    gc.disable()
    try:
        del stepper
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


class FakeCuda:
    """CUDA's streams and graphs as far as a training touches them: they note what is done, and work runs at once."""

    def __init__(self, patch):
        self.done, self.dealt = [], 0
        self.local = threading.local()
        patch.setattr(torch.cuda, "Stream", self.stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: getattr(self.local, "stream", "default"))
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(step, "_IDLE", type(step._IDLE)(list))

    def stream(self, device):
        """PyTorch deals out the same 32 in turn."""
        assert step._PREPARING.locked()
        self.dealt += 1
        return FakeStream(self, (self.dealt - 1) % 32)

    @contextmanager
    def on(self, stream):
        before, self.local.stream = getattr(self.local, "stream", "default"), stream
        yield
        self.local.stream = before

    @contextmanager
    def graph(self, captured, *, stream, capture_error_mode):
        assert step._PREPARING.locked()
        assert stream is self.local.stream
        assert capture_error_mode == "thread_local"
        self.done.append(("capture", captured, stream.number))
        yield


class FakeStream:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def wait_stream(self, other):
        assert step._PREPARING.locked()
        self.cuda.done.append(("wait", self.number, other))

    def synchronize(self):
        self.cuda.done.append(("synchronize", self.number))


class FakeGraph:
    def __init__(self, cuda):
        self.cuda = cuda

    def replay(self):
        self.cuda.done.append(("replay", self))

    def reset(self):
        self.cuda.done.append(("reset", self))


GPU = torch.device("cuda", 0)


def test_a_training_has_one_stream_and_its_graphs_end_with_it(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    with capturing(GPU) as capture:
        assert torch.cuda.current_stream(GPU).number == 0
        capture.warm_up(lambda: torch.zeros(()))
        replays = [capture.record(lambda: None), capture.record(lambda: None)]
        for replay in replays:
            replay()
    full, short = (replay.__self__ for replay in replays)
    assert cuda.done == [
        ("wait", 0, "default"),
        ("capture", full, 0),
        ("capture", short, 0),
        ("replay", full),
        ("replay", short),
        ("synchronize", 0),
        ("reset", full),
        ("reset", short),
    ]
    assert torch.cuda.current_stream(GPU) == "default"


@pytest.mark.parametrize(("asked", "captures"), [("0", False), ("1", True), (None, True)])
def test_where_the_environment_asks_for_no_graphs_nothing_is_captured(monkeypatch, asked, captures):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.delenv("TAILSCOPE_GRAPHS", raising=False)
    if asked is not None:
        monkeypatch.setenv("TAILSCOPE_GRAPHS", asked)
    with capturing(GPU) as capture:
        assert (capture is not None) is captures
    assert cuda.dealt == captures


def test_trainings_at_a_time_never_share_a_stream(monkeypatch):
    """A long training beside more short ones than PyTorch has streams."""
    FakeCuda(monkeypatch)
    numbers = []
    with capturing(GPU):
        long = torch.cuda.current_stream(GPU).number
        for _ in range(20):
            with capturing(GPU):
                first = torch.cuda.current_stream(GPU).number
                with capturing(GPU):
                    numbers.append((first, torch.cuda.current_stream(GPU).number))
    assert all(len({long, *pair}) == 3 for pair in numbers)


def test_graphs_end_where_a_training_fails(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def refuses(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    def fails():
        with capturing(GPU) as capture:
            capture.record(lambda: None)
            monkeypatch.setattr(torch.cuda, "graph", refuses)
            with pytest.raises(RuntimeError, match="not permitted"):
                capture.record(lambda: None)
            stop()

    with pytest.raises(Stopped):
        fails()
    captured = cuda.done[1][1]
    assert cuda.done[1:] == [("capture", captured, 0), ("synchronize", 0), ("reset", captured)]
    assert [stream.number for stream in step._IDLE[GPU]] == [0]


def test_a_training_captures_until_its_end_and_is_the_same(monkeypatch, tmp_path):
    """The whole of stage 1 with a stand-in for the capture; 300 images are four full batches and a short one."""
    found = []

    @contextmanager
    def standing_in(device):
        found.append(Again())
        try:
            yield found[-1]
        finally:
            found.append("ended")

    spec, images = stage1_spec(digits(), steps=23), digits()
    _, plain = train_stage1(spec, images, tmp_path / "plain")
    monkeypatch.setattr(loop, "capturing", standing_in)
    _, meta = train_stage1(spec, images, tmp_path / "captured")
    capture, ended = found
    assert ended == "ended"
    assert (capture.recorded, capture.replayed) == (2, 23 - 2 * WARM_UP)
    assert meta["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    with pytest.raises(Stopped):
        train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(7, stop)))
    assert found[3:] == ["ended"]


def test_other_mistakes_in_a_step_are_not_hidden():
    def broken(*given):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        GraphedStep(broken, Again())(torch.ones(1))


def test_on_a_cpu_nothing_is_captured(tmp_path, monkeypatch):
    monkeypatch.setattr(GraphedStep, "__init__", lambda *_: pytest.fail("a step was captured"))
    _, meta = train_stage1(stage1_spec(digits(), steps=6), digits(), tmp_path)
    assert CPU.device.type == "cpu"
    assert meta["steps"] == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_captured_training_is_the_same_training(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else gradients of weights may differ by rounding
    spec, images = stage1_spec(digits(), steps=40), digits()
    runtime = Runtime.choose("cuda", engine="eager")
    state, meta = train_stage1(spec, images, tmp_path / "captured", runtime=runtime)
    again, _ = train_stage1(spec, images, tmp_path / "again", runtime=runtime)
    assert_same_state(state, again)
    monkeypatch.setattr(CudaCapture, "record", Refuses().record)
    _, plain = train_stage1(spec, images, tmp_path / "plain", runtime=runtime)
    assert meta["losses"] == pytest.approx(plain["losses"], rel=1e-3)
