"""Named tensors in Hugging Face's files: safetensors in and out, `pytorch_model.bin` in where torch is installed.

A file is never held in memory: a `Tensor` maps its bytes when it is opened and lets them go with the array. The
format is 8 bytes of length, a JSON header, then the bytes (https://github.com/huggingface/safetensors); the library
of that name checks every file before a byte of it is believed.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.errors import UserError
from gptjax.files import read_json

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
CHECKSUMS = "gptjax.crc32"
AGAIN = "download the folder again"
SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 22  # elements that are checked or compared at once


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `open()` gives the array; of a safetensors file its bytes are read when indexed."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    open: Callable[[], np.ndarray]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name: `model.safetensors`, else its shards, else `pytorch_model.bin` the same way.

    Raises UserError for a missing, broken or disguised file, and for bytes that are not those of their checksum.
    """
    for stem, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return read(folder / stem)
        if index.is_file():
            return _read_shards(index, read)
    raise UserError(f"{folder}: no weights; expected model.safetensors or model.safetensors.index.json")


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    where = read_json(index, AGAIN).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index}: no weight_map from tensors to files; {AGAIN}")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise UserError(f"{index}: {file} is not a file of this folder")
        tensors |= read(index.parent / file)
    for name, file in where.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index.parent / file}: no tensor {name}, which {index.name} puts there")
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass  # offsets, sizes and shapes agree with each other and with the file's length
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download or export it again") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        name: Tensor(name, file, tuple(entry["shape"]), entry["dtype"], partial(_map, file, length + 8, entry))
        for name, entry in header.items()
    }
    if CHECKSUMS in metadata:
        _verify(file, tensors, metadata[CHECKSUMS])
    return tensors


def _map(file: Path, start: int, entry: dict[str, Any]) -> np.ndarray:
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype not in DTYPES:
        raise UserError(f"{file}: dtype {dtype}: weights are {', '.join(DTYPES)}")
    if 0 in shape:
        return np.empty(shape, DTYPES[dtype])  # an empty range cannot be mapped
    return np.memmap(file, DTYPES[dtype], "r", start + entry["data_offsets"][0], shape)


def _verify(file: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Raises UserError for the first tensor whose bytes are not those that were written."""
    try:
        written = dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{file}: its {CHECKSUMS} is not a table of checksums; export it again") from None
    for name, tensor in tensors.items():
        if written.get(name) != _checksum(tensor.open()):
            raise UserError(f"{file}: {name} does not match its checksum, so the file was changed; export it again")


def _checksum(array: np.ndarray) -> str:
    crc = 0
    for part in chunks(array):
        crc = zlib.crc32(part.view(np.uint8).data, crc)
    return f"{crc:08x}"


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """A contiguous array piece by piece, flat: what streams through memory instead of filling it."""
    flat = array.reshape(-1)
    return (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))


def _read_bin(file: Path) -> dict[str, Tensor]:
    """Raises UserError without torch, and for a pickle of anything but tensors, of which nothing is executed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file}: a pickle, which needs torch to read; pip install 'gptjax[torch]', or get model.safetensors"
        ) from None
    try:
        zipped = zipfile.is_zipfile(file)  # the format before 2020 is not, and cannot be mapped
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception:  # whatever a broken or hostile pickle makes of it; torch's advice would be to trust the file
        loaded = None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise UserError(f"{file}: refused, not a whole pickle of tensors alone; get model.safetensors")
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def open_tensor(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has none of its own
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {
        name: Tensor(name, file, tuple(t.shape), names.get(t.dtype, str(t.dtype)), partial(open_tensor, t.contiguous()))
        for name, t in loaded.items()
    }


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write; `make()` gives its array, which is let go before the next one is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_tensors(folder: Path, tensors: Iterable[Outgoing], dtype: np.dtype, shard_bytes: int = SHARD_BYTES) -> int:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index; returns the bytes of tensors.

    Raises UserError for a value that is not finite in `dtype`.
    """
    shards: list[list[Outgoing]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = _size(tensor, dtype)
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], dtype)
        return total
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, dtype)
    where = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _write_file(file: Path, tensors: list[Outgoing], dtype: np.dtype) -> None:
    """The header goes first and holds the checksums of what follows: written blank, then again once they are known."""
    checksums = dict.fromkeys((tensor.name for tensor in tensors), "0" * 8)
    with file.open("wb") as stream:
        stream.write(_header(tensors, dtype, checksums))
        for tensor in tensors:
            with np.errstate(over="ignore"):  # an overflow is an infinity, refused by name
                array = np.ascontiguousarray(tensor.make().astype(dtype, copy=False))
            require_finite(tensor.name, array)
            checksums[tensor.name] = _checksum(array)
            for part in chunks(array):
                stream.write(part.view(np.uint8).data)
        stream.seek(0)
        stream.write(_header(tensors, dtype, checksums))


def _header(tensors: list[Outgoing], dtype: np.dtype, checksums: dict[str, str]) -> bytes:
    ends = list(accumulate((_size(tensor, dtype) for tensor in tensors), initial=0))
    entries = {
        tensor.name: {"dtype": NAMES[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        for tensor, start, end in zip(tensors, ends[:-1], ends[1:], strict=True)
    }
    metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums)}
    text = json.dumps({"__metadata__": metadata} | entries).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    return len(text).to_bytes(8, "little") + text


def _size(tensor: Outgoing, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape)) * dtype.itemsize


def require_finite(what: str, array: np.ndarray) -> None:
    """Raises UserError where a contiguous array holds an infinity or a NaN."""
    if not all(np.isfinite(part).all() for part in chunks(array)):
        raise UserError(f"{what}: holds values that are not finite in {array.dtype}")
