"""Initialisation, order, augmentation and mixing have streams of their own; where a run computes changes none."""

import contextlib
import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from image_trees import photos as draw_photos
from tailscope.data.decoding import decode
from tailscope.data.sources import load as load_files
from tailscope.device import Runtime, Solo
from tailscope.encoders import load as load_encoder
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError
from tailscope.experiments.trainings import prepare_thread
from tailscope.methods import MIXINGS, augmentations
from tailscope.progress import Quiet
from tailscope.seeds import derive, keyed, numpy_stream, torch_stream
from tailscope.spec import StageSpec, TrainSpec
from tailscope.training.extract import extract, fit_classifier
from tailscope.training.loop import _Batches, new_model
from tailscope.training.step import Normalizer
from training_setups import CPU, assert_same_state, data_spec, digits, stage1_spec, train_stage1


def batches(epoch=0, seed=0, steps=5, images=None, **changes):
    """Return an epoch's batches as one tensor each of images, labels, and mixing weights and partners."""
    images = images or digits()
    spec = stage1_spec(images, **changes)
    mixing = MIXINGS.make(spec.mix) if spec.mix else None
    drawing = _Batches(spec, images, mixing, seed, CPU.device, Solo(), None).epoch(epoch, steps, 0.0)
    drawn = [next(parts) for _, parts in drawing]
    mixes = [(b.mix.labels, b.mix.partner) for b in drawn]
    return torch.cat([b.images for b in drawn]), torch.cat([b.labels for b in drawn]), mixes


def test_the_order_depends_on_seed_and_epoch_alone():
    labels = batches()[1]
    for changes in ({"augment": ()}, {"augment": ("autoaugment", "flip")}, {"mix": "mixup"}, {"model": "resnet20"}):
        assert torch.equal(batches(**changes)[1], labels)
    assert not torch.equal(batches(seed=1)[1], labels)
    assert not torch.equal(batches(epoch=1)[1], labels)
    assert torch.equal(batches(seed=0)[1], labels)


def test_the_augmentation_does_not_depend_on_mixing_and_the_mixing_not_on_augmentation():
    images, _, mixes = batches(mix="mixup")
    assert torch.equal(images, batches()[0])
    assert not torch.equal(images, batches(seed=1)[0])
    assert not torch.equal(images, batches(epoch=1)[0])
    others = batches(mix="mixup", augment=("autoaugment",))[2]
    for (lam, partner), (other_lam, other_partner) in zip(mixes, others, strict=True):
        assert torch.equal(lam, other_lam)
        assert torch.equal(partner, other_partner)
        assert torch.equal(partner.sort().values, torch.arange(len(partner)))
        assert 0 <= lam <= 1
    assert len({float(lam) for lam, _ in mixes}) == len(mixes)


def test_an_epoch_sees_every_image_once_and_the_last_batch_is_short():
    images = digits()
    found, labels, mixes = batches(augment=())
    assert len(mixes) == 5
    assert len(found) == 300
    assert torch.equal(labels.sort().values, images.labels.sort().values)
    rows = {image.numpy().tobytes() for image in images.images}
    assert {image.numpy().tobytes() for image in found} == rows


def test_a_cut_epoch_is_the_beginning_of_a_whole_one():
    whole, cut = batches(augment=(), mix="mixup"), batches(augment=(), mix="mixup", steps=2)
    assert torch.equal(cut[0], whole[0][:128])
    assert torch.equal(cut[1], whole[1][:128])


def test_the_initialisation_depends_on_the_seed_alone_and_leaves_the_global_stream():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = new_model("resnet8", 1, 10, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same_state(first, new_model("resnet8", 1, 10, seed=0).state_dict())
    other = new_model("resnet8", 1, 10, seed=1).state_dict()
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_training_neither_reads_nor_moves_the_global_streams(tmp_path):
    images = digits(80)
    spec = stage1_spec(images, steps=3, augment=("crop", "flip", "autoaugment"), mix="mixup")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = train_stage1(spec, images, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = train_stage1(spec, images, tmp_path / "b")
    assert_same_state(first, again)
    other, _ = train_stage1(spec, images, tmp_path / "c", seed=1)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def initial_classifier():
    """A classifier after one step of a vanishing learning rate."""
    spec = StageSpec(data=data_spec(digits()), train=TrainSpec(steps=1, batch=300, learning_rate=1e-30))
    return fit_classifier(spec, [(torch.zeros(300, 8), digits().labels)], digits().counts(), seed=0)[0]


SEEDED = {
    "backbone": lambda: new_model("resnet8", 1, 10, seed=0).state_dict(),
    "classifier": initial_classifier,
    "encoder": lambda: load_encoder("resnet8", wishes=Wishes("none")).model.state_dict(),
}


@pytest.mark.parametrize("one", SEEDED)
@pytest.mark.parametrize("other", SEEDED)
def test_threads_that_seed_the_default_generator_do_not_disturb_one_another(one, other):
    """Without the lock one in seven backbones started from other weights while classifiers were fitted."""
    before = torch.get_rng_state()
    expected = {name: SEEDED[name]() for name in {one, other}}
    interval, stop = sys.getswitchinterval(), threading.Event()

    def disturb():
        while not stop.is_set():
            assert_same_state(SEEDED[other](), expected[other])

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            disturbing = pool.submit(disturb)
            for _ in range(20):
                assert_same_state(SEEDED[one](), expected[one])
            stop.set()
            disturbing.result()
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_blocks_of_one_thread_may_nest():
    with keyed(1):
        first = torch.rand(2)
        with keyed(2):
            inner = torch.rand(2)
        rest = torch.rand(2)
    with keyed(1):
        assert torch.equal(torch.rand(4), torch.cat([first, rest]))
    with keyed(2):
        assert torch.equal(torch.rand(2), inner)


def _draw(numbers):
    with keyed(1):
        numbers.put(torch.rand(1).item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_another_thread_draws_may_draw_too():
    """A loader forks its workers while another training's network is initialised."""
    holding, context = threading.Event(), multiprocessing.get_context("fork")

    def hold():
        with keyed(2):
            holding.set()
            threading.Event().wait(0.3)

    thread, numbers = threading.Thread(target=hold), context.SimpleQueue()
    child = context.Process(target=_draw, args=(numbers,))
    thread.start()
    holding.wait()
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    thread.join()
    assert not alive
    with keyed(1):
        assert numbers.get() == torch.rand(1).item()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_decoding_leaves_the_default_generator(tmp_path, workers):
    draw_photos(tmp_path, [4, 4], split="train", side=20)
    files = load_files(f"list:{tmp_path / 'train.txt'},{tmp_path / 'train.txt'}").train
    before = torch.get_rng_state()
    transform = augmentations.training(("resized_crop(size=16)", "flip"))
    list(decode(files, transform, [[0, 1], [2]], workers=workers, seed_of=lambda *_: 5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{"mix": "mixup"}, {"sampler": "class_balanced"}, {"sampler": "square_root"}])
def test_what_is_drawn_does_not_depend_on_where_the_images_are(changes, monkeypatch):
    """PyTorch's `meta` device stands for a GPU: it has no generator and computes nothing."""
    drawn = []

    def recorded(name):
        real = getattr(torch, name)

        def draw(*args, **kwargs):
            drawn.append(real(*args, **kwargs))
            return drawn[-1]

        monkeypatch.setattr(torch, name, draw)

    for name in ("rand", "randint", "randperm", "multinomial"):
        recorded(name)
    images = digits()
    spec = stage1_spec(images, augment=("crop", "flip", "autoaugment"), **changes)
    found = []
    for device in ("cpu", "meta"):
        mixing = MIXINGS.make(spec.mix) if spec.mix else None
        drawing = _Batches(spec, images, mixing, 0, torch.device(device), Solo(), None)
        batches = [next(parts) for _, parts in drawing.epoch(0, 5, 0.0)]
        assert [len(b.images) for b in batches] == [64] * 4 + [44]
        assert {t.device.type for b in batches for t in (b.images, b.labels, *b.mix) if t is not None} == {device}
        found.append(list(drawn))
        drawn.clear()
    assert len(found[0]) > 3
    for on_cpu, on_meta in zip(*found, strict=True):
        assert torch.equal(on_cpu, on_meta)


def test_streams_differ_by_every_part_of_their_name():
    names = [(seed, *path) for seed in (0, 1, 2**63, 10**30) for path in [(), ("order",), ("order", 0), ("augment", 0)]]
    seeds = [derive(*name) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(3, generator=torch_stream(0, "a")), torch.rand(3, generator=torch_stream(0, "a")))
    assert (numpy_stream(0, "a").random(3) == numpy_stream(0, "a").random(3)).all()


def test_threads_and_progress_do_not_change_a_bit(tmp_path):
    images = digits()
    spec = stage1_spec(images, steps=6)
    first, _ = train_stage1(spec, images, tmp_path / "a")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again, meta = train_stage1(spec, images, tmp_path / "b", runtime=replace(CPU, progress=Quiet()))
        assert torch.get_num_threads() == 2  # given back
        assert meta["device"]["threads"] == 1  # those that trained
    finally:
        torch.set_num_threads(threads)
    assert_same_state(first, again)


def test_threads_are_given_back_after_a_failure():
    threads = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), CPU.threads_for(64 * 8 * 8):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads
    with CPU.threads_for(128 * 32 * 32):
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("device", ["tpu", "", "cuda9000", "CPU", "cpu:x", "cuda:-1", "cuda:x", "mps"])
def test_an_unknown_device_is_one_line(device):
    with pytest.raises(UserError, match="--device") as raised:
        Runtime.choose(device)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_one_line():
    with pytest.raises(UserError, match="take cpu"):
        Runtime.choose("cuda")
    assert Runtime.choose("auto").device == torch.device("cpu")


class FakeGpus:
    """Two CUDA devices, of which the second is the current one and the first is old."""

    def __init__(self, patch):
        self.current = 1
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "set_device", self.set_device)
        patch.setattr(torch.cuda, "get_device_capability", self.capability)

    def set_device(self, device):
        self.current = torch.cuda._utils._get_device_index(device)  # refuses a device without a number, as CUDA does

    def capability(self, device=None):
        return [(7, 5), (9, 0)][torch.cuda._utils._get_device_index(device, optional=True)]


TF32 = (torch.backends.cudnn, torch.backends.cuda.matmul)


@pytest.fixture
def gpus(monkeypatch):
    before = [flags.allow_tf32 for flags in TF32]
    for flags in TF32:
        flags.allow_tf32 = True
    yield FakeGpus(monkeypatch)
    for flags, value in zip(TF32, before, strict=True):
        flags.allow_tf32 = value


@pytest.mark.parametrize(
    ("asked", "number", "low"),
    [
        ("cuda", 1, torch.bfloat16),
        ("auto", 1, torch.bfloat16),
        ("cuda:1", 1, torch.bfloat16),
        ("cuda:0", 0, torch.float32),
    ],
)
def test_a_cuda_device_has_its_number_and_its_own_abilities(asked, number, low, gpus):
    runtime = Runtime.choose(asked, keep_memory=False)
    assert runtime.device == torch.device("cuda", number)
    assert runtime.low_precision == low
    assert gpus.current == number


def test_a_thread_takes_the_chosen_device(gpus, monkeypatch):
    """The current device is each thread's own; without a number `set_device` refuses."""
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    device = Runtime.choose("cuda", keep_memory=False).device
    gpus.current = 0
    threads = torch.get_num_threads()
    prepare_thread(device, threads)
    assert gpus.current == 1


def test_float32_has_all_its_digits_on_cuda_and_no_call_flips_that(gpus, monkeypatch, tmp_path):
    Runtime.choose("cpu", keep_memory=False)
    assert all(flags.allow_tf32 for flags in TF32)  # no business of ours
    Runtime.choose("cuda", keep_memory=False)
    assert not any(flags.allow_tf32 for flags in TF32)
    monkeypatch.setattr(torch.backends.cudnn, "flags", lambda *_, **__: pytest.fail("flags are all threads'"))
    images = digits(80)
    train_stage1(stage1_spec(images, steps=3), images, tmp_path, runtime=replace(CPU, low_precision=torch.bfloat16))
    model = new_model("resnet8", 1, 10, seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        extract(model, images.images, Normalizer.of(images.images), dtype, CPU, "features")
    assert not any(flags.allow_tf32 for flags in TF32)
