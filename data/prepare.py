"""Turn official files into a data file of ddml: python data/prepare.py KIND ... -o file.h5.

mnist FOLDER      idx files (also .gz): train-images-idx3-ubyte, train-labels-idx1-ubyte and those of t10k
cifar10 FOLDER    binary batches: data_batch_1.bin and so on, as many as there are, test_batch.bin
folder FOLDER     images (PNG, JPEG, ...), one folder for each class; needs Pillow
arrays FILE ...   one .npz with inputs and labels, or two .npy; inputs (N, d) or (N, C, H, W), uint8 or floats
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddml.data.files import Source, write
from ddml.errors import InputError

Array = NDArray[Any]
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def idx(folder: Path, name: str) -> Array:
    """An array of an idx file, compressed or not."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"there is no file {folder / name} or {name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4)) if dimensions else ()
    values = np.frombuffer(content, np.uint8, offset=min(4 + 4 * dimensions, len(content)))
    if not dimensions or values.size != np.prod(shape):
        raise InputError(f"{path} is no idx file of bytes, or is not whole")
    return values.reshape(shape)


def mnist(arguments: argparse.Namespace) -> dict[str, Any]:
    """MNIST, and what has its form."""
    sources = []
    for name in ("train", "t10k"):
        images, labels = (idx(arguments.folder, f"{name}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        sources.append(Source.of(images[:, None], labels))
    return {"train": sources[0], "test": sources[1], "classes": [str(i) for i in range(10)], "origin": "MNIST"}


def cifar10(arguments: argparse.Namespace) -> dict[str, Any]:
    """CIFAR-10: each sample a label and 3 x 32 x 32 bytes."""

    def records(path: Path) -> Array:
        content = np.fromfile(path, np.uint8)
        if content.size == 0 or content.size % 3073:
            raise InputError(f"{path} must hold records of 3,073 bytes, it has {content.size}")
        return content.reshape(-1, 3073)

    def source(paths: Sequence[Path]) -> Source:
        def pieces() -> Iterator[tuple[Array, Array]]:
            for path in paths:
                found = records(path)
                yield found[:, 1:].reshape(-1, 3, 32, 32), found[:, 0]

        return Source(sum(len(records(path)) for path in paths), (3, 32, 32), np.uint8, pieces)

    batches = sorted(arguments.folder.glob("data_batch_*.bin"))
    test = arguments.folder / "test_batch.bin"
    if not batches or not test.is_file():
        raise InputError(f"{arguments.folder} must hold data_batch_*.bin and test_batch.bin")
    return {"train": source(batches), "test": source([test]), "classes": CIFAR_CLASSES, "origin": "CIFAR-10"}


def folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Folders of images, one for each class, cut and scaled to squares of one size."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError("folders of images need Pillow, which is not installed; pip install Pillow") from error
    size, mode, channels = arguments.size, "L" if arguments.grey else "RGB", 1 if arguments.grey else 3

    def files(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
        classes = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        found = [(p, i) for i, name in enumerate(classes) for p in sorted((root / name).iterdir()) if p.is_file()]
        if not found:
            raise InputError(f"{root} must hold folders of images, one for each class")
        return classes, found

    def source(chosen: Sequence[tuple[Path, int]]) -> Source:
        def pieces() -> Iterator[tuple[Array, Array]]:
            for path, label in chosen:
                try:
                    with Image.open(path) as image:
                        pixels = np.asarray(ImageOps.fit(image.convert(mode), (size, size)))
                except OSError as error:
                    raise InputError(f"cannot read image {path}: {error}") from error
                yield pixels.reshape(1, size, size, channels).transpose(0, 3, 1, 2), np.array([label])

        return Source(len(chosen), (channels, size, size), np.uint8, pieces)

    classes, found = files(arguments.folder)
    if arguments.test is not None:
        others, test = files(arguments.test)
        if others != classes:
            raise InputError(f"{arguments.test} must hold the same classes as {arguments.folder}")
        train: Sequence[tuple[Path, int]] = found
    else:
        rows, test_rows = cut(len(found), arguments)
        train, test = [found[i] for i in rows], [found[i] for i in test_rows]
    return {"train": source(train), "test": source(test), "classes": classes, "origin": arguments.folder.name}


def arrays(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arrays that numpy has stored."""

    def load(path: Path) -> Any:
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"cannot read {path}: {error}") from error

    files = arguments.files
    if len(files) not in (1, 2) or (len(files) == 1) != (files[0].suffix == ".npz"):
        raise InputError("arrays must be one .npz file with inputs and labels, or two .npy files, inputs first")
    found = load(files[0]) if len(files) == 1 else dict(zip(("inputs", "labels"), map(load, files), strict=True))
    missing = {"inputs", "labels"} - set(found)
    if missing or ("test_inputs" in found) != ("test_labels" in found):
        raise InputError(f"{files[0]} must hold inputs and labels, and both test_inputs and test_labels or neither")
    inputs, labels = found["inputs"], found["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(inputs) or not len(labels):
        raise InputError(f"labels must be integers, one for each of the inputs {inputs.shape}; got {labels.shape}")
    if "test_inputs" in found:
        test = Source.of(found["test_inputs"], found["test_labels"])
    else:
        rows, test_rows = cut(len(labels), arguments)
        test = Source.of(inputs[test_rows], labels[test_rows])
        inputs, labels = inputs[rows], labels[rows]
    largest = int(found["labels"].max())
    return {
        "train": Source.of(inputs, labels), "test": test, "classes": [str(i) for i in range(largest + 1)],
        "origin": files[0].stem, "maximum": arguments.maximum,
    }  # fmt: skip


def cut(count: int, arguments: argparse.Namespace) -> tuple[Array, Array]:
    """Rows to train on and rows to test with, at random."""
    test = round(count * arguments.test_fraction)
    if not 0 < test < count:
        raise InputError(f"a test fraction of {arguments.test_fraction} of {count} samples leaves none on one side")
    order = np.random.default_rng(arguments.seed).permutation(count)
    return np.sort(order[test:]), np.sort(order[:test])


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-o", "--output", type=Path, required=True, help="data file to write")
    parted = argparse.ArgumentParser(add_help=False)
    parted.add_argument("-test_fraction", type=float, default=0.2, help="samples that are kept for the test (0.2)")
    parted.add_argument("-seed", type=int, default=0, help="of the choice of those")
    for make in (mnist, cifar10):
        kinds.add_parser(make.__name__, parents=[shared], help=make.__doc__).add_argument("folder", type=Path)
    images = kinds.add_parser("folder", parents=[shared, parted], help=folder.__doc__)
    images.add_argument("folder", type=Path)
    images.add_argument("-test", type=Path, default=None, help="folder of the test images")
    images.add_argument("-size", type=int, default=32, help="width and height (32)")
    images.add_argument("-grey", action="store_true", help="one channel in the place of three")
    given = kinds.add_parser("arrays", parents=[shared, parted], help=arrays.__doc__)
    given.add_argument("files", type=Path, nargs="+")
    given.add_argument("-maximum", type=float, default=None, help="value that stands for 1 (255 for uint8, else 1)")
    arguments = parser.parse_args(words)
    try:
        if not arguments.output.resolve().parent.is_dir():
            raise InputError(f"cannot write {arguments.output}: there is no such folder")
        content = {"mnist": mnist, "cifar10": cifar10, "folder": folder, "arrays": arrays}[arguments.kind](arguments)
        write(arguments.output, **content)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output}: {content['train'].count} samples, {content['test'].count} to test with")


if __name__ == "__main__":
    main()
