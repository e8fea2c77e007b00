"""One safetensors file for one value: tensors by name, the rest as JSON in its metadata, and a checksum of both.

A file is written under another name in the same folder, forced to the disk, and renamed: under its own name there is
the old file or the new one, whole, whatever happens in between.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvlin_nn.errors import StorageError
from curvlin_nn.storage import plain

VERSION = 1
"""Of what is written; what is read may be older."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""

StrPath = str | os.PathLike[str]


def write(path: StrPath, kind: str, value: Any) -> None:
    """Put a value into a file, whole or not at all.

    Args:
        path: of the file, in a folder that exists; what is there is replaced.
        kind: what the value is.
        value: tensors and plain values in lists and dicts.

    Raises:
        StorageError: if it cannot be written; what was there stays, and nothing else is left.
        UnsupportedError: for a value that no file holds, before anything is written.
    """
    content, tensors = plain.split(value)
    text = json.dumps(content)
    # The largest numbers first, so that all lie in the file where processors like them.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in order}
    metadata = {
        "kind": kind,
        "version": str(VERSION),
        "content": text,
        "sha256": _checksum(kind, str(VERSION), text, tensors),
    }
    target = Path(path)
    beside = _beside(target)
    try:
        _write_safetensors(beside, tensors, metadata)
        os.replace(beside, target)
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written ({error.strerror or error}), what was there is as before; give a path in a "
            "folder that exists, is writable and has room"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    with suppress(OSError):  # where folders cannot be opened, renaming is as lasting as it gets
        _force_folder(target.parent)


def read(path: StrPath, kind: str) -> Any:
    """What `write` put into a file, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        StorageError: if it is damaged, of another kind, or of a later version.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}; give the path that was written")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{path} is no whole safetensors file ({reason}); restore a copy") from error
    if metadata.get("kind") != kind:
        raise StorageError(f"{path} holds {metadata.get('kind', 'other tensors')!r}, expected {kind!r}")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise StorageError(
            f"{path} is of version {version!r}, expected at most {VERSION}; upgrade curvlin to read it"
        )
    text = metadata.get("content", "")
    if metadata.get("sha256") != _checksum(kind, version, text, tensors):
        raise StorageError(f"{path} was changed after it was written: its checksum differs; restore a copy")
    return plain.joined(json.loads(text), tensors)


def remove(path: StrPath) -> None:
    """Remove a file, and what a process that was killed while writing it may have left beside it."""
    for file in (Path(path), _beside(Path(path))):
        file.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """The name that a file has while it is written: always the same, so that nothing piles up."""
    return path.with_name(f"{path.name}.tmp")


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Tensor by tensor, and onto the disk; the library would copy all of them into one string first.

    See https://huggingface.co/docs/safetensors for the format: the length of the header, the header, the numbers.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(_numbers(tensor))
        file.flush()
        os.fsync(file.fileno())


def _force_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(kind: str, version: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{kind} {version} {text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_numbers(tensor))
    return digest.hexdigest()


def _numbers(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
