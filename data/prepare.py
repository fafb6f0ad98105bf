"""Turn official files into a data file of ddml: python data/prepare.py KIND ... -o file.h5.

mnist FOLDER      idx files: train-images-idx3-ubyte, train-labels-idx1-ubyte and those of t10k
cifar10 FOLDER    binary batches: data_batch_1.bin and so on, as many as there are, test_batch.bin
folder FOLDER     images (PNG, JPEG, ...), one folder for each class; needs Pillow
arrays FILE ...   one .npz with inputs and labels, or two .npy; inputs (N, d) or (N, C, H, W)

All but images may be compressed (gzip, bzip2, xz). data/README.md says what becomes of pixels, numbers and labels.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddml.data import arrays as numpy_files
from ddml.data import images
from ddml.data.files import Source, write
from ddml.data.unpacking import SUFFIXES, Unpacked, check_unpacked, opened
from ddml.errors import InputError, printable
from ddml.regular import check_target

Array = NDArray[Any]
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LISTED = 5  # names that a note shows (our choice)


def files_like(folder: Path, pattern: str) -> list[Path]:
    """Files of these names, compressed or not; where there are both, those that are not."""
    found = {
        path.name.removesuffix(suffix): path
        for suffix in reversed(SUFFIXES) for path in folder.glob(pattern + suffix) if path.is_file()
    }  # fmt: skip
    return [found[name] for name in sorted(found)]


def idx(folder: Path, name: str, dimensions: int) -> Array:
    """An array of bytes in an idx file, compressed or not."""
    found = files_like(folder, f"{name}[-.]idx{dimensions}-ubyte")
    if not found:
        raise InputError(f"there is no file {folder / name}-idx{dimensions}-ubyte, compressed or not")
    with opened(found[0]) as file:
        head = file.read(4 + 4 * dimensions)
        if head[:4] != bytes((0, 0, 8, dimensions)) or len(head) < 4 + 4 * dimensions:
            raise InputError(f"{found[0]} is no idx file of bytes in {dimensions} dimensions")
        shape = tuple(int(n) for n in np.frombuffer(head, ">u4", dimensions, 4))
        packed = isinstance(file.raw, Unpacked)
        check_unpacked(math.prod(shape) if packed else 0, found[0].stat().st_size)
        content = file.read(math.prod(shape) + 1) if packed else file.read()
    values = np.frombuffer(content, np.uint8)
    if values.size != math.prod(shape) or not values.size:
        more = " or more" * (values.size > math.prod(shape))
        raise InputError(f"{found[0]} is not whole, or empty: it is to hold {shape}, and has {values.size} bytes{more}")
    return values.reshape(shape)


def mnist(arguments: argparse.Namespace) -> dict[str, Any]:
    """MNIST, and what has its form."""
    found, labels = {}, {}
    for name in ("train", "t10k"):
        found[name] = idx(arguments.folder, f"{name}-images", 3)[:, None]
        labels[name] = idx(arguments.folder, f"{name}-labels", 1)
        if len(found[name]) != len(labels[name]):
            counts = f"{len(found[name])} images, but {len(labels[name])} labels"
            raise InputError(f"{arguments.folder} has {counts} for {name}")
    numbers, classes, notes = list(labels.values()), [str(i) for i in range(10)], []
    if max(column.max() for column in numbers) > 9:  # letters, say
        numbers, classes, notes = numpy_files.classes_of(*labels.items())
    train, test = (Source.of(x, y) for x, y in zip(found.values(), numbers, strict=True))
    return {"train": train, "test": test, "classes": classes, "origin": "MNIST", "notes": notes}


def cifar10(arguments: argparse.Namespace) -> dict[str, Any]:
    """CIFAR-10: each sample a label and 3 x 32 x 32 bytes."""

    def records(path: Path) -> Array:
        with opened(path) as file:
            content = np.frombuffer(file.read(), np.uint8)
        if content.size == 0 or content.size % 3073:
            raise InputError(f"{path} must hold records of 3,073 bytes, it has {content.size}")
        found = content.reshape(-1, 3073)
        wrong = np.flatnonzero(found[:, 0] >= len(CIFAR_CLASSES))
        if len(wrong):
            raise InputError(f"{path} is no batch of CIFAR-10: record {wrong[0]} has the label {found[wrong[0], 0]}")
        return found

    def source(paths: Sequence[Path]) -> Source:
        def pieces() -> Iterator[tuple[Array, Array]]:
            for path in paths:
                found = records(path)
                yield found[:, 1:].reshape(-1, 3, 32, 32), found[:, 0]

        return Source(sum(len(records(path)) for path in paths), (3, 32, 32), np.uint8, pieces)

    batches, test = (files_like(arguments.folder, f"{name}.bin") for name in ("data_batch_*", "test_batch"))
    if not batches or not test:
        raise InputError(f"{arguments.folder} must hold data_batch_*.bin and test_batch.bin (the binary version)")
    return {"train": source(batches), "test": source(test), "classes": CIFAR_CLASSES, "origin": "CIFAR-10"}


def folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Folders of images, one for each class, cut and scaled to squares of one size."""
    size = arguments.size
    if size < 1:
        raise InputError(f"-size must be 1 or more, got {size}")

    def source(chosen: Sequence[tuple[Path, int]]) -> Source:
        def pieces() -> Iterator[tuple[Array, Array]]:
            for path, label in chosen:
                yield images.pixels(path, size, arguments.grey)[None], np.array([label])

        return Source(len(chosen), (1 if arguments.grey else 3, size, size), np.uint8, pieces)

    found = images.image_folder(arguments.folder)
    passed_over, train = found.passed_over, found.files
    if arguments.test is not None:
        others = images.image_folder(arguments.test)
        if others.classes != found.classes:
            raise InputError(f"{arguments.test} must hold the same classes as {arguments.folder}")
        passed_over, test = [*passed_over, *others.passed_over], others.files
    else:
        train, test = ([found.files[i] for i in rows] for rows in cut(len(found.files), arguments))
    notes = untrained([label for _, label in train], found.classes)
    if passed_over:
        names = listed([path.name for path in passed_over])
        notes.append(f"passed over {len(passed_over)} files and folders that are no images of a class: {names}")
    return {
        "train": source(train), "test": source(test), "classes": found.classes,
        "origin": arguments.folder.resolve().name, "notes": notes,
    }  # fmt: skip


def arrays(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arrays that numpy has stored."""
    paths = arguments.files
    names = ("inputs", "labels", "test_inputs", "test_labels")
    if any(arguments.output.resolve() == path.resolve() for path in paths):
        raise InputError(f"{arguments.output} is one of the files to read: give another one by -o")
    loaded = [numpy_files.load(path, names) for path in paths]
    if len(paths) not in (1, 2) or any(("" in arrays) != (len(paths) == 2) for arrays in loaded):
        raise InputError("arrays must be one .npz file with inputs and labels, or two .npy files, inputs first")
    found = loaded[0] if len(paths) == 1 else {name: one[""] for name, one in zip(names, loaded, strict=False)}
    if {"inputs", "labels"} - set(found) or ("test_inputs" in found) != ("test_labels" in found):
        raise InputError(f"{paths[0]} must hold inputs and labels, and both test_inputs and test_labels or neither")
    kinds = ("", "test_" if "test_inputs" in found else "")
    numbers, classes, notes = numpy_files.classes_of(*((f"{t}labels", found[f"{t}labels"]) for t in kinds))
    inputs = [found[f"{t}inputs"] for t in kinds]
    for t, x, column in zip(kinds, inputs, numbers, strict=True):
        if len(column) != (x.shape or (0,))[0]:
            raise InputError(f"{t}inputs has the shape {x.shape}, but there are {len(column)} {t}labels")
    dtype = numpy_files.stored_type(" and ".join(dict.fromkeys(f"{t}inputs" for t in kinds)), *inputs)
    if dtype != inputs[0].dtype.newbyteorder("="):
        notes.append(f"inputs of {inputs[0].dtype} are stored as {dtype}; -maximum says what stands for 1")
    rows = [np.arange(len(column)) for column in numbers] if kinds[1] else cut(len(numbers[0]), arguments)
    train, test = (
        numpy_files.source(x, column, chosen, dtype, f"{t}inputs of {paths[0]}")
        for t, x, column, chosen in zip(kinds, inputs, numbers, rows, strict=True)
    )
    return {
        "train": train, "test": test, "classes": classes, "origin": paths[0].stem, "maximum": arguments.maximum,
        "notes": [*notes, *untrained(numbers[0][rows[0]], classes)],
    }  # fmt: skip


def untrained(labels: Any, classes: Sequence[str]) -> list[str]:
    """A note on the classes that no sample to train on is of, if there are any."""
    names = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    return [f"no sample to train on is of class {listed(names)}"] if names else []


def listed(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:LISTED]) + ", ..." * (len(names) > LISTED)


def cut(count: int, arguments: argparse.Namespace) -> tuple[Array, Array]:
    """Rows to train on and rows to test with, at random."""
    fraction = arguments.test_fraction
    test = round(count * fraction) if 0 < fraction < 1 else 0
    if not 0 < test < count:
        raise InputError(f"a test fraction of {fraction} of {count} samples leaves none on one side")
    if arguments.seed < 0:
        raise InputError(f"-seed must be 0 or more, got {arguments.seed}")
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
    pictures = kinds.add_parser("folder", parents=[shared, parted], help=folder.__doc__)
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("-test", type=Path, default=None, help="folder of the test images")
    pictures.add_argument("-size", type=int, default=32, help="width and height (32)")
    pictures.add_argument("-grey", action="store_true", help="one channel in the place of three")
    given = kinds.add_parser("arrays", parents=[shared, parted], help=arrays.__doc__)
    given.add_argument("files", type=Path, nargs="+")
    given.add_argument("-maximum", type=float, default=None, help="value that stands for 1 (255 for uint8, else 1)")
    arguments = parser.parse_args(words)
    try:
        if not arguments.output.resolve().parent.is_dir():
            raise InputError(f"cannot write {arguments.output}: there is no such folder")
        check_target(arguments.output)
        content = {"mnist": mnist, "cifar10": cifar10, "folder": folder, "arrays": arrays}[arguments.kind](arguments)
        notes = content.pop("notes", ())
        write(arguments.output, **content)
    except InputError as error:
        sys.exit("error: " + printable(" ".join(str(error).split())))
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    for note in notes:
        print(f"note: {printable(note)}")
    counts = f"{content['train'].count} samples, {content['test'].count} to test with"
    print(f"wrote {printable(arguments.output)}: {counts}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the half of a file is removed
    main()
