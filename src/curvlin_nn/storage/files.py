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
from safetensors.torch import save_file
from torch import Tensor

from curvlin_nn.errors import StorageError
from curvlin_nn.storage import plain

VERSION = 1
"""Of what is written; what is read may be older."""

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
    tensors = _apart(tensors)
    metadata = {
        "kind": kind,
        "version": str(VERSION),
        "content": text,
        "sha256": _checksum(kind, str(VERSION), text, tensors),
    }
    target = Path(path)
    beside = target.with_name(f"{target.name}.tmp")
    try:
        save_file(tensors, beside, metadata)
        _force(beside, os.O_RDWR)
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"{target} cannot be written ({reason}), what was there is as before; give a path in a folder that exists, "
            "is writable and has room"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    with suppress(OSError):  # where folders cannot be opened, renaming is as lasting as it gets
        _force(target.parent, os.O_RDONLY)


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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with memory of its own, as files want them."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        apart[name] = own
    return apart


def _checksum(kind: str, version: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{kind} {version} {text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _force(path: Path, mode: int) -> None:
    """To the disk, as far as the system can tell."""
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
