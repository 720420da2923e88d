# SPDX-License-Identifier: Apache-2.0
"""What weights a server has, told from their files: two servers compare it before KV moves between them.

A few bytes of every tensor are read, by its name, so that the answer does not depend on how a checkpoint is cut into
files, on ranks or on the engine, and takes milliseconds. Training touches every tensor somewhere; that it leaves all
sampled bytes alone is as good as impossible, but this is no proof against somebody who means to deceive.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

#: Read of each tensor: so many bytes at so many places, the first and the last of them among these.
SAMPLE_BYTES, PLACES = 64, 5
#: A safetensors header is at most this long; the format's own limit.
MAX_HEADER = 100_000_000
#: Keys of config.json and adapter_config.json that say where weights come from or how they are kept, not what they are.
_VOLATILE = {
    "_name_or_path",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "revision",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIGS = ("config.json", "adapter_config.json")


def weights_identity(
    model: str,
    revision: str = "",
    quantization: str = "",
    overrides: object = None,
    load_format: str = "auto",
    version: str = "",
) -> str:
    """What a server's weights are, as another server with the same ones says it too.

    ``model``: a folder, or a name on a hub, of which the files in the local cache are read. ``quantization``: what the
    engine does to the weights, "" for nothing. ``overrides``: changes of the model's config. Where no file can be read,
    name and revision have to do. ``version``: what the engine was told of weights that were replaced while it ran.
    """
    what = "dummy" if load_format == "dummy" else _read(model, revision)
    what = what or f"{model}@{revision or 'main'}"
    changed = f"+{json.dumps(overrides, sort_keys=True, default=str)}" if overrides else ""
    replaced = f", version {version}" if version else ""
    return f"{quantization or 'as stored'}: {what}{changed}{replaced}"


def _read(model: str, revision: str) -> str:
    try:
        return weights_digest(Path(model) if os.path.isdir(model) else _cached(model, revision))
    except (OSError, ValueError) as error:
        logger.warning("the weights of %s are known by name only: %s", model, error)
        return ""


def _cached(model: str, revision: str) -> Path:
    """Where the hub's client keeps the files. Raises OSError or ValueError where it has none."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision or None, local_files_only=True))


def weights_digest(folder: Path) -> str:
    """32 hexadecimal digits for the weights and their config in ``folder``; "" where there are none.

    Raises OSError for files that can't be read, ValueError naming one that is no safetensors file.
    """
    files = (
        sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file()) if folder.is_dir() else []
    )
    safe = [file for file in files if file.suffix == ".safetensors"]
    files = safe or files
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    if not files:
        return ""
    stamps = tuple((str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in (*configs, *files))
    return _digest(stamps, len(configs))


@lru_cache(maxsize=256)
def _digest(stamps: tuple[tuple[str, int, int], ...], configs: int) -> str:
    hashed = hashlib.sha256()
    for path, _, _ in stamps[:configs]:
        config = json.loads(Path(path).read_text())
        kept = {key: value for key, value in config.items() if key not in _VOLATILE}
        hashed.update(json.dumps(kept, sort_keys=True).encode())
    found: list[tuple[str, bytes]] = []
    for path, size, _ in stamps[configs:]:
        with open(path, "rb") as file:
            if path.endswith(".safetensors"):
                found += _tensors(path, file, size)
            else:
                found.append((Path(path).name, _sample(file, 0, size)))
    for name, sample in sorted(found):
        hashed.update(f"{name}\0{len(sample)}\0".encode() + sample)
    return hashed.hexdigest()[:32]


def _tensors(path: str, file: BinaryIO, size: int) -> Iterator[tuple[str, bytes]]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{path}: a header of {length} bytes in a file of {size} is no safetensors file's")
    try:
        header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in tensors.items():
            first, end = (int(place) for place in entry["data_offsets"])
            if not 0 <= first <= end <= size - 8 - length:
                raise ValueError(f"tensor {name!r} lies at {first} to {end}")
            about = f"{entry['dtype']}{entry['shape']}".encode()
            yield name, about + _sample(file, 8 + length + first, end - first)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _sample(file: BinaryIO, start: int, length: int) -> bytes:
    room = max(0, length - SAMPLE_BYTES)
    places = sorted({room * i // (PLACES - 1) for i in range(PLACES)})
    return b"".join(os.pread(file.fileno(), min(SAMPLE_BYTES, length), start + place) for place in places)
