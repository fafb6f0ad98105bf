"""Turn official files into a data file of ddml: python data/prepare.py KIND ... -o file.h5.

mnist FOLDER      idx files: train-images-idx3-ubyte, train-labels-idx1-ubyte and those of t10k
cifar10 FOLDER    binary batches: data_batch_1.bin and so on, as many as there are, test_batch.bin
folder FOLDER     images (PNG, JPEG, PGM, ...), one folder for each class; needs Pillow
arrays FILE ...   one .npz or .h5 with inputs and labels, or two .npy; inputs (N, d), (N, C, H, W) or (N, C, D, H, W)
volumes TABLE     a file for each volume, scans (NIfTI; needs nibabel) or .npy; a table of them and their labels (csv)

All but images and .h5 may be compressed (gzip, bzip2, xz). data/README.md says what becomes of pixels, numbers and
labels. With -held_out 0.1, or a number, a third part is drawn of the samples to train on, from each class its share.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddml.data import arrays as numpy_files
from ddml.data import images, parting
from ddml.data import volumes as volume_files
from ddml.data.data_set import untrained
from ddml.data.parting import Part
from ddml.data.unpacking import SUFFIXES, Unpacked, check_unpacked, opened
from ddml.data.writing import Stream, write
from ddml.errors import InputError, printable
from ddml.regular import check_target

Array = NDArray[Any]
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LISTED = 5  # names that a note shows (our choice)
PIXELS = 1 << 30  # that a sample may be given (our choice)
CHANNELS = 4  # of images; more of them are likely the slices of a volume (our choice)


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
    train, test = (Part.of(x, y) for x, y in zip(found.values(), numbers, strict=True))
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

    def part(paths: Sequence[Path]) -> Part:
        found = np.concatenate([records(path) for path in paths])
        return Part.of(found[:, 1:].reshape(-1, 3, 32, 32), found[:, 0])

    batches, test = (files_like(arguments.folder, f"{name}.bin") for name in ("data_batch_*", "test_batch"))
    if not batches or not test:
        raise InputError(f"{arguments.folder} must hold data_batch_*.bin and test_batch.bin (the binary version)")
    return {"train": part(batches), "test": part(test), "classes": CIFAR_CLASSES, "origin": "CIFAR-10"}


def folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Folders of images, one for each class, cut and scaled to one size."""
    size = sides(arguments.size, "HW", 2)
    assert size is not None

    def part(chosen: Sequence[tuple[Path, int]]) -> Part:
        def stream(rows: Array) -> Stream:
            def pieces() -> Iterator[tuple[Array, Array]]:
                for row in rows:
                    path, label = chosen[row]
                    yield images.pixels(path, size, arguments.grey)[None], np.array([label])

            return Stream(len(rows), (1 if arguments.grey else 3, *size), np.uint8, pieces)

        return Part(np.array([label for _, label in chosen]), stream)

    found = images.image_folder(arguments.folder, arguments.without)
    passed_over, train = found.passed_over, found.files
    if arguments.test is not None:
        others = images.image_folder(arguments.test, arguments.without)
        if others.classes != found.classes:
            raise InputError(f"{arguments.test} must hold the same classes as {arguments.folder}")
        passed_over, test = [*passed_over, *others.passed_over], others.files
    else:
        rows = parting.cut(len(train), arguments.test_fraction, arguments.seed)
        train, test = ([found.files[i] for i in some] for some in rows)
    notes = []
    if passed_over:
        names = listed([path.name for path in passed_over])
        notes.append(f"passed over {len(passed_over)} files and folders that are no images of a class: {names}")
    return {
        "train": part(train), "test": part(test), "classes": found.classes,
        "origin": arguments.folder.resolve().name, "notes": notes,
    }  # fmt: skip


def arrays(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arrays that numpy or HDF5 has stored."""
    paths = arguments.files
    names = ("inputs", "labels", "test_inputs", "test_labels")
    if any(arguments.output.resolve() == path.resolve() for path in paths):
        raise InputError(f"{arguments.output} is one of the files to read: give another one by -o")
    loaded = [numpy_files.load(path, names) for path in paths]
    if len(paths) not in (1, 2) or any(("" in arrays) != (len(paths) == 2) for arrays in loaded):
        raise InputError(
            "arrays must be one .npz file or one of HDF5 with inputs and labels, or two .npy files, inputs first"
        )
    found = loaded[0] if len(paths) == 1 else {name: one[""] for name, one in zip(names, loaded, strict=False)}
    if {"inputs", "labels"} - set(found) or ("test_inputs" in found) != ("test_labels" in found):
        raise InputError(f"{paths[0]} must hold inputs and labels, and both test_inputs and test_labels or neither")
    kinds = ("", "test_" if "test_inputs" in found else "")
    numbers, classes, notes = numpy_files.classes_of(*((f"{t}labels", found[f"{t}labels"]) for t in kinds))
    inputs = [found[f"{t}inputs"] for t in kinds]
    if arguments.add_channel:
        if any(x.ndim not in (3, 4) for x in inputs):
            raise InputError(f"-add_channel is for inputs (N, H, W) or (N, D, H, W), got {inputs[0].shape}")
        inputs = [x[:, None] for x in inputs]
    elif inputs[0].ndim == 4 and inputs[0].shape[1] > CHANNELS:
        notes.append(f"inputs are images of {inputs[0].shape[1]} channels; -add_channel makes volumes of them")
    for t, x, column in zip(kinds, inputs, numbers, strict=True):
        if len(column) != (x.shape or (0,))[0]:
            raise InputError(f"{t}inputs has the shape {x.shape}, but there are {len(column)} {t}labels")
    dtype = numpy_files.stored_type(" and ".join(dict.fromkeys(f"{t}inputs" for t in kinds)), *inputs)
    if dtype != inputs[0].dtype.newbyteorder("="):
        notes.append(f"inputs of {inputs[0].dtype} are stored as {dtype}; -maximum says what stands for 1")
    rows = [np.arange(len(column)) for column in numbers]
    if not kinds[1]:
        rows = list(parting.cut(len(numbers[0]), arguments.test_fraction, arguments.seed))

    def part(t: str, x: Array, column: Array, mine: Array) -> Part:
        what = f"{t}inputs of {paths[0]}"
        return Part(column[mine], lambda some: numpy_files.source(x, column, mine[some], dtype, what))

    train, test = map(part, kinds, inputs, numbers, rows)
    return {
        "train": train, "test": test, "classes": classes, "origin": paths[0].stem, "maximum": arguments.maximum,
        "notes": notes,
    }  # fmt: skip


def volumes(arguments: argparse.Namespace) -> dict[str, Any]:
    """A file for each volume, and a table of their labels."""
    size = sides(arguments.size, "HWD", 3)
    size = size and (size[2], *size[:2])
    paths, words = volume_files.table(arguments.table)
    if any(arguments.output.resolve() == path.resolve() for path in (arguments.table, *paths)):
        raise InputError(f"{arguments.output} is one of the files to read: give another one by -o")
    words = words.astype(int) if all(re.fullmatch("-?[0-9]{1,18}", word) for word in words) else words
    (numbers,), classes, notes = numpy_files.classes_of(("label", words))
    first = volume_files.volume(paths[0])
    shape = (len(first), *size) if size else first.shape
    dtype = np.dtype(np.float32) if size else first.dtype

    def read(path: Path) -> Array:
        found = volume_files.volume(path)
        if size and len(found) == len(first):
            return volume_files.resized(found, size)
        if (found.shape, found.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"volume {path} is {found.dtype} {found.shape}, and {paths[0]} {first.dtype} {first.shape}: they must "
                "have one type and one size; -size HxWxD gives them one"
            )
        return found

    def part(mine: Array) -> Part:
        def stream(rows: Array) -> Stream:
            return Stream(
                len(rows), shape, dtype, lambda: ((read(paths[i])[None], numbers[i : i + 1]) for i in mine[rows])
            )

        return Part(numbers[mine], stream)

    train, test = map(part, parting.cut(len(paths), arguments.test_fraction, arguments.seed))
    return {
        "train": train, "test": test, "classes": classes, "origin": arguments.table.stem,
        "maximum": arguments.maximum, "notes": notes,
    }  # fmt: skip


def sides(text: str | None, axes: str, count: int) -> tuple[int, ...] | None:
    """Pixels along each axis, of one number or of one for each as in 96x84."""
    if text is None:
        return None
    words = text.split("x")
    found = [int(word) if re.fullmatch("[0-9]{1,5}", word) else 0 for word in words] * (count if len(words) == 1 else 1)
    if len(found) != count or not 0 < math.prod(found) <= PIXELS:
        raise InputError(f"-size must be 1 or more, one number or {'x'.join(axes)}, of {PIXELS} in all; got {text}")
    return tuple(found)


def listed(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:LISTED]) + ", ..." * (len(names) > LISTED)


def parted(content: dict[str, Any], held: str | None, seed: int) -> dict[str, Any]:
    """What is to be written, and notes, of what there is."""
    train, classes = content["train"], content["classes"]
    rows, notes = np.arange(len(train.labels)), list(content.pop("notes", ()))
    if held is not None:
        rows, others = parting.held_out(train.labels, held, classes, seed)
        content["held"] = train.stream(others)
    missing = untrained(train.labels[rows], classes)
    if missing:
        notes.append(f"no sample to train on is of class {listed(missing)}")
    test = content["test"]
    streams = {"train": train.stream(rows), "test": test.stream(np.arange(len(test.labels)))}
    return {**content, **streams, "notes": notes}


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-o", "--output", type=Path, required=True, help="data file to write")
    shared.add_argument("-held_out", default=None, help="share, or number, of samples held out of the training")
    shared.add_argument("-seed", type=int, default=0, help="of the choice of those, and of those for the test")
    parts = argparse.ArgumentParser(add_help=False)
    parts.add_argument("-test_fraction", type=float, default=0.2, help="samples that are kept for the test (0.2)")
    for make in (mnist, cifar10):
        kinds.add_parser(make.__name__, parents=[shared], help=make.__doc__).add_argument("folder", type=Path)
    pictures = kinds.add_parser("folder", parents=[shared, parts], help=folder.__doc__)
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("-test", type=Path, default=None, help="folder of the test images")
    pictures.add_argument("-size", default="32", help="height and width: one number, or HxW (32)")
    pictures.add_argument("-without", default=None, help="files to leave out, by a pattern of their names")
    pictures.add_argument("-grey", action="store_true", help="one channel in the place of three")
    given = kinds.add_parser("arrays", parents=[shared, parts], help=arrays.__doc__)
    given.add_argument("files", type=Path, nargs="+")
    given.add_argument("-add_channel", action="store_true", help="inputs are (N, H, W) or (N, D, H, W)")
    scans = kinds.add_parser("volumes", parents=[shared, parts], help=volumes.__doc__)
    scans.add_argument("table", type=Path, help="csv with the columns file and label")
    scans.add_argument("-size", default=None, help="size to give to all: one number, or HxWxD")
    for numbers in (given, scans):
        numbers.add_argument("-maximum", type=float, default=None, help="value that stands for 1 (255, of floats 1)")
    arguments = parser.parse_args(words)
    try:
        if not arguments.output.resolve().parent.is_dir():
            raise InputError(f"cannot write {arguments.output}: there is no such folder")
        check_target(arguments.output)
        if arguments.seed < 0:
            raise InputError(f"-seed must be 0 or more, got {arguments.seed}")
        makers = {make.__name__: make for make in (mnist, cifar10, folder, arrays, volumes)}
        content = parted(makers[arguments.kind](arguments), arguments.held_out, arguments.seed)
        notes = content.pop("notes")
        write(arguments.output, **content)
    except InputError as error:
        sys.exit("error: " + printable(" ".join(str(error).split())))
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    for note in notes:
        print(f"note: {printable(note)}")
    counts = f"{content['train'].count} samples, {content['test'].count} to test with"
    if "held" in content:
        counts += f", {content['held'].count} held out"
    print(f"wrote {printable(arguments.output)}: {counts}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the half of a file is removed
    main()
