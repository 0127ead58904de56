"""From an image file to upright RGB pixels of 8 bits: the one decoding, whatever the images come from.

The rules: the orientation that EXIF gives is applied. Transparency is dropped, as torchvision's ImageFolder drops it.
Pixels of more than 8 bits are scaled to 0 ... 255 from the range of their own type: 16 bits from 65,535 (12 bits from
4,095), 32 bits from 2^31 - 1 or 2^32 - 1, floating point from 1. What does not lie in that range is refused, and so is
what would be all black, or has 16 bits of which it uses 12 or fewer.
Of several frames the first counts.
"""

import io
import struct
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tailscope.errors import unreadable

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
"""What is tried on a file, whatever its name: Pillow knows fifty formats, of which some start other programs."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_TWELVE_BITS = 4095

# What Pillow's readers raise for damaged files. It documents no list: the first three are all that 170,000 damaged ones
# brought, the others are what Pillow itself expects of its readers.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageError(Exception):
    """An image that cannot be taken. The message says why in a few words, without the file's name."""


def read_image(source: Path | bytes | Image.Image) -> Image.Image:
    """Decode a file, the bytes of one, or what Pillow has opened, to an upright RGB image without metadata.

    >>> read_image(Image.fromarray(np.array([[0, 257, 65535]], np.uint16))).getpixel((1, 0))
    (1, 1, 1)

    Raises:
        ImageError: it is missing, no regular file, damaged, of another format, too large, or of pixels without a range.
    """
    if isinstance(source, Path):
        problem = unreadable(source)
        if problem:
            raise ImageError(problem)
    if source == b"":
        raise ImageError("empty")
    # Pillow warns of what it gets over, page by page; what it does not get over is an exception.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _opened(source) as image:
                _refuse_large(image)
                return _to_rgb(image)
        except UnidentifiedImageError:
            raise ImageError(f"cannot be decoded, no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
        except Image.DecompressionBombError:
            raise ImageError(f"too large, more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
        except _DAMAGED as error:
            text = " ".join(str(error).split())[:100]
            raise ImageError(f"cannot be decoded, {text or type(error).__name__}") from None


def _opened(source: Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _eight_bits(image).convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # the orientation is used up: whoever looks for it again must find none
    return rgb


def _refuse_large(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"too large, {image.width:,} x {image.height:,} pixels; at most {limit:,} are taken")


def _orientation(image: Image.Image) -> int:
    """Return EXIF's number for the orientation; damaged metadata cost no image."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGED:
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image in a mode of 8 bits a channel that becomes RGB without loss but for transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scaled(image))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        _refuse_transparent_only(image.convert("RGBA"))
    return image


def _scaled(image: Image.Image) -> npt.NDArray[np.uint8]:
    values, top = _values(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= top):
        raise ImageError(f"its pixels run from {low:g} to {high:g}, where {top:,} is white; save it with 8 bits")
    _refuse_dark(high, top)
    scaled = values.astype(np.float32)  # its 24 bits leave room for the 8 that are wanted
    scaled *= 255 / top
    np.rint(scaled, out=scaled)
    pixels = scaled.astype(np.uint8)
    return 255 - pixels if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO else pixels


def _refuse_dark(high: float, top: int) -> None:
    """Refuse what would be all black, and 8 to 12 bits in the lower part of 16, as many cameras and scanners save."""
    says = f"its pixels run to {high:,.0f}" if high >= 1 else f"its pixels run to {high:.3g}"
    if 0 < high < top / 510:
        raise ImageError(f"all black: {says}, where {top:,} is white; save it with 8 bits")
    if top == 65535 and 0 < high <= _TWELVE_BITS:
        raise ImageError(f"nearly black: {says}, 12 bits or fewer, where {top:,} is white; save it with 8 bits")


def _values(image: Image.Image) -> tuple[npt.NDArray[Any], int]:
    """Return the pixels and the value that is white. Only TIFF says more of its type than the mode does."""
    values = np.asarray(image)
    if image.mode == "F":
        return values, 1
    bits = _tag(image, _BITS, 16 if image.mode != "I" or image.format in ("PNG", "PPM") else 0)
    if image.mode != "I":
        return values, 2**bits - 1
    signed = bits == 0 or _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED
    if not signed and bits == 32:
        values = values.view(np.uint32)
    return values, 2 ** ((bits or 32) - signed) - 1


def _tag(image: Image.Image, number: int, default: int) -> int:
    found = getattr(image, "tag_v2", {}).get(number, default)
    return int(found[0] if isinstance(found, tuple) else found)


def _refuse_transparent_only(rgba: Image.Image) -> None:
    """Refuse what would be one plain colour without its transparency: icons and drawings are often saved so."""
    (least, most), *colours = (band.getextrema() for band in reversed(rgba.split()))
    if least != most and all(low == high for low, high in colours):
        raise ImageError("its picture is in its transparency alone, which is dropped; save it on a background")
