"""Extraction to a folder: the rows of one file, in parts, whoever writes them and is killed meanwhile."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tailscope.data.images import Images
from tailscope.data.sources import open_images
from tailscope.device import Runtime, Team
from tailscope.encoders import Encoder, Options, extract_to_file, load, parts
from tailscope.encoders.features import run_features
from tailscope.encoders.preprocessing import Preprocessing, Wishes
from tailscope.errors import UserError
from tailscope.tables.table import FeatureTable

CPU = Runtime(torch.device("cpu"), torch.bfloat16)
SMALL = Options(batch=16, shard=32)


@pytest.fixture(autouse=True)
def small_parts(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TAILSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parts, "PART_BYTES", 50 * 32 * 4)  # 48 images of 32 features


@pytest.fixture(scope="module")
def images() -> Images:
    """Return 250 of the digits."""
    return open_images("digits").splits["train"].take(np.arange(0, 1250, 5))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load("resnet8", channels=1, wishes=Wishes(normalize="0.3/0.4"))


@pytest.fixture
def whole(tmp_path: Path, encoder, images) -> FeatureTable:
    return extract_to_file(encoder, images, tmp_path / "whole.npz", CPU, SMALL).table


def write(encoder, images, folder: Path, team: Team | None = None, overwrite=False, **changes) -> parts.Written:
    return parts.extract_to_folder(
        encoder, images, folder, CPU, replace(SMALL, **changes), {"data": "digits"}, team=team or Team(),
        overwrite=overwrite,
    )  # fmt: skip


def rows_of(folder: Path) -> FeatureTable:
    """Read the files one after the other, as they lie there."""
    tables = [FeatureTable.load(file) for file in sorted(folder.glob("*.parquet"))]
    features = torch.cat([table.features for table in tables])
    labels, ids = (np.concatenate([getattr(table, name) for table in tables]) for name in ("labels", "ids"))
    return FeatureTable.from_arrays(features, labels, ids=ids)


def same(folder: Path, whole: FeatureTable) -> None:
    found = rows_of(folder)
    assert torch.equal(found.features, whole.features)
    assert torch.equal(found.labels, whole.labels)
    assert found.ids.tolist() == whole.ids.tolist()


class Of(Team):
    """One of two processes."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank


def test_the_files_hold_the_rows_of_one_file_bit_for_bit(tmp_path, encoder, images, whole):
    done = write(encoder, images, tmp_path / "f")
    assert done == parts.Written(250, 0)
    assert [path.name for path in sorted((tmp_path / "f").glob("*.parquet"))] == [
        f"{start:012d}.parquet" for start in range(0, 250, 48)
    ]
    same(tmp_path / "f", whole)
    order = np.argsort(whole.labels.numpy(), kind="stable")  # a folder is read as a table sorted by class
    assert torch.equal(FeatureTable.load(tmp_path / "f").features, whole.features[order])


def test_two_processes_write_what_one_writes(tmp_path, encoder, images, whole):
    write(encoder, images, tmp_path / "f", Of(0))
    assert len(list((tmp_path / "f").glob("*.parquet"))) == 3
    assert write(encoder, images, tmp_path / "f", Of(1)).rows == 250
    same(tmp_path / "f", whole)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("team", [Team(), Of(0)])
def test_a_killed_run_goes_on_with_any_number_of_processes(tmp_path, encoder, images, whole, team):
    seen = []

    def dying(model, x):
        if len(seen) == 6:  # the fourth part has one of its two shards
            raise Killed
        seen.append(len(x))
        return encoder.function(model, x)

    with pytest.raises(Killed):
        write(replace(encoder, function=dying), images, tmp_path / "f", team)
    with pytest.raises(
        UserError, match=r"f: (96|48) of 250 images are extracted; run the same `features` command again"
    ):
        FeatureTable.load(tmp_path / "f")
    done = write(encoder, images, tmp_path / "f")
    assert done.resumed == 96
    assert len(FeatureTable.load(tmp_path / "f")) == 250
    assert done.rows == 250
    same(tmp_path / "f", whole)
    assert not list((tmp_path / "f").glob("*.shards"))
    assert write(encoder, images, tmp_path / "f").resumed == 250


def test_a_damaged_file_is_written_again(tmp_path, encoder, images, whole):
    write(encoder, images, tmp_path / "f")
    file = tmp_path / "f" / f"{48:012d}.parquet"
    file.write_bytes(file.read_bytes()[:100])
    assert write(encoder, images, tmp_path / "f").resumed == 250 - 48
    same(tmp_path / "f", whole)


@pytest.mark.parametrize(("change", "says"), [({"stored": "float16"}, "stored"), ({"batch": 25}, "part")])
def test_features_of_another_extraction_are_never_mixed_in(tmp_path, encoder, images, change, says):
    write(encoder, images, tmp_path / "f")
    with pytest.raises(UserError, match=f"holds features of another extraction .*{says}"):
        write(encoder, images, tmp_path / "f", **change)
    before = (tmp_path / "f" / f"{0:012d}.parquet").read_bytes()
    write(encoder, images, tmp_path / "f", overwrite=True, stored="float16")
    assert (tmp_path / "f" / f"{0:012d}.parquet").read_bytes() != before
    assert rows_of(tmp_path / "f").features.dtype == torch.float16


def test_features_of_the_same_extraction_are_made_anew_where_that_is_asked_for(tmp_path, encoder, images, whole):
    write(encoder, images, tmp_path / "f")
    assert write(encoder, images, tmp_path / "f", overwrite=True) == parts.Written(250, 0)
    same(tmp_path / "f", whole)


def test_what_cannot_work_leaves_the_features_that_it_would_replace(tmp_path, encoder, images, whole):
    write(encoder, images, tmp_path / "f")

    def failing(image):
        raise ValueError("no")

    other = replace(encoder, preprocessing=Preprocessing(failing, owner="mine:net"))
    with pytest.raises(UserError, match="no"):
        write(other, images, tmp_path / "f", overwrite=True)
    same(tmp_path / "f", whole)


def test_a_folder_with_other_parquet_files_is_left_alone(tmp_path, encoder, images):
    other = tmp_path / "f" / "mine.parquet"
    other.parent.mkdir()
    other.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds mine\.parquet, which is none of its files"):
        write(encoder, images, tmp_path / "f")
    assert other.read_bytes() == b"precious"


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Sixty small photographs of two classes: a part of 48, and one of 12."""
    from PIL import Image

    for k in range(60):
        path = tmp_path / "photos" / f"class{k % 2}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 3 * k + 9, np.uint8)).save(path)
    return sorted((tmp_path / "photos").rglob("*.png"))


def of_photos(tmp_path):
    return run_features(
        "resnet8", f"folder:{tmp_path / 'photos'}", tmp_path / "f", image_size=8, normalize="none",
        options=replace(SMALL, skip_unreadable=True), runtime=CPU, folder=True,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [range(20, 21), range(20, 45), range(40, 60), range(59, 60)])
def test_images_that_cannot_be_read_are_named(tmp_path, photos, bad):
    """In one part or in both; all of one; by the run that finds them, and by the next, which finds all done."""
    for k in bad:
        photos[k].write_bytes(b"no image")
    for resumed in (0, 60 - len(bad)):
        found = of_photos(tmp_path)
        assert (found.rows, found.skipped, found.resumed) == (60 - len(bad), len(bad), resumed)
        (said,) = (line for line in found.warnings if "cannot be read" in line)
        assert f"{len(bad)} image{'s' * (len(bad) > 1)} cannot be read" in said
        assert all(str(photos[k].name) in said for k in [*bad][:10])
    assert len(FeatureTable.load(tmp_path / "f")) == found.rows


@pytest.mark.parametrize(("bad", "mended", "resumed"), [([20, 50], [20], 11), (range(48), [3, 4], 12)])
def test_a_later_run_takes_images_that_can_be_read_by_then(tmp_path, photos, bad, mended, resumed):
    before = {k: photos[k].read_bytes() for k in mended}
    for k in bad:
        photos[k].write_bytes(b"no image".ljust(len(before.get(k, b"")), b"."))  # of the size of the whole one
    of_photos(tmp_path)
    for k, whole in before.items():
        photos[k].write_bytes(whole)
    left = len(bad) - len(mended)
    found = of_photos(tmp_path)
    assert (found.rows, found.skipped, found.resumed) == (60 - left, left, resumed)
    assert len(FeatureTable.load(tmp_path / "f")) == 60 - left


def test_a_file_that_was_deleted_is_written_again_whatever_was_known_of_it(tmp_path, photos):
    whole = photos[20].read_bytes()
    photos[20].write_bytes(b"no image".ljust(len(whole), b"."))
    of_photos(tmp_path)
    (tmp_path / "f" / f"{0:012d}.parquet").unlink()
    photos[20].write_bytes(whole)
    assert [of_photos(tmp_path).resumed for _ in range(2)] == [12, 60]
    assert not list((tmp_path / "f").glob("*.unreadable.json"))


def test_where_no_image_can_be_read_nothing_is_written(tmp_path, photos):
    for path in photos:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"60 images cannot be read: .*00\.png"):
        of_photos(tmp_path)
    assert not list((tmp_path / "f").glob("*.parquet"))


def test_what_the_command_refuses(tailscope_, tmp_path):
    run = tailscope_("features", "--model", "resnet8", "--data", "digits", "--out", tmp_path / "f.npz", "--devices", 2)
    assert run.code == 2
    assert "several processes write a folder; give --out" in run.err


SCRIPT = """
import sys
from tailscope.cli import main
from tailscope.encoders import parts
parts.PART_BYTES = 300 * 32 * 4
sys.exit(main())
"""


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    (tmp_path / "small.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "small.py"), "features", "--model", "resnet8", "--data", "digits"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name, more in (("one", []), ("two", ["--devices", "2", "--device", "cpu"])):
        ended = subprocess.run(
            [*command, "--split", "train", "--out", f"{tmp_path / name}/", *more],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    names = [path.name for path in sorted((tmp_path / "one").glob("*.parquet"))]
    assert len(names) == 6
    assert names == [path.name for path in sorted((tmp_path / "two").glob("*.parquet"))]
    for name in names:
        assert pq.read_table(tmp_path / "one" / name).equals(pq.read_table(tmp_path / "two" / name))
