"""Folders of images, one for each class, and their pixels as a viewer shows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddml import regular
from ddml.errors import InputError

from .unpacking import check_unpacked, readable

# endings of files that must be images; files of other names are images if their first bytes say so
SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".webp", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx"),
    )
)
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")  # that are known by their first bytes
# that are read at all: Pillow knows others which programs are started for (EPS), or which lead to other files
READ = (*FORMATS, "JPEG2000", "DIB", "AVIF", "PPM", "TGA", "PCX")
BYTES = 8  # that a pixel may take while it is worked on
# what systems leave in folders, besides names that begin with a dot
LEFT = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"))
DEEP = 65535  # white in 16 bits
PHOTOMETRIC = 262  # tag of TIFF (PhotometricInterpretation), 0 where white is zero: Pillow leaves 16 bits as they are


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder of classes.

    Attributes
    ----------
    classes : list of str
        Names of the folders that hold images, sorted.
    files : list of (Path, int)
        The images and their classes, in the order of the names.
    passed_over : list of Path
        Files and folders that are none of these: hidden ones, other files, folders in the folders of classes.
    """

    classes: list[str]
    files: list[tuple[Path, int]]
    passed_over: list[Path]


def image_folder(root: Path, without: str | None = None) -> ImageFolder:
    """What a folder holds, but files of names like ``without`` (a pattern as in shells); images are not decoded.

    Raises
    ------
    InputError
        If there is no image in folders in it, a folder cannot be read, or Pillow is not installed.
    """
    found = ImageFolder([], [], [])
    with readable(root, "folder "):
        entries = sorted(root.iterdir()) if root.is_dir() else []
    for folder in entries:
        with readable(folder, "folder "):
            inside = [] if _left(folder) or not folder.is_dir() else sorted(folder.iterdir())
            inside = [path for path in inside if without is None or not fnmatch(path.name, without)]
        images = [path for path in inside if not _left(path) and path.is_file() and _is_image(path)]
        if images:
            found.files.extend((path, len(found.classes)) for path in images)
            found.classes.append(folder.name)
            found.passed_over.extend(sorted(set(inside) - set(images)))
        else:
            found.passed_over.append(folder)
    if not found.files:
        raise InputError(f"{root} must hold folders of images, one for each class")
    return found


def _left(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in LEFT


def _is_image(path: Path) -> bool:
    """Whether a file is to be one, by its name or its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    Image, _ = _pillow()
    Image.init()
    with readable(path):
        try:
            with regular.opened(path) as file, Image.open(file, formats=_known(FORMATS)):
                return True
        except Image.UnidentifiedImageError:
            return False


def _known(formats: Sequence[str]) -> list[str]:
    """Those of some formats that Pillow was built with."""
    Image, _ = _pillow()
    return [name for name in formats if name in Image.OPEN]


def pixels(path: Path, size: Sequence[int], grey: bool) -> NDArray[np.uint8]:
    """An image, cut and scaled to a ``size`` (H, W): (C, H, W), C = 1 for grey and 3 for red, green and blue.

    It is what a viewer shows: turned as its camera says, of any depth and palette, transparent parts on white (our
    choice), the first of several frames. Colour profiles are not applied.

    Raises
    ------
    InputError
        An image that cannot be decoded, or whose numbers have no white: floats, integers of 32 bits or with a sign.
    """
    Image, ImageOps = _pillow()
    Image.init()
    with readable(path, "image "), regular.opened(path) as file, Image.open(file, formats=_known(READ)) as image:
        check_unpacked(BYTES * image.width * image.height, os.fstat(file.fileno()).st_size)
        shown = _shown(image, path).convert("L" if grey else "RGB")
        found = np.asarray(ImageOps.fit(shown, tuple(reversed(size))))
    return found.reshape(*size, -1).transpose(2, 0, 1)


def _shown(image: Any, path: Path) -> Any:
    """Upright and without transparency, of 8 bits."""
    Image, ImageOps = _pillow()
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    inverted = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
    image = ImageOps.exif_transpose(image)
    if deep:
        values = np.asarray(image).astype(np.float64)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = DEEP
        return Image.fromarray(np.round((DEEP - values if inverted else values) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise InputError(f"image {path} has {kind} whose white is not known: store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _pillow() -> tuple[Any, Any]:
    """Pillow's modules."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError("folders of images need Pillow, which is not installed; pip install Pillow") from error
    return Image, ImageOps
