"""Extraction to files: the features of a plain forward pass, whatever is killed, skipped or sharded."""

import errno
import json
import multiprocessing
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, SoftFileLock, Timeout
from PIL import Image
from torch import Tensor, nn

from tailscope.data.images import ImageError, Images
from tailscope.data.sources import open_images
from tailscope.device import Runtime
from tailscope.encoders import Encoder, Options, extract, extract_to_file, load
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError
from tailscope.progress import Quiet
from tailscope.tables.table import FeatureTable

CPU = Runtime(torch.device("cpu"), torch.bfloat16)
SMALL = Options(batch=16, shard=100)


@pytest.fixture(scope="module")
def images() -> Images:
    """Return 250 of the digits."""
    return open_images("digits").splits["train"].take(np.arange(0, 1250, 5))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load("resnet8", channels=1, wishes=Wishes(normalize="0.3/0.4"))


@pytest.fixture(scope="module")
def expected(encoder: Encoder, images: Images) -> Tensor:
    """The features without any of our machinery."""
    pixels = torch.from_numpy(np.stack([np.asarray(images.image(i)) for i in range(250)])).float()[:, None] / 255
    with torch.no_grad():
        return encoder.model.features((pixels - 0.3) / 0.4)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_features_labels_and_ids(tmp_path: Path, encoder, images, expected, suffix: str) -> None:
    out = tmp_path / f"f{suffix}"
    done = extract_to_file(encoder, images, out, CPU, SMALL, {"data": "digits"})
    table = FeatureTable.load(out)
    torch.testing.assert_close(table.features, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(table.features, done.table.features)
    assert table.labels.tolist() == images.labels.tolist()
    assert table.ids.tolist() == [f"train:{row}" for row in range(0, 1250, 5)]
    assert table.class_names is None
    assert table.provenance["data"] == "digits"
    assert table.provenance["weights_sha256"] == encoder.weights_sha256()
    assert leftovers(tmp_path) == [out.name]


def test_float16_is_rounding(tmp_path: Path, encoder, images, expected) -> None:
    done = extract_to_file(encoder, images, tmp_path / "f.npz", CPU, replace(SMALL, stored="float16"))
    assert done.table.features.dtype == torch.float16
    torch.testing.assert_close(done.table.features.float(), expected, rtol=1e-3, atol=1e-4)


def test_mixed_precision_is_close_and_off_by_default(tmp_path: Path, encoder, images, expected) -> None:
    auto = extract_to_file(encoder, images, tmp_path / "f.npz", CPU, replace(SMALL, precision="auto")).table
    assert auto.provenance["precision"] == "bfloat16"
    difference = (auto.features - expected).abs()
    assert 1e-4 < difference.max() < 0.1 * expected.abs().max()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def dying_after(encoder: Encoder, batches: int) -> tuple[Encoder, list[int]]:
    """Return an encoder that counts the images it sees, and dies after some batches."""
    seen: list[int] = []

    def function(model: nn.Module, x: Tensor) -> Tensor:
        if len(seen) == batches:
            raise Killed
        seen.append(len(x))
        return encoder.function(model, x)

    return replace(encoder, function=function), seen


def test_a_killed_extraction_continues(tmp_path: Path, encoder, images, expected) -> None:
    out = tmp_path / "f.npz"
    dying, _ = dying_after(encoder, 11)  # a shard is 7 batches: dies in the second
    with pytest.raises(Killed):
        extract_to_file(dying, images, out, CPU, SMALL)
    assert not out.exists()
    (tmp_path / "f.npz.shards" / "000000112.safetensors.1.partial").write_bytes(b"half a shard")
    counting, seen = dying_after(encoder, 1000)
    done = extract_to_file(counting, images, out, CPU, replace(SMALL, batch=50))
    assert (done.resumed, sum(seen)) == (112, 138)
    torch.testing.assert_close(FeatureTable.load(out).features, expected, rtol=1e-5, atol=1e-6)
    assert leftovers(tmp_path) == ["f.npz"]


def test_a_damaged_shard_is_named_and_its_images_are_extracted_again(
    tmp_path: Path, encoder, images, expected, caplog
) -> None:
    out = tmp_path / "f.npz"
    with pytest.raises(Killed):
        extract_to_file(dying_after(encoder, 15)[0], images, out, CPU, SMALL)
    shard = tmp_path / "f.npz.shards" / "000000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    counting, seen = dying_after(encoder, 1000)
    done = extract_to_file(counting, images, out, CPU, SMALL)
    assert (done.resumed, sum(seen)) == (112, 138)
    assert f"{shard}: damaged" in caplog.text
    torch.testing.assert_close(done.table.features, expected, rtol=1e-5, atol=1e-6)


def test_an_image_that_was_mended_while_a_run_was_down_is_extracted(tmp_path: Path, encoder, images) -> None:
    class Damaged(type(images)):
        def image(self, row: int) -> Image.Image:
            if self.ids[row] == images.ids[3]:
                raise ImageError("damaged")
            return super().image(row)

    skipping, out = replace(SMALL, skip_unreadable=True), tmp_path / "f.npz"
    damaged = Damaged(**{field.name: getattr(images, field.name) for field in fields(images)})
    with pytest.raises(Killed):
        extract_to_file(dying_after(encoder, 15)[0], damaged, out, CPU, skipping)
    done = extract_to_file(encoder, images, out, CPU, skipping)
    assert (done.resumed, done.skipped, len(done.table)) == (112, [], 250)


@pytest.mark.parametrize("change", ["weights", "preprocessing", "images", "stored", "precision"])
def test_shards_of_another_extraction_are_never_mixed_in(tmp_path: Path, encoder, images, change: str) -> None:
    out = tmp_path / "f.npz"
    with pytest.raises(Killed):
        extract_to_file(dying_after(encoder, 8)[0], images, out, CPU, SMALL)
    options, other, stream = SMALL, encoder, images
    if change == "weights":
        other = load("resnet8(width=16)", channels=1, wishes=Wishes(normalize="0.3/0.4"))
    if change == "preprocessing":
        other = load("resnet8", channels=1, wishes=Wishes(normalize="0.3/0.41"))
    if change == "images":
        stream = images.take(np.arange(249, -1, -1))
    if change == "stored":
        options = replace(SMALL, stored="float16")
    if change == "precision":
        options = replace(SMALL, precision="auto")
    field = {"weights": "model"}.get(change, change)
    with pytest.raises(UserError, match=rf"f.npz.shards: its shards are of another extraction \({field} was .*delete"):
        extract_to_file(other, stream, out, CPU, options)


def test_a_folder_without_shards_is_no_obstacle(tmp_path: Path, encoder, images, expected) -> None:
    with pytest.raises(Killed):
        extract_to_file(dying_after(encoder, 1)[0], images, tmp_path / "f.npz", CPU, replace(SMALL, stored="float16"))
    table = extract_to_file(encoder, images, tmp_path / "f.npz", CPU, SMALL).table
    torch.testing.assert_close(table.features, expected, rtol=1e-5, atol=1e-6)


def test_shards_are_removed_before_another_process_gets_the_lock(tmp_path: Path, encoder, images, monkeypatch) -> None:
    seen = []

    def locked(folder, **_):
        with pytest.raises(Timeout):
            FileLock(folder / ".lock", timeout=0).acquire()
        seen.append(folder)

    monkeypatch.setattr(extract.shutil, "rmtree", locked)
    extract_to_file(encoder, images, tmp_path / "f.npz", CPU, SMALL)
    assert seen == [tmp_path / "f.npz.shards"]


def test_two_processes_do_not_write_the_same_shards(tmp_path: Path, encoder, images) -> None:
    folder = tmp_path / "f.npz.shards"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="another process is extracting"):
        extract_to_file(encoder, images, tmp_path / "f.npz", CPU, SMALL)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_disk_without_locks(tmp_path: Path, encoder, images, expected, monkeypatch, code: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refused)
    out = tmp_path / "f.npz"
    if code == errno.EIO:
        with pytest.raises(UserError, match=r"f.npz.shards: cannot be written \(.*\)"):
            extract_to_file(encoder, images, out, CPU, SMALL)
        return
    folder = tmp_path / "f.npz.shards"
    folder.mkdir()
    with SoftFileLock(folder / ".lock.softlock"), pytest.raises(UserError, match="another process is extracting"):
        extract_to_file(encoder, images, out, CPU, SMALL)
    table = extract_to_file(encoder, images, out, CPU, SMALL).table
    torch.testing.assert_close(table.features, expected, rtol=1e-4, atol=1e-4)
    assert leftovers(tmp_path) == ["f.npz"]


def test_features_whose_width_changes_are_refused(tmp_path: Path, encoder, images) -> None:
    one_less = replace(encoder, function=lambda m, x: encoder.function(m, x)[:, : -1 if len(x) == 10 else None])
    with pytest.raises(UserError, match=r"resnet8: its features of .* 7 more, an .* are \[10, 31\], not \[10, 32\]"):
        extract_to_file(one_less, images, tmp_path / "f.npz", CPU, SMALL)
    squeezed = replace(encoder, function=lambda m, x: encoder.function(m, x).squeeze())
    with pytest.raises(UserError, match=r"\[1, 1, 8, 8\], are \[32\], not \[1, 32\]; let the model pool") as caught:
        extract_to_file(squeezed, images.take(np.arange(17)), tmp_path / "g.npz", CPU, SMALL)
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_refused(tmp_path: Path, encoder, images) -> None:
    nan = replace(
        encoder, function=lambda m, x: encoder.function(m, x).masked_fill(x.mean((1, 2, 3))[:, None] > 0, torch.nan)
    )
    with pytest.raises(UserError, match=r"digits: float32 features of images 0 to 111: \d+ of 112 rows hold NaN"):
        extract_to_file(nan, images, tmp_path / "f.npz", CPU, SMALL)
    huge = replace(encoder, function=lambda m, x: encoder.function(m, x) + 1e5)
    with pytest.raises(UserError, match=r"float16 features of images 0 to 111: 112 of 112 rows"):
        extract_to_file(huge, images, tmp_path / "g.npz", CPU, replace(SMALL, stored="float16"))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, encoder, images) -> None:
    dying, _ = dying_after(encoder, 0)
    for out, says in [(tmp_path / "f.csv", "unknown format"), (tmp_path / "absent" / "f.npz", "cannot be written")]:
        with pytest.raises(UserError, match=says):
            extract_to_file(dying, images, out, CPU, SMALL)


def test_progress_counts_what_was_there(tmp_path: Path, encoder, images) -> None:
    with pytest.raises(Killed):
        extract_to_file(dying_after(encoder, 8)[0], images, tmp_path / "f.npz", CPU, SMALL)
    told: list[int] = []

    class Recorder(Quiet):
        def task(self, description: str, total: int, done: int = 0):
            assert (description, total, done) == ("features of digits", 250, 112)
            return super().task(description, total, done)

        def note(self, text: str) -> None:
            told.append(text)

    extract_to_file(encoder, images, tmp_path / "f.npz", replace(CPU, progress=Recorder()), SMALL)
    assert told == [f"writing {tmp_path / 'f.npz'}: 250 rows, d = 32"]


def test_time_decides_what_is_saved(tmp_path: Path, encoder, images, monkeypatch) -> None:
    assert Options().save_every == 30
    now = iter(range(0, 10**6, 11))
    monkeypatch.setattr(extract.time, "monotonic", lambda: next(now))
    saved: list[int] = []
    write = extract.Shards.write

    def recorded(self, start: int, features: Tensor, *rest: object) -> None:
        saved.append(len(features))
        write(self, start, features, *rest)

    monkeypatch.setattr(extract.Shards, "write", recorded)
    done = extract_to_file(encoder, images, tmp_path / "f.npz", CPU, Options(batch=16))
    # Eleven seconds pass between two looks at the clock: three batches, then 33 seconds are over.
    assert saved == [48] * 5 + [10]
    assert len(done.table) == 250


def test_shards_of_before_are_of_any_length(tmp_path: Path, encoder, images, expected) -> None:
    """A folder that the version with a fixed number of images left is gone on with; a gap in the middle is filled."""
    out = tmp_path / "f.npz"
    with pytest.raises(Killed):
        extract_to_file(dying_after(encoder, 12)[0], images, out, CPU, replace(SMALL, save_every=0.0))
    folder = tmp_path / "f.npz.shards"
    assert len(list(folder.glob("*.safetensors"))) == 12
    for start in (32, 48, 112):
        (folder / f"{start:09d}.safetensors").unlink()
    spec = folder / "spec.json"
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "shard": 10_000}))
    counting, seen = dying_after(encoder, 1000)
    done = extract_to_file(counting, images, out, CPU, SMALL)
    assert (done.resumed, sum(seen), len(seen)) == (9 * 16, 250 - 9 * 16, 3 + 4)
    torch.testing.assert_close(FeatureTable.load(out).features, expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "whole").mkdir()
    extract_to_file(encoder, images, tmp_path / "whole" / "f.npz", CPU, SMALL)
    assert (tmp_path / "whole" / "f.npz").read_bytes() == out.read_bytes()


def test_batches_lie_on_one_grid() -> None:
    for start in range(7):
        batches = extract._on_grid(range(start, 20), 6)
        assert [row for batch in batches for row in batch] == list(range(start, 20))
        assert all(batch.start % 6 == 0 for batch in batches[1:])


def extract_until_killed(out: Path, ready) -> None:
    """Run in a process of its own, which is killed at some moment or ends."""
    torch.set_num_threads(1)
    data = open_images("digits").splits["train"]
    network = load("resnet8", channels=1, wishes=Wishes(normalize="0.3/0.4"))
    ready.set()
    extract_to_file(network, data, out, CPU, Options(batch=8, save_every=0.005))


def test_kills_at_random_moments_cost_no_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tailscope.encoders"])
    random, resumed, kills = np.random.default_rng(), [], 0
    out = tmp_path / "f.npz"
    while not out.exists():
        ready = context.Event()
        process = context.Process(target=extract_until_killed, args=(out, ready))
        process.start()
        assert ready.wait(60)
        process.join(random.uniform(0.01, 0.4) if kills < 4 else 60)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
        resumed.append(len(list((tmp_path / "f.npz.shards").glob("*.safetensors"))))
    assert kills > 0
    assert max(resumed) > 0
    (tmp_path / "whole").mkdir()
    torch.set_num_threads(1)
    data = open_images("digits").splits["train"]
    network = load("resnet8", channels=1, wishes=Wishes(normalize="0.3/0.4"))
    extract_to_file(network, data, tmp_path / "whole" / "f.npz", CPU, Options(batch=8))
    assert out.read_bytes() == (tmp_path / "whole" / "f.npz").read_bytes()
