"""Images of all kinds have the pixels that a viewer shows; what has none is refused by name."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddml.data import images
from ddml.errors import InputError

Image: Any = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
RNG = np.random.default_rng(0)
SIZE = 8
COLOURS = RNG.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
GREY = RNG.integers(0, 256, (SIZE, SIZE), np.uint8)
DEEP = RNG.integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
DEEP[0, :2] = 0, 65535
ALPHA = RNG.integers(0, 256, (SIZE, SIZE), np.uint8)
ON_WHITE = 255 + (COLOURS.astype(float) - 255) * ALPHA[:, :, None] / 255
INDEXED = RNG.integers(0, 4, (SIZE, SIZE), np.uint8)
PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199]], np.uint8)


def three(grey: Any) -> Any:
    """Grey in three channels."""
    return np.repeat(np.asarray(grey)[:, :, None], 3, 2)


def indexed() -> Any:
    image = Image.fromarray(INDEXED).convert("P")
    image.putdata(INDEXED.ravel().tolist())
    image.putpalette(PALETTE.ravel().tolist())
    return image


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def png(values: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 16 bits a channel, with more chunks in front of its pixels."""
    head = struct.pack(">IIBBBBB", SIZE, SIZE, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts
    )


def saved(image: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: (image() if callable(image) else image).save(path, **options)


MASKED = np.where(INDEXED == 2, 255, 0)[:, :, None] | np.where((INDEXED == 2)[:, :, None], 0, PALETTE[INDEXED])
DEEP_MASKED = np.where(DEEP[3, 3] == DEEP, 255, np.round(DEEP / 257))

# name of the file: how it is made, the pixels (8, 8, 3), and how far they may be off
SHOWN: dict[str, tuple[Callable[[Path], Any], Any, float]] = {
    "rgb.png": (saved(Image.fromarray(COLOURS)), COLOURS, 0),
    "rgb.tif": (saved(Image.fromarray(COLOURS)), COLOURS, 0),
    "rgb.PPM": (saved(Image.fromarray(COLOURS)), COLOURS, 0),
    "rgb of 16 bits.png": (lambda p: p.write_bytes(png(three(DEEP).reshape(SIZE, -1), 2)), three(DEEP / 257), 1),
    "grey.png": (saved(Image.fromarray(GREY)), three(GREY), 0),
    "grey.bmp": (saved(Image.fromarray(GREY)), three(GREY), 0),
    "grey of 16 bits.png": (saved(Image.fromarray(DEEP)), three(np.round(DEEP / 257)), 0),
    "grey of 16 bits.tif": (saved(Image.fromarray(DEEP)), three(np.round(DEEP / 257)), 0),
    "grey of 16 bits, white is zero.tif": (
        saved(Image.fromarray(DEEP), tiffinfo={262: 0}), three(np.round(255 - DEEP / 257)), 0,
    ),
    "grey of 16 bits.pgm": (
        lambda p: p.write_bytes(b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes()), three(np.round(DEEP / 257)), 0,
    ),
    "grey of 12 bits.pgm": (
        lambda p: p.write_bytes(b"P5 8 8 4095\n" + (DEEP // 16).astype(">u2").tobytes()),
        three(DEEP // 16 / 4095 * 255), 1,
    ),
    "rgb of 16 bits.ppm": (
        lambda p: p.write_bytes(b"P6 8 8 65535\n" + three(DEEP).astype(">u2").tobytes()), three(DEEP / 257), 1,
    ),
    "bits.pbm": (lambda p: p.write_bytes(b"P4 8 8\n" + bytes(range(8))), three(
        255 * (1 - np.unpackbits(np.arange(8, dtype=np.uint8)).reshape(8, 8).astype(float))), 0,
    ),
    "grey of 16 bits with a transparent value.png": (
        lambda p: p.write_bytes(png(DEEP, 0, (b"tRNS", struct.pack(">H", DEEP[3, 3])))), three(DEEP_MASKED), 0,
    ),
    "grey and alpha of 16 bits.png": (
        lambda p: p.write_bytes(png(np.stack([DEEP, 257 * ALPHA.astype(np.uint16)], 2).reshape(SIZE, -1), 4)),
        three(255 + (DEEP / 257 - 255) * ALPHA / 255), 2,
    ),
    "bits.png": (saved(Image.fromarray(GREY > 99)), three(255 * (GREY > 99)), 0),
    "grey with alpha.png": (
        saved(Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))),
        three(255 + (GREY.astype(float) - 255) * ALPHA / 255), 1,
    ),
    "grey with a transparent value.png": (
        saved(Image.fromarray(GREY), transparency=int(GREY[2, 2])), three(np.where(GREY[2, 2] == GREY, 255, GREY)), 0,
    ),
    "rgb with alpha.png": (saved(Image.fromarray(np.dstack([COLOURS, ALPHA]))), ON_WHITE, 1),
    "rgb with alpha.webp": (
        saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), lossless=True, exact=True), ON_WHITE, 1,
    ),
    "palette.png": (saved(indexed), PALETTE[INDEXED], 0),
    "palette.gif": (saved(indexed), PALETTE[INDEXED], 0),
    "palette with transparency.png": (saved(indexed, transparency=2), MASKED, 0),
    "palette with transparency.gif": (saved(indexed, transparency=2), MASKED, 0),
    "cmyk.tif": (saved(Image.fromarray(255 - np.dstack([COLOURS, 255 + 0 * GREY]), "CMYK")), COLOURS, 0),
    "cmyk.jpg": (saved(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))), np.full((SIZE, SIZE, 3), [255, 0, 0]), 6),
    "no suffix": (saved(Image.fromarray(COLOURS), format="PNG"), COLOURS, 0),
    "wrong suffix.jpg": (saved(Image.fromarray(COLOURS), format="PNG"), COLOURS, 0),
    "turned.png": (saved(Image.fromarray(COLOURS), **turned(6)), np.rot90(COLOURS, -1), 0),
    "mirrored.webp": (saved(Image.fromarray(COLOURS), lossless=True, **turned(2)), COLOURS[:, ::-1], 0),
    "turned by half.tif": (saved(Image.fromarray(COLOURS), tiffinfo={274: 3}), COLOURS[::-1, ::-1], 0),
    "turned, of 16 bits.png": (saved(Image.fromarray(DEEP), **turned(8)), three(np.rot90(np.round(DEEP / 257))), 0),
    "animated.gif": (
        saved(indexed, save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE), "pink")]), PALETTE[INDEXED], 0,
    ),
    "of many pages.tif": (
        saved(Image.fromarray(COLOURS), save_all=True, append_images=[Image.new("RGB", (3, 3), "pink")]), COLOURS, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_pixels_are_those_of_a_viewer(name: str, tmp_path: Path) -> None:
    make, expected, tolerance = SHOWN[name]
    (tmp_path / "class").mkdir()
    make(tmp_path / "class" / name)
    ((path, _),) = images.image_folder(tmp_path).files
    found = images.pixels(path, (SIZE, SIZE), False)
    assert (found.shape, found.dtype) == ((3, SIZE, SIZE), np.uint8)
    np.testing.assert_allclose(found.transpose(1, 2, 0).astype(float), expected, rtol=0, atol=tolerance)
    grey = np.asarray(expected, float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(images.pixels(path, (SIZE, SIZE), True)[0], grey, rtol=0, atol=tolerance + 1)


def cut(name: str, share: float, **options: Any) -> Callable[[Path], None]:
    """A part of a good image."""

    def make(path: Path) -> None:
        good = path.with_name(name)
        Image.fromarray(np.tile(COLOURS, (20, 20, 1))).save(good, **options)
        content = good.read_bytes()
        good.unlink()
        path.write_bytes(content[: int(share * len(content))])

    return make


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


GOOD = png(DEEP, 0)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file closefile showpage\n"
BMP = (
    b"BM" + struct.pack("<IHHI", 70, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 10000, 10000, 1, 24, 0, 0, 0, 0, 0, 0)
)
BMP += bytes(16)
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half.png": (cut("a.png", 0.5), "truncated"),
    "half.jpg": (cut("a.jpg", 0.5), "truncated"),
    "half.gif": (cut("a.gif", 0.5), "cut off or damaged"),
    "half.tif": (cut("a.tif", 0.5, compression="tiff_lzw"), "cut off or damaged"),
    "half.webp": (cut("a.webp", 0.5), "cut off or damaged"),
    "half.bmp": (cut("a.bmp", 0.5), "truncated"),
    "half.ppm": (cut("a.ppm", 0.5), "truncated"),
    "a head alone.png": (content(GOOD[:33]), "cannot read"),
    "empty.jpg": (content(b""), "cannot identify"),
    "text.png": (content(b"no image"), "cannot identify"),
    "broken chunk.png": (content(GOOD.replace(b"IDAT", b"\x01DAT")), "cannot identify"),
    "broken pixels.png": (content(GOOD[:45] + b"\xff" * 20 + GOOD[65:]), "cannot read"),
    "bomb.png": (
        content(png(DEEP, 0).replace(struct.pack(">II", 8, 8), struct.pack(">II", 100_000, 100_000))), "cannot read",
    ),
    "a program of PostScript.png": (content(EPS), "cannot identify"),
    "a program of PostScript.eps.jpg": (content(EPS), "cannot identify"),
    "pixels that nothing stores.png": (
        content(GOOD.replace(struct.pack(">II", 8, 8), struct.pack(">II", 9000, 9000))), "cannot read",
    ),
    "pixels that nothing stores.bmp": (content(BMP), "its 70 bytes unpack to 800000000"),
    "integers of 32 bits.tif": (saved(Image.fromarray(DEEP.astype(np.int32))), "integers whose white is not known"),
    "floats.tif": (saved(Image.fromarray(GREY / np.float32(255))), "floats whose white is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, expected = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        images.pixels(tmp_path / name, (SIZE, SIZE), False)
    assert expected in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_declared_size_that_nothing_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 60000 60000 255\n" + bytes(99))
    with pytest.raises(InputError, match="decompression bomb"):
        images.pixels(tmp_path / "a.ppm", (SIZE, SIZE), False)


def test_what_is_no_image_of_a_class_is_passed_over(tmp_path: Path) -> None:
    for name in ("cats", "dogs", ".git", "__MACOSX", "notes", "empty"):
        (tmp_path / name).mkdir()
    for name in ("cats/1.png", "cats/2", "dogs/1.png", ".git/1.png", "__MACOSX/1.png"):
        Image.fromarray(COLOURS).save(tmp_path / name, format="PNG")
    (tmp_path / "dogs" / "more").mkdir()
    Image.fromarray(COLOURS).save(tmp_path / "dogs" / "more" / "1.png")
    foreign = (".DS_Store", "Thumbs.db", "desktop.ini", "._1.png", "readme.txt", "labels.csv", "a.h5")
    for name in foreign:
        (tmp_path / "cats" / name).write_bytes(b"\0\0\0\1Bud1" if name == ".DS_Store" else b"some text")
    (tmp_path / "notes" / "readme.md").write_text("text")
    (tmp_path / "readme.md").write_text("text")
    found = images.image_folder(tmp_path)
    assert found.classes == ["cats", "dogs"]
    assert [(str(p.relative_to(tmp_path)), i) for p, i in found.files] == [
        ("cats/1.png", 0), ("cats/2", 0), ("dogs/1.png", 1),
    ]  # fmt: skip
    others = (".git", "__MACOSX", "notes", "empty", "readme.md", "dogs/more", *(f"cats/{n}" for n in foreign))
    assert sorted(found.passed_over) == sorted(tmp_path / n for n in others)


@pytest.mark.parametrize("layout", ["nothing", "images without classes", "a file", "hidden classes"])
def test_folders_without_images_of_classes_are_refused(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    if layout == "a file":
        root.write_text("text")
    elif layout != "nothing":
        folder = root if layout == "images without classes" else root / ".cats"
        folder.mkdir(parents=True)
        Image.fromarray(COLOURS).save(folder / "1.png")
    with pytest.raises(InputError, match="root must hold folders of images, one for each class"):
        images.image_folder(root)
