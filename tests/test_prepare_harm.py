"""data/prepare.py with files made to harm, and with outputs that are no files."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from test_prepare import ZEROS, X, Y, made, prepare, refused

from ddml.data import writing
from ddml.errors import InputError


def test_batches_that_unpack_without_an_end_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(6 * ZEROS)
    line = refused(capsys, tmp_path / "a.h5", "cifar10", tmp_path)
    assert "data_batch_1.bin: its 391" in line and "bytes unpack to" in line


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "link to a device"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "a.npz", inputs=X, labels=Y)
    target, device = tmp_path / "a.h5", tmp_path / "full"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("makes a device node")
    {
        "folder": os.mkdir,
        "fifo": os.mkfifo,
        "device": device.rename,
        "link to a device": lambda p: p.symlink_to(device),
    }[kind](target)
    before = target.stat()
    with pytest.raises(SystemExit, match=r"error: cannot write .*a.h5: what is there is no regular file"):
        prepare.main(["arrays", str(tmp_path / "a.npz"), "-o", str(target)])
    source = writing.Stream.of(X, Y)
    with pytest.raises(InputError, match="no regular file"):
        writing.write(target, source, source, ["a", "b"], "")
    assert (target.stat().st_mode, target.stat().st_ino) == (before.st_mode, before.st_ino)


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=X, labels=Y)
    with pytest.raises(SystemExit, match=r"error: cannot write .*File name too long"):
        prepare.main(["arrays", str(tmp_path / "a.npz"), "-o", str(tmp_path / f"{'a' * 300}.h5")])


def test_names_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[31m\u202e"
    folder.mkdir()
    labels = np.array(["\x1b]0;title\x07", "b\x9b2J"] * 5)
    np.savez(folder / "a.npz", inputs=X, labels=labels)
    assert made(folder / "a.h5", "arrays", folder / "a.npz").classes == tuple(sorted(set(labels)))
    np.savez(folder / "a.npz", inputs=X[:2], labels=labels)
    said = capsys.readouterr().out + refused(capsys, folder / "b.h5", "arrays", folder / "a.npz")
    assert said.replace("\n", "").isprintable()
    assert r"\x1b]0;title\x07" in said and r"a\x1b[31m\u202e" in said
