"""The one decoding of image files: pixel types, orientation, what is no image, and damaged bytes."""

import io
import os
import socket
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tailscope.data.images import FORMATS, ImageError, ImageFiles, read_image
from tailscope.errors import unreadable

FUZZ = int(os.environ.get("TAILSCOPE_FUZZ", "50"))
RAMP = np.add.outer(np.linspace(0, 1, 24), np.linspace(0, 1, 32)) / 2
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
ARROW = np.zeros((6, 10, 3), np.uint8)
ARROW[0, :3] = 255  # a mark in the upper left corner: every turn and flip moves it elsewhere


def read(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def tiff(
    values: np.ndarray, path: Path, *, bits: int, sample_format: int, photometric: int = 1, order: str = "<"
) -> None:
    """Write one grey strip by hand, so that the reader is not tested with its own writer."""
    height, width = values.shape
    strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(strip)), (339, sample_format)]
    kind = {256: 4, 257: 4, 273: 4, 278: 4, 279: 4}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(strip))
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1, value)
        if kind.get(tag)
        else struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        for tag, value in tags
    )
    path.write_bytes(head + strip + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


def written_ramps(folder: Path) -> dict[str, Path]:
    """The same ramp in every pixel type of one channel that people have."""
    found = {name: folder / name for name in ("l8.png", "i16.png", "i16.pgm", "pfm.pfm", "p.gif", "p.png")}
    Image.fromarray((RAMP * 255).round().astype(np.uint8)).save(found["l8.png"])
    Image.fromarray((RAMP * 65535).round().astype(np.uint16)).save(found["i16.png"])
    header = b"P5 32 24 65535\n"
    found["i16.pgm"].write_bytes(header + (RAMP * 65535).round().astype(">u2").tobytes())
    found["pfm.pfm"].write_bytes(b"Pf\n32 24\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes())
    for name in ("p.gif", "p.png"):
        Image.fromarray((RAMP * 255).round().astype(np.uint8)).convert("P").save(found[name])
    for name, dtype, top, bits, sample_format in [
        ("u16", "u2", 2**16 - 1, 16, 1), ("s16", "i2", 2**15 - 1, 16, 2), ("u32", "u4", 2**32 - 1, 32, 1),
        ("s32", "i4", 2**31 - 1, 32, 2), ("f32", "f4", 1, 32, 3),
    ]:  # fmt: skip
        values = (RAMP * top).astype("f4") if dtype == "f4" else (RAMP * top).round().astype(dtype)
        for order in "<>":
            if (dtype, order) == ("u4", ">"):
                continue  # Pillow has no reader for it
            path = found[f"{name}{order}"] = folder / f"{name}-{'le' if order == '<' else 'be'}.tif"
            tiff(values, path, bits=bits, sample_format=sample_format, order=order)
    white_is_zero = found["white-is-zero"] = folder / "white-is-zero.tif"
    tiff((65535 - RAMP * 65535).round().astype("u2"), white_is_zero, bits=16, sample_format=1, photometric=0)
    return found


def test_every_pixel_type_of_one_ramp_gives_the_same_pixels(tmp_path: Path) -> None:
    expected = np.repeat((RAMP * 255)[..., None], 3, axis=2)
    for name, path in written_ramps(tmp_path).items():
        assert np.abs(read(path) - expected).max() <= 1, name


def test_twelve_bits_in_sixteen_are_scaled_by_what_the_file_says() -> None:
    twelve = (RAMP * 4095).round().astype(int)
    packed = bytearray()
    for a, b in twelve.reshape(-1, 2).tolist():
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    height, width = RAMP.shape
    tags = [
        (256, width),
        (257, height),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(packed)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    raw = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    got = np.asarray(read_image(bytes(raw)))[..., 0].astype(int)
    assert np.abs(got - RAMP * 255).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "PA", "YCbCr"])
def test_other_modes_become_what_pillow_makes_of_them_without_transparency(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PIXELS).convert("L" if mode in ("1", "LA", "PA") else "RGB").convert(mode)
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    if mode == "PA":
        image, suffix = image.convert("RGBA"), "webp"
    image.save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(tmp_path / f"x.{suffix}") as oracle:
        expected = np.asarray(oracle.convert("RGB")).astype(int)
    assert (read(tmp_path / f"x.{suffix}") == expected).all()


def test_transparency_is_dropped_unless_the_picture_is_in_it_alone(tmp_path: Path) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (12, 16, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == PIXELS).all()
    for name, colour in [("rgba.png", np.zeros((12, 16, 3), np.uint8)), ("la.png", np.zeros((12, 16, 1), np.uint8))]:
        Image.fromarray(np.concatenate([colour, alpha], axis=2)).save(tmp_path / name)
        with pytest.raises(ImageError, match="in its transparency alone"):
            read_image(tmp_path / name)
    palette = Image.fromarray((alpha[..., 0] > 99).astype(np.uint8), mode="P")
    palette.putpalette([7, 7, 7] * 2)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    with pytest.raises(ImageError, match="in its transparency alone"):
        read_image(tmp_path / "p.png")
    Image.fromarray(np.full((12, 16, 4), 200, np.uint8)).save(tmp_path / "plain.png")
    assert (read(tmp_path / "plain.png") == 200).all()  # one colour, evenly transparent


# Where the mark of ARROW comes from: EXIF's table of what stands in the first row and column as stored.
STORED = {
    1: ARROW, 2: ARROW[:, ::-1], 3: ARROW[::-1, ::-1], 4: ARROW[::-1], 5: ARROW.transpose(1, 0, 2),
    6: np.rot90(ARROW, 1), 7: np.rot90(ARROW, 2).transpose(1, 0, 2), 8: np.rot90(ARROW, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_images_are_turned_upright_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif, **options)
    for image in (read_image(path), read_image(path.read_bytes())):
        assert np.abs(np.asarray(image).astype(int) - ARROW).max() <= 60
        assert image.getexif().get(0x0112, 1) == 1
    with Image.open(path) as opened:
        assert (np.asarray(read_image(opened)) == np.asarray(read_image(path))).all()


def test_damaged_metadata_cost_no_image(tmp_path: Path) -> None:
    for name, damage in [
        ("offset", b"II*\0\xff\xff\xff\x7f"),
        ("type", b"II*\0\x08\0\0\0\x01\0\x12\x01\x63\0"),
        ("", b""),
    ]:
        Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=b"Exif\0\0" + damage)
        assert (read(tmp_path / "x.png") == PIXELS).all(), name


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RAMP.astype("f4") * 255, "its pixels run from 0 to 255, where 1 is white; save it with 8 bits"),
        (RAMP.astype("f4") - 1, "run from -1 to 0"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype("f4"), "run from nan to nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype("f4"), "run from 0 to inf"),
        ((RAMP * 255).astype("i4"), "all black: its pixels run to 255, where 2,147,483,647 is white"),
        ((RAMP * 100).astype("u2"), "all black: its pixels run to 100, where 65,535 is white; save it with 8 bits"),
        ((RAMP * 255).astype("u2"), "nearly black: its pixels run to 255, 12 bits or fewer, where 65,535 is white"),
        ((RAMP * 4095).astype("u2"), "nearly black: its pixels run to 4,095, 12 bits or fewer"),
        ((RAMP * 1e-3).astype("f4"), "all black: its pixels run to 0.001, where 1 is white"),
        ((RAMP * 255 - 9).astype("i4"), "run from -9 to 246, where 2,147,483,647 is white"),
    ],
)
def test_pixels_without_a_range_are_refused(tmp_path: Path, values: np.ndarray, says: str) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=says.replace("+", r"\+")):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize(("bits", "brightest"), [(16, 4096), (32, 2**24)])
def test_the_darkest_that_are_taken(tmp_path: Path, bits: int, brightest: int) -> None:
    values = (RAMP * brightest).round()
    Image.fromarray(values.astype("u2" if bits == 16 else "i4")).save(tmp_path / "x.tif")
    top = 2**31 - 1 if bits == 32 else 2**bits - 1
    assert (read(tmp_path / "x.tif")[..., 0] == np.rint(values * 255 / top)).all()


def test_all_black_is_black_in_every_type(tmp_path: Path) -> None:
    for k, dtype in enumerate(("u1", "u2", "i4", "f4")):
        Image.fromarray(np.zeros((3, 4), dtype)).save(tmp_path / f"{k}.tif")
        assert (read(tmp_path / f"{k}.tif") == 0).all()


def test_what_is_no_regular_file_is_named_at_once(tmp_path: Path) -> None:
    names = ["missing", "folder", "pipe", "socket", "zero", "empty", "loop", "a\0b", "x" * 300]
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as bound:
        try:
            os.chdir(tmp_path)  # the path of a socket must be short
            bound.bind("socket")
        finally:
            os.chdir(here)
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    images = ImageFiles("x", tmp_path, tuple(names), torch.zeros(len(names), dtype=torch.int64), ("a",))
    started, reasons = time.monotonic(), []
    for row in range(len(names)):
        with pytest.raises(ImageError) as caught:
            images.image(row)
        reasons.append(str(caught.value))
    assert time.monotonic() - started < 2
    expected = ["missing", "a folder", "a pipe", "a socket", "a device", "empty", "cannot", "cannot", "cannot"]
    assert [reason[: len(start)] for reason, start in zip(reasons, expected, strict=True)] == expected
    assert len(images.fingerprint()) == 64
    assert unreadable(tmp_path) == "a folder, not a file"


def test_a_file_that_may_not_be_read_is_said_to_be_one(tmp_path: Path, monkeypatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(ImageError, match="may not be read"):
        read_image(tmp_path / "x.png")


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((13_000, 13_000), "13,000 x 13,000 pixels; at most 89,478,485"),
        ((60_000, 60_000), "more than 178,956,970 pixels"),
    ],
)
def test_huge_images_are_refused_before_they_are_decoded(size: tuple[int, int], says: str) -> None:
    with pytest.raises(ImageError, match=f"^too large, {says}"):
        read_image(png(*size))


def test_only_the_formats_that_are_meant_are_tried(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "tif", "bmp", "ppm", "gif"):
        Image.fromarray(PIXELS).save(tmp_path / f"x.{suffix}")
        (tmp_path / f"x.{suffix}").rename(tmp_path / "named.jpg")  # the content counts
        assert read_image(tmp_path / "named.jpg").size == (16, 12)
    Image.fromarray(PIXELS).save(
        tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]
    )
    assert read_image(tmp_path / "two.jpg").size == (16, 12)
    for name in ("x.pcx", "x.tga", "x.ico"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "x.html").write_text("<html>404</html>")
    for name in ("x.pcx", "x.tga", "x.ico", "x.eps", "x.html"):
        with pytest.raises(ImageError, match=f"cannot be decoded, no {FORMATS[0]}, .* or {FORMATS[-1]}$"):
            read_image(tmp_path / name)


def seed_files() -> list[bytes]:
    found, colour = [], Image.fromarray(PIXELS)
    grey16 = Image.fromarray((RAMP * 65535).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, name, options in [
        (colour, "PNG", {"exif": exif}), (colour, "JPEG", {"exif": exif}), (colour, "JPEG", {"progressive": True}),
        (colour.convert("P"), "PNG", {"transparency": bytes(9)}), (grey16, "PNG", {}), (grey16, "TIFF", {}),
        (Image.fromarray(RAMP.astype("f4")), "TIFF", {"exif": exif}), (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "WEBP", {}), (colour, "GIF", {}), (colour, "BMP", {}), (colour, "PPM", {}),
    ]:  # fmt: skip
        file = io.BytesIO()
        image.save(file, format=name, **options)
        found.append(file.getvalue())
    return found


SEEDS = seed_files()


def assert_an_image_or_unreadable(raw: bytes) -> None:
    with suppress(ImageError), patch.object(Image, "MAX_IMAGE_PIXELS", 2**18):  # a header's size is quickly changed
        assert read_image(raw).mode == "RGB"


@settings(max_examples=FUZZ)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 255)), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(0, 2**12)),
)
def test_damaged_bytes_are_an_image_or_unreadable(raw: bytes, changes: list[tuple[int, int]], cut: int | None) -> None:
    damaged = bytearray(raw)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    damaged = damaged[: None if cut is None else cut % len(damaged)]
    assert_an_image_or_unreadable(bytes(damaged))


@settings(max_examples=FUZZ)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0\x08\0\0\0", b"GIF89a", b"P6 "]),
)
def test_any_bytes_are_an_image_or_unreadable(raw: bytes, magic: bytes) -> None:
    assert_an_image_or_unreadable(magic + raw)
