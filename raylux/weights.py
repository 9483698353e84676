"""The safetensors files of a model folder: which of them are read, and a hash of every tensor, without torch.

A safetensors file is 8 bytes (length of the header, little endian), a JSON header (name -> dtype, shape and
data_offsets, counted from the header's end), and the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylux.errors import UserError
from raylux.hashing import Hashes, cached
from raylux.markup import parse_json
from raylux.sources import read_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BLOCK = 1 << 22
# As the safetensors library itself bounds it.
_HEADER_LIMIT = 100_000_000
_THREADS = 4


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: where its bytes begin and end, counted from the file's first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a model folder: one, or the shards of the index.

    Raises:
        UserError: there is none, a shard is missing, or the index names a file that is not one of the folder's own.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in _shards(index)]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{folder}: no *.safetensors weights there")
    return found


def check_indexes(folder: Path) -> None:
    """Refuse a folder whose index files name anything but safetensors files that lie in it."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _shards(index)


def tensor_hashes(folder: Path) -> Hashes:
    """BLAKE2b of every tensor's name, dtype, shape and bytes: name -> 16 hexadecimal digits.

    Raises:
        UserError: a file is missing or no safetensors file, or two of them hold a tensor of the same name.
    """
    result: Hashes = {}
    for path in weight_files(folder):
        found = cached(path, "tensors", _hash_tensors)
        twice = sorted(result.keys() & found.keys())
        if twice:
            raise UserError(f"{path}: holds the tensor '{twice[0]}', and so does another file of the folder")
        result |= found
    return dict(sorted(result.items()))


def _shards(index: Path) -> list[str]:
    data = parse_json(read_text(str(index)), str(index))
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: not an index of safetensors files (its 'weight_map' names no file for each tensor)")
    names = sorted(set(places.values()))
    for name in names:
        # A file name and nothing else: an index that comes with a model may not reach for other files here.
        if name != os.path.basename(name) or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {name!r}; an index may name safetensors files of its own folder only")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is not there; bring the model's files again")
    return names


def _hash_tensors(path: Path) -> Hashes:
    tensors = read_header(path)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run meanwhile
        return dict(pool.map(lambda tensor: (tensor.name, _hash(path, tensor)), tensors))


def _hash(path: Path, tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode(), digest_size=8)
    buffer = memoryview(bytearray(min(_BLOCK, max(1, tensor.stop - tensor.start))))
    with path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise UserError(f"{path}: ends within the tensor '{tensor.name}'; bring the file again")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file: name, dtype, shape, first byte and the byte after the last.

    Raises:
        UserError: it is no safetensors file, or a cut one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise _broken(path, "its header is longer than the file")
        head = file.read(length)
    try:
        header = parse_json(head.decode(), f"{path}: a safetensors file is broken: its header")
        tensors = [_tensor(name, facts, 8 + length) for name, facts in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(path, "its header is not one") from None
    for tensor in tensors:
        if not 8 + length <= tensor.start <= tensor.stop <= size:
            raise _broken(path, f"the bytes of '{tensor.name}' are not in the file")
    return tensors


def _tensor(name: str, facts: dict[str, Any], base: int) -> Tensor:
    start, stop = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise ValueError
    return Tensor(name, str(facts["dtype"]), shape, base + start, base + stop)


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path}: a safetensors file is broken ({why}); bring the model's files again")
