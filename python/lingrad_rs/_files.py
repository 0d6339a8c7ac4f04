"""Files of arrays: only what is asked for is read, nothing is believed that a header claims, files are written whole.

The safetensors format: the length of a header in 8 bytes, the header (JSON: of each tensor its dtype, shape and place),
then the tensors, one after the other.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import secrets
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import _check
from .errors import ArgumentError, DtypeError

__all__ = [
    "SafeTensors",
    "check_output",
    "path_text",
    "read_npz",
    "seekable",
    "standard_input",
    "whole_file",
    "write_safetensors",
]

Array = NDArray[Any]

_LONGEST_HEADER = 100_000_000  # bytes; what the format allows
_KEPT_NAME = "__metadata__"
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32
    "C64": "<c8",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as text; an error for what is none, such as the number of an open file."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise ArgumentError(f"path is a {type(path).__name__}; expected text or a path") from None
    if "\0" in text:
        raise ArgumentError(f"path is {text!r}; expected one without a null character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ArgumentError(f"path is {text!r}; expected text that a file can be named by") from None
    return text


@contextmanager
def seekable(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """A file to read, with its name; ``-`` is standard input, which is read whole, as any pipe is."""
    if str(path) == "-":
        yield io.BytesIO(standard_input().read()), "standard input"
        return
    with path.open("rb") as file:
        yield (file if file.seekable() else io.BytesIO(file.read())), str(path)


def standard_input() -> BinaryIO:
    """Standard input, as bytes."""
    if sys.stdin is None:
        raise ArgumentError("- is standard input, which is closed; expected the name of a file")
    return sys.stdin.buffer


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name once it is whole, and of which nothing is left after an error.

    What is no regular file (a pipe, a device) is written as it is.
    """
    target = _target(path)
    if target is None:
        with open(path, "wb") as file:
            yield file
        return
    temporary = _temporary(target, path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        with suppress(OSError):  # some file systems do not, and the file is whole all the same
            _sync_folder(target.parent)


def check_output(option: str, path: Path) -> None:
    """An error, before anything is computed, where `whole_file` could not write."""
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{option} {path}: there is no directory {path.absolute().parent}")
    try:
        if (target := _target(path)) is not None:
            _temporary(target, path).unlink()
    except OSError as error:
        raise ArgumentError(f"{option} {path} cannot be written: {error.strerror}") from error


def _target(path: str | os.PathLike[str]) -> Path | None:
    """The regular file that is to be replaced or made, None for what is no regular file; an OSError for a folder."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not target.exists():
        return target
    if not target.is_file():
        return None
    if not os.access(target, os.W_OK):  # which a rename would not ask
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    return target


def _temporary(target: Path, path: str | os.PathLike[str]) -> Path:
    """A new, empty file in the same folder, with the mode of new files."""
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.open("xb").close()
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    """Until a folder's entries are on the disk too, a power cut may undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Writes arrays of float32 and float64 by name, with texts by name beside them."""
    for name in arrays:
        if not isinstance(name, str):
            raise ArgumentError(f"an array is named {_check.shown(name)}; expected text")
        if name == _KEPT_NAME:
            raise ArgumentError(f"an array is named {name!r}, which the format keeps for itself; expected another name")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ArgumentError(f"an array is named {name!r}; expected text that UTF-8 can hold") from None
    # As other libraries write them: numbers of more bytes first, so that each lies at a multiple of its size.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {_KEPT_NAME: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        x = arrays[name]
        start, end = end, end + x.nbytes
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            little = arrays[name].astype(arrays[name].dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)


@dataclass(frozen=True)
class _Place:
    """A tensor's dtype in the format's words, its shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafeTensors:
    """What a safetensors file holds: names and shapes once it is open, numbers where they are asked for.

    Parameters
    ----------
    file : file
        Open for reading bytes, and for seeking; it must stay open.
    name : str
        What messages call it.

    Raises
    ------
    ArgumentError
        It is no such file, or holds less than its header claims.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._file = file
        try:
            self.metadata, self._places = _header(file)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"{name} cannot be read as safetensors: {error}") from error

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by name."""
        return {name: place.shape for name, place in self._places.items()}

    def read(self, names: Iterable[str]) -> dict[str, Array]:
        """Those tensors; bfloat16 is widened to float32, which holds each of its numbers.

        Raises
        ------
        ArgumentError
            One is missing.
        DtypeError
            One is of a dtype that NumPy does not have.
        """
        names = list(names)
        for name in names:
            if name not in self._places:
                raise ArgumentError(
                    f"{self.name} lacks an array {name!r}; it holds {', '.join(self._places) or 'none'}"
                )
        return {name: self._read(name, self._places[name]) for name in names}

    def _read(self, name: str, place: _Place) -> Array:
        if place.dtype not in _DTYPES:
            raise DtypeError(
                f"{name} in {self.name} has dtype {place.dtype}, which NumPy does not have; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        stored = np.empty(place.shape, _DTYPES[place.dtype])
        self._file.seek(place.start)
        if self._file.readinto(stored.reshape(-1).view(np.uint8).data) != place.nbytes:  # type: ignore[attr-defined]
            raise ArgumentError(f"{self.name} has become shorter while it was read")
        if place.dtype == "BF16":
            wide = stored.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _header(file: BinaryIO) -> tuple[dict[str, str], dict[str, _Place]]:
    """The metadata and the places of tensors; a ValueError for anything that the format does not allow."""
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if total < 8 or length > min(total - 8, _LONGEST_HEADER):
        raise ValueError(f"it has {total} bytes, of which a header would take {length}")
    header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}; expected an object")
    metadata = header.pop(_KEPT_NAME, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"its {_KEPT_NAME} is no object of texts")
    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(f"{name!r} begins at {start}; expected {end}, where the tensor before it ends")
        end = stop
    if end != total - 8 - length:
        raise ValueError(f"its tensors would take {end} bytes, and it holds {total - 8 - length}")
    places = {name: _Place(dtype, shape, 8 + length + i, j - i) for name, (dtype, shape, i, j) in spans.items()}
    return metadata, places


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _span(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, and the offsets of the first byte and of that after the last."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name!r} lacks a dtype, a shape, or two data_offsets") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(x) is int and 0 <= x < 2**63 for x in numbers) or start > stop:
        raise ValueError(f"{name!r} has dtype {dtype!r}, shape {shape!r} and offsets {start!r}, {stop!r}")
    if dtype in _DTYPES:
        size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if size != stop - start:
            raise ValueError(f"{name!r} of shape {tuple(shape)} in {dtype} would take {size} bytes, not {stop - start}")
        if len(shape) > 32 or math.prod(max(x, 1) for x in shape) >= 2**60:  # what NumPy can hold
            raise ValueError(f"{name!r} has the shape {tuple(shape)}, which no array can have")
    return dtype, tuple(shape), start, stop


def read_npz(file: BinaryIO, name: str, names: Iterable[str]) -> tuple[dict[str, Array], list[str]]:
    """Those arrays of an .npz file that are there, and the names of all that it holds.

    Raises
    ------
    ArgumentError
        It is no such file, or an array holds less than its header claims.
    """
    if not zipfile.is_zipfile(file):
        raise ArgumentError(f"{name} cannot be read as .npz: it is not an archive")
    total, arrays = file.seek(0, os.SEEK_END), {}
    try:
        with zipfile.ZipFile(file) as archive:
            held = [member.removesuffix(".npy") for member in archive.namelist()]
            for array in names:
                if array in held:
                    arrays[array] = _read_npy(archive, archive.getinfo(f"{array}.npy"), total)
    # RuntimeError: an encrypted member.
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ArgumentError(f"{name} cannot be read as .npz: {error}") from error
    return arrays, held


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, total: int) -> Array:
    """An array of an archive of so many bytes; memory is taken for bytes that are there."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed in a way that NumPy does not write")
    if member.compress_size > total:
        raise ValueError(f"{member.filename} would take {member.compress_size} bytes of the {total} of the file")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} is of version {version}; expected (1, 0) or (2, 0), for numbers")
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        try:
            shape, fortran_order, dtype = read_header(file)
        except Exception as error:  # of whatever kind Python's own parser raises
            raise ValueError(f"{member.filename} has a header that cannot be read: {error}") from error
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python's objects; expected numbers")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > member.file_size:
            raise ValueError(f"{member.filename} has the shape {shape} in {dtype}, and {member.file_size} bytes")
        data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{member.filename} of shape {shape} in {dtype} has {len(data)} bytes; expected {size}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
