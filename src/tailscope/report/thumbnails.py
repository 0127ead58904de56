"""Small pictures of the samples that a page lists, made from the images that a diagnosis was given.

diagnosis.json holds no pixels: thumbnails.npz beside it has them, for pages that are renewed. What a page embeds is
encoded here, from these pixels: no byte of anybody's file gets into it, and no id becomes a path.
"""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from tailscope.errors import UserError
from tailscope.progress import Progress
from tailscope.report.diagnosis_schema import Diagnosis, Sample
from tailscope.report.drilldown import shown_samples
from tailscope.tables import files

FILE = "thumbnails.npz"
SIDE = 48  # pixels of the longer side, at most
SHOWN = 64  # pixels on the screen, up to which what is smaller is enlarged, by a whole number
MOST = 1_500  # samples
MOST_BYTES = 2_000_000  # of all thumbnails in a page; without any, a page of 100 classes has under 2 MB

Pictures: TypeAlias = Callable[[Sequence[Sample]], Iterable["Image.Image | None"]]
"""Images of listed samples, in their order; None for one that cannot be had."""


class Picture(NamedTuple):
    """A thumbnail for a page: its data URI, and its size on the screen."""

    uri: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True)
class Shown:
    """The thumbnails of a page.

    Attributes:
        pictures: by the samples' rows in their file.
        samples: how many are listed on the page.
        unreadable: of these, how many have an image that cannot be read.
    """

    pictures: dict[int, Picture] = field(default_factory=dict)
    samples: int = 0
    unreadable: int = 0


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Pictures of n scored samples, at most `SIDE` pixels high and wide.

    Attributes:
        scored: SHA-256 of the scored samples' features and labels, as the result's spec has it.
        rows: [n] the samples' rows in their file.
        sizes: [n, 2] height and width; 0 where the image cannot be read.
        pixels: uint8 [n, H, W, 3], each picture at the top left.
    """

    scored: str
    rows: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, result: Any, pictures: Mapping[str, Pictures], progress: Progress) -> "Thumbnails | None":
        """Make those of the samples that the page of a diagnosis lists, `MOST` at most.

        `pictures` are of its parts, `unseen` and `test`. None where the page lists no sample, or has no images of them.
        """
        stored = result["drilldown"]
        if stored is None or stored["file"] not in pictures:
            return None
        wanted = list({one["row"]: one for one in shown_samples(stored)}.values())[:MOST]
        found: list[npt.NDArray[np.uint8]] = []
        with progress.task("thumbnails", len(wanted)) as advance:
            for image in pictures[stored["file"]](wanted):
                found.append(np.empty((0, 0, 3), np.uint8) if image is None else _shrunk(image))
                advance(1)
        if not found:
            return None
        sizes = np.array([one.shape[:2] for one in found], dtype=np.int64)
        pixels = np.zeros((len(found), *sizes.max(axis=0), 3), dtype=np.uint8)
        for place, one in zip(pixels, found, strict=True):
            place[: one.shape[0], : one.shape[1]] = one
        return cls(_scored(result), np.array([one["row"] for one in wanted]), sizes, pixels)

    @classmethod
    def load(cls, folder: Path, result: Diagnosis) -> "Thumbnails | None":
        """Read those in a folder; None where there are none, or where they show samples of other features.

        Raises:
            UserError: the file is damaged or holds something else.
        """
        path = folder / FILE
        if result.get("drilldown") is None or not path.exists():
            return None
        fields = ("scored", "rows", "sizes", "pixels")
        arrays = files.read(path, fields, ()).arrays
        scored, rows, sizes, pixels = (arrays[name] for name in fields)
        if not _well_formed(rows, sizes, pixels):
            raise UserError(f"{path}: holds no thumbnails; remove the file, and the page does without")
        return cls(str(scored), rows, sizes, pixels) if str(scored) == _scored(result) else None

    def save(self, folder: Path) -> Path:
        """Write them into a folder, and return the file's path."""
        scored = np.array(self.scored)
        files.write(folder / FILE, {"scored": scored, "rows": self.rows, "sizes": self.sizes, "pixels": self.pixels})
        return folder / FILE

    def shown(self, result: Diagnosis) -> Shown:
        """Return those that a page has room for: the first of every class before all second ones."""
        stored = result.get("drilldown")
        times = Counter([] if stored is None else [one["row"] for one in shown_samples(stored)])
        place = {row: k for k, row in enumerate(self.rows.tolist())}
        found, unreadable, room = Shown(samples=len(times)), 0, MOST_BYTES
        for row in [row for row in times if row in place]:
            height, width = self.sizes[place[row]].tolist()
            if not height or not width:
                unreadable += 1
            elif room > 0:
                picture = _picture(self.pixels[place[row], :height, :width])
                room -= len(picture.uri) * times[row]
                if room >= 0:
                    found.pictures[row] = picture
        return Shown(found.pictures, found.samples, unreadable)


def of_inputs(input_of: Callable[[int], Tensor | None]) -> Pictures:
    """Return what shows a network's inputs [C, H, W], which it knows by their rows.

    Inputs are normalised, nobody says how. So each channel is stretched from its least to its greatest value in all of
    them, which undoes it where the brightest pixel was white and the darkest black; values from 0 to 1 stay.
    """

    def pictures(samples: Sequence[Sample]) -> list[Image.Image | None]:
        found = [None if (one := input_of(sample["row"])) is None else _reduced(one) for sample in samples]
        every = [one.flatten(1) for one in found if one is not None]
        if not every:
            return [None] * len(found)
        together = torch.cat(every, dim=1)
        low, high = together.amin(dim=1)[:, None, None], together.amax(dim=1)[:, None, None]
        if low.min() >= 0 and high.max() <= 1:
            low, high = torch.zeros_like(low), torch.ones_like(high)
        return [None if one is None else _stretched(one, low, high) for one in found]

    return pictures


def _well_formed(rows: npt.NDArray[Any], sizes: npt.NDArray[Any], pixels: npt.NDArray[Any]) -> bool:
    """Return whether arrays that anybody may have written are those of thumbnails."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        return False
    if rows.dtype != np.int64 or rows.shape != pixels.shape[:1]:
        return False
    if sizes.dtype != np.int64 or sizes.shape != (len(rows), 2):
        return False
    return max(pixels.shape[1:3]) <= SIDE and bool((sizes >= 0).all() and (sizes <= pixels.shape[1:3]).all())


def _reduced(given: Tensor) -> Tensor:
    """Return an input with 1 or 3 channels, at most `SIDE` pixels high and wide."""
    image = torch.nan_to_num(given.detach().cpu().float(), posinf=0.0, neginf=0.0)
    image = image[: 3 if len(image) >= 3 else 1]
    scale = SIDE / max(image.shape[1:])
    if scale >= 1:
        return image
    size = [max(1, round(scale * side)) for side in image.shape[1:]]
    return interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _stretched(image: Tensor, low: Tensor, high: Tensor) -> Image.Image:
    shares = (image - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    pixels = (255 * shares).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def _shrunk(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image, at most `SIDE` high and wide, [h, w, 3]; none is enlarged."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(small)


def _picture(pixels: npt.NDArray[np.uint8]) -> Picture:
    """Encode a picture as PNG or as JPEG, whichever is smaller."""
    image, forms = Image.fromarray(pixels), []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80, "optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        forms.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}")
    times = max(1, SHOWN // max(image.size))
    return Picture(min(forms, key=len), times * image.width, times * image.height, times > 1)


def _scored(result: Any) -> str:
    """Return the SHA-256 of the scored samples' numbers."""
    samples = next(iter(result["spec"]["encoders"].values()), {}).get(result["drilldown"]["file"])
    return str((samples or {}).get("sha256"))
