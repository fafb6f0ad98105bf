"""Make data to measure with of a data file of ddml: python data/synthetic.py KIND file.h5 ... -o other.h5.

enlarged   images or volumes of which each pixel has become -factor pixels along each axis: what they take can be
           measured on them, and no accuracy that larger images would have
solids     volumes (1, S, S, S) of images: each is made a solid, turned by up to 20 degrees about each axis, shifted,
           and seen in noise; -train, -held and -test say how many

Both are synthetic, and their origin in the file says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from ddml.data import files
from ddml.data.data_set import DataSet
from ddml.data.writing import Stream, write
from ddml.errors import InputError, printable
from ddml.regular import check_target

Array = NDArray[Any]
PARTS = {"train": "", "test": "test_", "held": "held_"}
SAID = {"train": "samples to train on", "test": "to test with", "held": "held out"}
ROWS = 64  # samples that are made at a time (our choice)

# Our choices of what solids are like, but for the angle and the noise, which are those of the facts' prototype
THICKNESS = 0.4  # of the side
ANGLE = 20.0  # degrees about each axis, at most
SHIFT = 0.1  # of the side along each axis, at most
NOISE = 0.5  # standard deviation, where the solid is 1 and the rest 0
RANGE = -1.5, 2.5  # that 0 to 255 stand for


def enlarged(dataset: DataSet, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each pixel repeated along each axis."""
    factor = arguments.factor
    if factor < 1 or len(dataset.shape) < 3:
        raise InputError(f"-factor must be 1 or more, got {factor}; samples images or volumes, got {dataset.shape}")
    shape = (dataset.shape[0], *(factor * side for side in dataset.shape[1:]))

    def stream(inputs: Array, labels: Array) -> Stream:
        def pieces() -> Iterator[tuple[Array, Array]]:
            for i in range(0, len(labels), ROWS):
                grown = inputs[i : i + ROWS]
                for axis in range(2, grown.ndim):
                    grown = grown.repeat(factor, axis)
                yield grown, labels[i : i + ROWS]

        return Stream(len(labels), shape, inputs.dtype, pieces)

    arrays = dataset.arrays()
    return {
        part: stream(arrays[f"{t}inputs"], arrays[f"{t}labels"]) for part, t in PARTS.items() if f"{t}inputs" in arrays
    }


def solids(dataset: DataSet, arguments: argparse.Namespace) -> dict[str, Any]:
    """Solids of the first images to train on, of those behind them, and of the first to test with."""
    if len(dataset.shape) != 3 or dataset.shape[0] != 1:
        raise InputError(f"solids are made of images (1, H, W), got {dataset.shape}")
    for name, least in (("side", 8), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise InputError(f"-{name} must be {least} or more, got {getattr(arguments, name)}")
    counts = {"train": arguments.train, "held": arguments.held, "test": arguments.test}
    kept = {
        "train": len(dataset.labels) - arguments.held,
        "held": len(dataset.labels),
        "test": len(dataset.test_labels),
    }
    for part, count in counts.items():
        if not (part != "held") <= count <= kept[part]:
            raise InputError(
                f"-{part} must be {int(part != 'held')} to {kept[part]}, the images that there are; got {count}"
            )
    rows = {
        "train": (dataset.inputs[: counts["train"]], dataset.labels[: counts["train"]]),
        "held": (
            dataset.inputs[counts["train"] :][: counts["held"]],
            dataset.labels[counts["train"] :][: counts["held"]],
        ),
        "test": (dataset.test_inputs[: counts["test"]], dataset.test_labels[: counts["test"]]),
    }
    return {
        part: _solids(*rows[part], dataset.maximum, arguments.side, np.random.default_rng([arguments.seed, i]))
        for i, part in enumerate(rows)
        if len(rows[part][1])
    }


def _solids(images: Array, labels: Array, maximum: float, side: int, rng: np.random.Generator) -> Stream:
    def pieces() -> Iterator[tuple[Array, Array]]:
        for i in range(0, len(labels), ROWS):
            made = [solid(image[0] / maximum, side, rng) for image in images[i : i + ROWS]]
            yield np.stack(made)[:, None], labels[i : i + ROWS]

    return Stream(len(labels), (1, side, side, side), np.uint8, pieces)


def solid(image: Array, side: int, rng: np.random.Generator) -> Array:
    """A solid (D, H, W) of an image (H, W) of values in [0, 1], as bytes."""
    scale = max(image.shape) / side  # pixels of the image in one of the solid
    middle = (side - 1) / 2
    turn = Rotation.from_euler("xyz", rng.uniform(-ANGLE, ANGLE, 3), degrees=True).as_matrix()
    at = middle - turn @ (middle + rng.uniform(-SHIFT, SHIFT, 3) * side)  # pixels (d, h, w) to those before the turn
    grid = np.indices((side,) * 3).reshape(3, -1)
    depth, *plane = turn @ grid + at[:, None] - middle  # of each pixel, seen from the middle of the solid
    centre = [(pixels - 1) / 2 for pixels in image.shape]
    found = map_coordinates(image, [scale * x + c for x, c in zip(plane, centre, strict=True)], order=1)
    found = np.where(np.abs(depth) <= THICKNESS * side / 2, found, 0.0)
    found += NOISE * rng.standard_normal(found.size)
    low, high = RANGE
    return np.clip(np.rint((found - low) * 255 / (high - low)), 0, 255).astype(np.uint8).reshape((side,) * 3)


def main(words: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("file", help="data file of images, or digits")
    shared.add_argument("-o", "--output", type=Path, required=True, help="data file to write")
    grown = kinds.add_parser("enlarged", parents=[shared], help=enlarged.__doc__)
    grown.add_argument("-factor", type=int, default=2, help="pixels along each axis for one (2)")
    made = kinds.add_parser("solids", parents=[shared], help=solids.__doc__)
    for part, count in (("train", 1200), ("held", 300), ("test", 600)):
        made.add_argument(f"-{part}", type=int, default=count, help=f"how many ({count})")
    made.add_argument("-side", type=int, default=32, help="pixels along each axis (32)")
    made.add_argument("-seed", type=int, default=0, help="of turns, shifts and noise")
    arguments = parser.parse_args(words)
    try:
        check_target(arguments.output)
        if Path(arguments.file).resolve() == arguments.output.resolve():
            raise InputError(f"{arguments.output} is the file to read: give another one by -o")
        dataset = files.load(arguments.file, MPI.COMM_SELF)
        streams = {"enlarged": enlarged, "solids": solids}[arguments.kind](dataset, arguments)
        origin = f"{dataset.origin}, {arguments.kind} (synthetic)"
        maximum = None if arguments.kind == "solids" else dataset.maximum
        write(arguments.output, **streams, classes=dataset.classes, origin=origin, maximum=maximum)
    except InputError as error:
        sys.exit("error: " + printable(" ".join(str(error).split())))
    print(f"wrote {printable(arguments.output)}: {', '.join(f'{s.count} {SAID[p]}' for p, s in streams.items())}")


if __name__ == "__main__":
    main()
