"""What an HDF5 file of others holds, found out in a process of its own; `ddml.hdf5` starts it.

Damaged bytes make HDF5 crash, loop or take all memory, so limits are set here for this process alone. The file is
opened first; from then on nothing else can be opened and nothing written, whatever its links or its external storage
say. Those are refused as well, as is what `ddml.hdf5` lists. The answer goes to the standard output; where there is
none, a line on the standard error says why.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import mpi4py

mpi4py.rc.initialize = False  # a parallel HDF5 loads MPI

import h5py  # noqa: E402

DEPTH = 64  # groups inside each other (our choice)
FILTERS = frozenset((h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF))
SIMPLE = {h5py.h5z.FILTER_DEFLATE: "gzip", h5py.h5z.FILTER_SHUFFLE: "shuffle"}  # that ddml.blocks undoes
LISTED = 1024  # chunks whose places are told: to find one takes a look at all of them (measured, our choice)
PIECE = 16 << 20  # bytes that are passed on at a time (our choice)


class Refused(Exception):
    """What a file must not hold."""


def limit(seconds: int, room: int) -> None:
    """Let this process have so many seconds of a processor, so many further bytes, and no core dump."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the program that waits for this one decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    at_most(resource.RLIMIT_CPU, seconds, seconds + 1)  # SIGXCPU, not SIGKILL
    if os.path.exists("/proc/self/statm"):  # Linux
        with open("/proc/self/statm") as file:
            room += int(file.read().split()[0]) * resource.getpagesize()
        at_most(resource.RLIMIT_AS, room, room)


def at_most(kind: int, soft: int, hard: int) -> None:
    """Set limits where there are none that are lower: those cannot be raised, and serve as well."""
    pairs = zip(resource.getrlimit(kind), (soft, hard), strict=True)
    first, second = (new if old == resource.RLIM_INFINITY else min(old, new) for old, new in pairs)
    resource.setrlimit(kind, (first, second))


def shut() -> None:
    """Let this process open no further file, and write none."""
    for name in ("ascii", "utf-8"):  # which Python loads when they are needed
        codecs.lookup(name)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


class Reader:
    """Looks at groups and datasets, each once, and adds up what they say that they store."""

    def __init__(self, size: int, free: int, ratio: int, shifted: bool) -> None:
        self.size, self.free, self.ratio = size, free, ratio
        self.shifted = shifted  # what others keep in front of it some versions of HDF5 leave out of places of chunks
        self.seen: set[int] = set()
        self.stored = self.characters = 0

    def group(self, group: Any, names: list[str], optional: list[str], where: str, depth: int = 0) -> dict[str, Any]:
        """The members of these names of a group, all of them where there are none, and its attributes."""
        if depth > DEPTH:
            raise Refused(f"{where} stands inside more than {DEPTH} groups")
        members = {}
        self.once(group.id, where.rstrip("/") or "its root")
        for name in [*names, *optional] or list(group):
            here, key = f"{where}{name}", name.encode(errors="surrogateescape")
            if not group.id.links.exists(key):
                if name in optional:
                    continue
                raise Refused(f"it has no {here}")
            if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise Refused(f"{here} is a link to something else")
            found = h5py.h5o.open(group.id, key)
            if isinstance(found, h5py.h5g.GroupID):
                members[name] = self.group(h5py.Group(found), [], [], f"{here}/", depth + 1)
            elif isinstance(found, h5py.h5d.DatasetID):
                members[name] = self.dataset(found, here)
            else:
                raise Refused(f"{here} is neither a group nor a dataset")
        return {"members": members, "attributes": self.attributes(group)}

    def once(self, found: Any, where: str) -> None:
        """Refuse an object that was there before: links may go in circles."""
        address = h5py.h5o.get_info(found).addr
        if address in self.seen:
            raise Refused(f"{where} stands there twice")
        self.seen.add(address)

    def dataset(self, found: Any, where: str) -> dict[str, Any]:
        """Shape, type and place of a dataset; the values of texts."""
        self.once(found, where)
        plan, space = found.get_create_plist(), found.get_space()
        layout = plan.get_layout()
        if layout == h5py.h5d.VIRTUAL or plan.get_external_count():
            raise Refused(f"{where} has its values in another file")
        made = h5py.Dataset(found)
        if space.get_simple_extent_type() == h5py.h5s.NULL:
            return {"shape": None, "type": "<f8", "attributes": self.attributes(made)}
        shape, kind, stored = space.get_simple_extent_dims(), found.dtype, found.get_storage_size()
        text = h5py.check_string_dtype(kind) is not None
        if not text and kind.kind not in "biufc":
            raise Refused(f"{where} holds neither numbers nor texts")
        declared, allowed = math.prod(shape) * found.get_type().get_size(), stored
        if layout == h5py.h5d.CHUNKED:
            declared, allowed = self.chunks(found, plan, shape, stored, where), self.free + self.ratio * stored
        if declared > allowed:
            raise Refused(f"{where} is to have {declared} bytes, of which {stored} are stored")
        place = found.get_offset() if layout == h5py.h5d.CONTIGUOUS and stored else None
        self.stored += stored
        if self.stored > self.size or (place or 0) + stored > self.size:
            raise Refused(f"what it is to hold up to {where} is more than its {self.size} bytes")
        answer: dict[str, Any] = {"shape": shape, "type": "text" if text else kind.str}
        if text:
            answer["texts"] = [self.text(t) for t in made[()].ravel()] if shape else self.text(made[()])
        else:
            native = h5py.h5t.py_create(kind).equal(found.get_type())
            if layout != h5py.h5d.CONTIGUOUS or not native:
                answer["packed"] = True
            if layout == h5py.h5d.CHUNKED and native:
                answer |= self.places(found, plan, where)
        return {**answer, "offset": place, "attributes": self.attributes(made)}

    def chunks(self, found: Any, plan: Any, shape: tuple[int, ...], stored: int, where: str) -> int:
        """The bytes that all chunks of a dataset are to have; they are there, and can be read with HDF5 alone."""
        filters = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())}
        if not filters <= FILTERS:
            raise Refused(f"{where} is compressed with other filters than gzip, lzf, shuffle and fletcher32")
        count = math.prod(-(-size // chunk) for size, chunk in zip(shape, plan.get_chunk(), strict=True))
        if stored < count or found.get_num_chunks() != count:  # a chunk has a byte, at least
            raise Refused(f"{where} has {count} parts, which are not all stored")
        return count * math.prod(plan.get_chunk()) * int(found.get_type().get_size())

    def places(self, found: Any, plan: Any, where: str) -> dict[str, Any]:
        """Where the chunks of a dataset are, in their order; nothing where they are many, or HDF5 must unpack them."""
        count, filters = found.get_num_chunks(), [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
        if self.shifted or count > LISTED or not set(filters) <= set(SIMPLE):
            return {}
        chunks = sorted((found.get_chunk_info(i) for i in range(count)), key=lambda chunk: chunk.chunk_offset)
        shape = plan.get_chunk()
        size = math.prod(shape) * int(found.get_type().get_size())
        if any(chunk.filter_mask for chunk in chunks):  # of some that are not filtered
            return {}
        if any(c.byte_offset + c.size > self.size or (not filters and c.size != size) for c in chunks):
            raise Refused(f"parts of {where} are not where they should be")
        places, sizes = ([getattr(c, name) for c in chunks] for name in ("byte_offset", "size"))
        names = [SIMPLE[f] for f in filters]
        return {"chunks": {"shape": shape, "places": places, "sizes": sizes, "filters": names}}

    def text(self, value: bytes | str) -> str:
        """A text that is stored, of those that are together no longer than the file."""
        self.characters += len(value)
        if self.characters > self.size:
            raise Refused(f"its texts are longer than its {self.size} bytes")
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def attributes(self, of: Any) -> dict[str, Any]:
        """The attributes that are numbers or texts, single or in a row; nothing needs the others."""
        found = {}
        for name in of.attrs:
            attribute = of.attrs.get_id(name)
            kind, shape = attribute.dtype, attribute.shape
            text = h5py.check_string_dtype(kind) is not None
            if shape is None or len(shape) > 1 or not (text or kind.kind in "biuf"):
                continue
            if math.prod(shape) * kind.itemsize > self.size:
                raise Refused(f"its attribute {name} is larger than its {self.size} bytes")
            value = of.attrs[name]
            if text:
                found[name] = [self.text(t) for t in value] if shape else self.text(value)
            else:
                found[name] = value.tolist() if kind.itemsize <= 8 else value.astype(float).tolist()
        return found


def values(dataset: Any, part: list[list[int]]) -> Iterator[bytes]:
    """A part of the values of a dataset, a range along each axis, in the order of its rows, whole chunks at a time."""
    many = max(PIECE // max(dataset.dtype.itemsize * math.prod(dataset.shape[1:]), 1), 1)
    if dataset.chunks:
        many = -(-many // dataset.chunks[0]) * dataset.chunks[0]
    (first, end), *rest = part
    begins = [first, *range((first // many + 1) * many, end, many), end]
    for begin, behind in itertools.pairwise(begins):
        yield dataset[(slice(begin, behind), *(slice(*r) for r in rest))].tobytes()


def answers(
    descriptor: int, names: list[str], seconds: int, room: int, free: int, ratio: int,
    optional: list[str] | None = None, part: list[list[int]] | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """What is to be written: the outline of a file that is open here, or a part of the one dataset that is named."""
    limit(seconds, room)
    # without a name, which HDF5 would look for: another file may be there by now
    with open(f"/dev/fd/{descriptor}", "rb", buffering=0) as given, h5py.File(given, "r") as file:
        shut()
        reader = Reader(os.fstat(descriptor).st_size, free, ratio, file.userblock_size > 0)
        found = reader.group(file, names, optional or [], "")
        yield from values(file[names[0]], part) if part else (json.dumps(found).encode(),)


def main() -> None:
    """Answer what the first argument asks for."""
    code = 0
    try:
        for piece in answers(**json.loads(sys.argv[1])):
            sys.stdout.buffer.write(piece)
        sys.stdout.flush()
    except Exception as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = "it asks for more memory than its size justifies" if isinstance(error, MemoryError) else str(said)
        sys.stderr.write(" ".join(text.split()) or type(error).__name__)
        sys.stderr.flush()
        code = 1
    os._exit(code)  # HDF5 may crash where it closes what is damaged


if __name__ == "__main__":
    main()
