"""Thumbnails of samples: they are the images, few enough, of bytes that are ours, and a browser shows them."""

import base64
import io
import re
import shutil
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tailscope
from diagnosis_cases import table
from image_trees import photos
from tailscope import report
from tailscope.data.folders import load_folder
from tailscope.data.images import ImageSet
from tailscope.data.sources import open_images
from tailscope.encoders.extract import Batches
from tailscope.encoders.features import of_images
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.progress import Quiet
from tailscope.report import drilldown, thumbnails
from tailscope.report.objects import Diagnosis
from tailscope.report.thumbnails import Thumbnails, of_inputs

KINDS = ("nearest_misses", "farthest_out", "likely_mislabelled")
HOSTILE = ['"><script>alert(1)</script>', "<img src=x onerror=alert(2)>", "../../secret.png", "a 'b' & \"c\""]


def sample(row, name):
    nothing = {"angle_deg": 9.0, "suspected": None, "suspected_probability": None}
    return {"row": row, "id": name, "predicted": "class 1", "confidence": 0.9, "true_probability": 0.1, **nothing}


def found(classes, each=5, names=None, kinds=KINDS):
    """A diagnosis whose drill-down lists `each` samples of every kind and class, all of them different."""
    number, rows = max(2, classes), count()
    rng, labels = np.random.default_rng(0), np.arange(4 * number) % number
    class_names = [f"class {k}" for k in range(number)]
    sides = [table(rng.normal(size=(len(labels), 3)), labels, class_names=class_names) for _ in range(2)]
    result = tailscope.diagnose(*sides, verdict=False, permutations=0)

    def listed(kind, k):
        some = list(islice(rows, each)) if kind in kinds and k < classes else []
        return {"count": len(some), "first": [sample(row, names[row] if names else f"train:{row}") for row in some]}

    entry = {"scored": 20, "predicted": 20, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    result["drilldown"] = {
        "file": "unseen",
        "scored": 20 * classes,
        "listed": each,
        "confusions": {"matrix": None, "pairs": 0, "top": []},
        "classes": [{**entry, "samples": {kind: listed(kind, k) for kind in KINDS}} for k in range(number)],
        "map": {"method": "PCA", "explained": [0.5, 0.2], "x": [0.1], "y": [0.2], "label": [0], "predicted": [0]}
        | {"sample": ["train:0"]},
    }
    return result


def images_of(pixels):
    pixels = torch.from_numpy(pixels)
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    return ImageSet(pixels, labels, ("a",)).of_split("here", "train")


def made(result, pictures):
    return Thumbnails.of(result, {"unseen": pictures}, Quiet())


def opened(picture):
    kind, _, text = picture.uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def smooth(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# ---- a thumbnail is the image


def test_a_thumbnail_is_the_image_made_small(tmp_path):
    sizes = {"ant/wide.png": (100, 300), "ant/high.jpg": (400, 90), "bee/thin.png": (3, 600)}
    for seed, (name, size) in enumerate(sizes.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(smooth(*size, seed)).save(tmp_path / name, quality=95)
    images = load_folder(tmp_path)["all"]
    names = [*sizes, "ant/none.png"]
    result = found(1, each=4, names=names * 3, kinds=KINDS[:1])
    shown = made(result, of_images(images)).shown(result)
    assert (sorted(shown.pictures), shown.samples, shown.unreadable) == ([0, 1, 2], 4, 1)
    for row, (name, (height, width)) in enumerate(sizes.items()):
        scale = 48 / max(height, width)
        size = (max(1, round(scale * width)), max(1, round(scale * height)))
        picture, image = shown.pictures[row], opened(shown.pictures[row])
        assert image.size == size == (picture.width, picture.height)
        assert not picture.enlarged
        expected = np.asarray(Image.open(tmp_path / name).resize(size, Image.Resampling.BOX), dtype=float)
        if min(size) > 1:
            assert (
                np.abs(np.asarray(image.convert("RGB"), dtype=float) - expected).mean() < 12
            )  # other images differ by 70


def test_digits_are_shown_pixel_by_pixel():
    images = open_images("digits").splits["train"]
    result = found(2)
    shown = made(result, of_images(images)).shown(result)
    assert len(shown.pictures) == shown.samples == 30
    for row, picture in shown.pictures.items():
        image = opened(picture)
        assert (image.format, image.size, picture.width, picture.enlarged) == ("PNG", (8, 8), 64, True)
        assert np.array_equal(np.asarray(image.convert("L")), images.images[row, ..., 0].numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_network_is_given_is_shown_as_it_was_before_it_was_normalised(channels):
    pixels = np.stack([smooth(60, 80, seed)[..., :channels] for seed in range(15)])
    pixels[0, :6, :6], pixels[1, :6, :6] = 0, 255  # somewhere the brightest and the darkest
    given = torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)
    mean, deviation = (torch.linspace(low, low + 0.2, channels)[:, None, None] for low in (0.3, 0.2))
    result = found(1)
    for inputs in ((given - mean) / deviation, given):
        shown = made(result, of_inputs(lambda row, inputs=inputs: inputs[row])).shown(result)
        for row in range(15):
            expected = Image.fromarray(pixels[row].squeeze()).resize((48, 36), Image.Resampling.BOX).convert("RGB")
            got = np.asarray(opened(shown.pictures[row]).convert("RGB"), dtype=float)
            assert np.abs(got - np.asarray(expected)).mean() < 8


def test_inputs_without_range_or_numbers_are_shown():
    inputs = torch.full((15, 4, 9, 7), 3.0)
    inputs[0, 0, 0, 0], inputs[1, 1, 0, 0] = float("nan"), float("inf")
    result = found(1)
    assert len(made(result, of_inputs(lambda row: inputs[row])).shown(result).pictures) == 15
    nothing = made(result, of_inputs(lambda row: None)).shown(result)
    assert (nothing.pictures, nothing.unreadable) == ({}, 15)


class Fragile(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        if row == 2:
            raise RuntimeError("not here")
        return self.images[row], 0


def test_a_loader_gives_the_images_again_if_it_goes_in_order():
    images = torch.rand(9, 3, 5, 5)
    plain = TensorDataset(images, torch.zeros(9))
    assert torch.equal(Batches.of("unseen", (images, [0] * 9), 4).input_of(7), images[7])
    assert torch.equal(Batches.of("unseen", DataLoader(plain, batch_size=4), 4).input_of(7), images[7])
    fragile = Batches.of("unseen", DataLoader(Fragile(images), batch_size=4), 4).input_of
    assert (fragile(2), fragile(99)) == (None, None)
    assert torch.equal(fragile(1), images[1])
    for loader in (DataLoader(plain, shuffle=True), DataLoader(plain, batch_sampler=[[3, 1], [0]])):
        assert Batches.of("unseen", loader, 4).input_of is None


# ---- few enough


def test_a_cap_takes_the_first_of_every_list_and_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(thumbnails, "MOST", 8)
    result = found(2)
    every = made(result, of_images(images_of(np.zeros((30, 6, 6, 3), np.uint8))))
    assert every.rows.tolist() == [0, 5, 10, 15, 20, 25, 1, 6]
    note = drilldown.note(result, every.shown(result))
    assert note.endswith(" Thumbnails of 8 of 30 samples; the page has no room for more.")
    each = len(every.shown(result).pictures[0].uri)
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 3 * each)
    assert list(every.shown(result).pictures) == [0, 5, 10]


def test_what_is_said_of_thumbnails(tmp_path):
    draws = {f"ant/{k}.png": k for k in range(3)}
    (tmp_path / "ant").mkdir()
    for name, seed in draws.items():
        Image.fromarray(smooth(20, 20, seed)).save(tmp_path / name)
    (tmp_path / "ant" / "1.png").write_bytes(b"no image")
    result = found(1, each=3, names=[*draws] * 3, kinds=KINDS[:1])
    shown = made(result, of_images(load_folder(tmp_path)["all"])).shown(result)
    assert drilldown.note(result, shown).endswith(" Thumbnails of 2 of 3 samples; 1 image cannot be read.")
    assert "humbnail" not in drilldown.note(result)
    assert Thumbnails.of(result, {}, Quiet()) is None
    assert Thumbnails.of(result | {"drilldown": None}, {"unseen": of_images([])}, Quiet()) is None


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """The page of 100 classes whose images are the worst for any compression, and its result."""
    result = found(100)
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 48, 48, 3), dtype=np.uint8)
    held = Diagnosis(result, thumbnails=made(result, of_images(images_of(pixels))))
    return held.report(tmp_path_factory.mktemp("hundred") / "page.html"), held


def test_a_page_of_100_classes_is_below_5_mb(hundred):
    path, result = hundred
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 5_000_000
    number = len(re.findall(r'<img class="thumbnail"', text))
    assert 100 < number < 1500
    assert f"Thumbnails of {number:,} of 1,500 samples; the page has no room for more." in text
    assert len(result.thumbnails.shown(result).pictures) == number


# ---- kept beside the result


def test_they_are_kept_for_pages_that_are_renewed(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (15, 12, 10, 3), dtype=np.uint8)
    result = found(1)
    held = Diagnosis(result, thumbnails=made(result, of_images(images_of(pixels))))
    first = held.report(tmp_path).read_text(encoding="utf-8")
    assert first.count('class="thumbnail enlarged"') == 15
    assert "pixels" not in (tmp_path / "diagnosis.json").read_text()
    assert report.build(tmp_path, figures=False).read_text(encoding="utf-8").count('class="thumbnail enlarged"') == 15
    other = result | {"spec": {**result["spec"], "encoders": {"a": {"unseen": {"source": "b", "sha256": "c" * 64}}}}}
    assert Thumbnails.load(tmp_path, other) is None  # of other features, whose rows may be anything
    assert Thumbnails.load(tmp_path, result | {"drilldown": None}) is None
    assert Thumbnails.load(tmp_path / "elsewhere", result) is None


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": np.zeros((15, 12, 10, 3), np.float32)},
        {"pixels": np.zeros((15, 12, 10), np.uint8)},
        {"pixels": np.zeros((15, 500, 10, 3), np.uint8)},
        {"pixels": np.zeros((14, 12, 10, 3), np.uint8)},
        {"sizes": np.full((15, 2), -1)},
        {"sizes": np.full((15, 2), 99)},
        {"sizes": np.full((15, 2), 2.0)},
        {"rows": np.array([{"not": "run"}] * 15, dtype=object)},
        {"rows": None},
    ],
)
def test_a_file_that_holds_something_else_is_one_line(tmp_path, change):
    result = found(1)
    made(result, of_images(images_of(np.zeros((15, 12, 10, 3), np.uint8)))).save(tmp_path)
    with np.load(tmp_path / thumbnails.FILE) as file:
        arrays = dict(file) | change
    np.savez(tmp_path / thumbnails.FILE, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=r"thumbnails\.npz"):
        Thumbnails.load(tmp_path, result)


# ---- nothing of anybody's gets into the page


def test_names_are_text_and_bytes_are_ours(tmp_path):
    secret, root = tmp_path / "secret.png", tmp_path / "photos" / "deep"
    Image.fromarray(smooth(20, 20)).save(secret)
    (root / "ant").mkdir(parents=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "<script>alert(3)</script>")
    Image.fromarray(smooth(20, 20)).save(root / "ant" / "a.png", pnginfo=info)
    with (root / "ant" / "a.png").open("ab") as file:
        file.write(b"<script>alert(4)</script>")
    result = found(1, each=5, names=[*HOSTILE, "ant/a.png"] * 3, kinds=KINDS[:1])
    held = Diagnosis(result, thumbnails=made(result, of_images(load_folder(root)["all"])))
    shown = held.thumbnails.shown(result)
    assert list(shown.pictures) == [4]  # an id is looked up among the images, and never a path
    assert b"script" not in base64.b64decode(shown.pictures[4].uri.partition(",")[2])
    text = held.report(tmp_path / "page.html").read_text(encoding="utf-8")
    body = text.split("<script", 1)[0]
    assert len(re.findall(r"<img ", body)) == 1
    assert 'alt="ant/a.png, class 0"' in body


# ---- the whole way


def network():
    torch.manual_seed(0)
    return MODELS.make("resnet10(width=8)", 3, 3)


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """A folder that was diagnosed in one step."""
    root = tmp_path_factory.mktemp("whole")
    for seed, split in enumerate(("train", "val")):
        photos(root / "photos", (12, 8, 6), split=split, seed=seed, side=60)
    torch.save(network().state_dict(), root / "a.pth")
    given = {"checkpoint": root / "a.pth", "image_size": 24, "permutations": 0}
    result = tailscope.diagnose(model="resnet10(width=8)", data=f"folder:{root / 'photos'}", out=root / "out", **given)
    return root, result


def test_one_step_shows_the_images_and_a_renewed_page_too(diagnosed):
    root, result = diagnosed
    listed = {one["row"]: one["id"] for one in drilldown.shown_samples(result["drilldown"])}
    for path in (root / "out" / "report.html", report.build(root / "out", figures=False)):
        text = path.read_text(encoding="utf-8")
        assert f"Thumbnails of all {len(listed)} samples." in text
        assert set(re.findall(r'<img class="thumbnail"[^>]* alt="(val/n0\d/\d+\.jpg), n0\d">', text)) == {
            *listed.values()
        }
    pixels = {}
    for name in listed.values():
        with Image.open(root / "photos" / name) as image:
            pixels[name] = np.asarray(image.resize((48, 48), Image.Resampling.BOX), dtype=float)
    for row, picture in result.thumbnails.shown(result).pictures.items():
        got = np.asarray(opened(picture).convert("RGB").resize((48, 48)), dtype=float)
        assert min(pixels, key=lambda name, got=got: np.abs(pixels[name] - got).mean()) == listed[row]  # noise differs


def test_features_alone_have_no_thumbnails_and_nothing_is_said(diagnosed, tmp_path):
    root, _ = diagnosed
    parts = [root / "out" / "features" / f"{part}.npz" for part in ("train", "unseen")]
    tailscope.diagnose(*parts, out=tmp_path, permutations=0)
    assert not (tmp_path / thumbnails.FILE).exists()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in text.split("<script")[0]
    assert "Thumbnails" not in text.split("<script")[0]


def test_loaders_and_pairs_are_shown(diagnosed):
    images = torch.rand(26, 3, 24, 24) * 3 - 1
    labels = torch.tensor([0] * 12 + [1] * 8 + [2] * 6)
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    result = tailscope.diagnose((images, labels), loader, model=network(), permutations=0)
    shown = result.thumbnails.shown(result)
    assert len(shown.pictures) == shown.samples > 0
    shuffled = DataLoader(TensorDataset(images, labels), batch_size=5, shuffle=True)
    assert tailscope.diagnose((images, labels), shuffled, model=network(), permutations=0).thumbnails is None


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package chromium")
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 390])
def test_a_browser_shows_every_thumbnail(hundred, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    address, said = Path(hundred[0]).as_uri(), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: said.append(request.url) if "data:" not in request.url[:5] else None)
        view.goto(address)
        view.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        view.evaluate("document.querySelectorAll('.fold').forEach(fold => fold.open = true)")
        found = view.eval_on_selector_all(
            "img", "all => Promise.all(all.map(i => i.decode().then(() => [i.naturalWidth, i.width, i.alt])))"
        )
        wide = view.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert said == [address]
    assert len(found) > 100
    assert {(natural, shown) for natural, shown, _ in found} == {(48, 48)}
    assert all(re.fullmatch(r"train:\d+, class \d+", alt) for *_, alt in found)
    assert wide <= width
