# SPDX-License-Identifier: Apache-2.0
"""A machine in a directory: ``machine.yaml`` (files, links, nodes, calls) and the tools' outputs.

``RecordingMachine`` writes one while a probe runs, ``RecordedMachine`` answers from it. What a
recording does not hold is absent there, as on a machine.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage_kv_connector.hardware.probing.machine import Machine, ToolAnswer, ToolState

MANIFEST = "machine.yaml"


class RecordingError(ValueError):
    """A directory that is not a recording; the text names the file and the field."""


class RecordedCall(BaseModel):
    """One call of a tool."""

    model_config = ConfigDict(extra="forbid")

    argv: list[str] = Field(min_length=1)
    state: ToolState = ToolState.answered
    status: int = 0
    output: str | None = Field(None, description="file with stdout, relative to the recording")
    errors: str = Field("", description="stderr")


class Manifest(BaseModel):
    """What ``machine.yaml`` holds."""

    model_config = ConfigDict(extra="forbid")

    recording: int = Field(ge=1, le=1, description="version of this format")
    about: str = Field("", description="what machine this is, and where the recording comes from")
    files: dict[str, str] = Field(default_factory=dict, description="path → text")
    links: dict[str, str] = Field(default_factory=dict, description="symbolic link → target")
    nodes: list[str] = Field(default_factory=list, description="paths that exist and were not read")
    calls: list[RecordedCall] = Field(default_factory=list)


class RecordedMachine:
    """Answers from a recording."""

    def __init__(self, directory: Path) -> None:
        """Raises RecordingError naming file and field."""
        self.origin = str(directory)
        self._directory = directory
        self._manifest = _manifest(directory / MANIFEST)
        self._calls = {tuple(call.argv): call for call in self._manifest.calls}
        self._names: dict[str, set[str]] = {}
        for path in (*self._manifest.files, *self._manifest.links, *self._manifest.nodes):
            while path not in ("/", ""):
                parent, name = posixpath.split(path)
                self._names.setdefault(parent, set()).add(name)
                path = parent

    @property
    def about(self) -> str:
        return self._manifest.about

    def read(self, path: str) -> str | None:
        text = self._manifest.files.get(path)
        return None if text is None else text.strip()

    def names(self, path: str) -> list[str]:
        return sorted(self._names.get(path.rstrip("/"), ()))

    def target(self, path: str) -> str | None:
        return self._manifest.links.get(path)

    def run(self, argv: Sequence[str]) -> ToolAnswer:
        call = self._calls.get(tuple(argv))
        if call is None:
            if any(known[0] == argv[0] for known in self._calls):
                said = "this call is not in the recording"
                return ToolAnswer(tuple(argv), ToolState.answered, 127, errors=said)
            return ToolAnswer(tuple(argv), ToolState.missing)
        output = ""
        if call.output is not None:
            path = self._directory / call.output
            try:
                output = path.read_text(errors="replace")
            except OSError as error:
                raise RecordingError(f"{path}: {error.strerror}; {MANIFEST} names it") from error
        return ToolAnswer(tuple(argv), call.state, call.status, output, call.errors)


def _manifest(path: Path) -> Manifest:
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}; a recording has a {MANIFEST}") from error
    except yaml.YAMLError as error:
        raise RecordingError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return Manifest.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise RecordingError(f"{path}: {where}: {first['msg']}") from error


class RecordingMachine:
    """Passes on what another machine answers, and keeps it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.origin = machine.origin
        self._files: dict[str, str] = {}
        self._links: dict[str, str] = {}
        self._nodes: set[str] = set()
        self._answers: dict[tuple[str, ...], ToolAnswer] = {}

    def read(self, path: str) -> str | None:
        text = self._machine.read(path)
        if text is not None:
            self._files[path] = text
        return text

    def names(self, path: str) -> list[str]:
        found = self._machine.names(path)
        self._nodes.update(posixpath.join(path, name) for name in found)
        return found

    def target(self, path: str) -> str | None:
        target = self._machine.target(path)
        if target is not None:
            self._links[path] = target
        return target

    def run(self, argv: Sequence[str]) -> ToolAnswer:
        answer = self._machine.run(argv)
        self._answers[answer.argv] = answer
        return answer

    def save(self, directory: Path, about: str) -> None:
        """Write the recording. Raises RecordingError if the directory already holds one."""
        manifest = directory / MANIFEST
        if manifest.exists():
            raise RecordingError(f"{manifest} exists; name another directory")
        directory.mkdir(parents=True, exist_ok=True)
        calls: list[RecordedCall] = []
        for argv, answer in sorted(self._answers.items()):
            if answer.state is ToolState.missing:
                continue
            call = RecordedCall(
                argv=list(argv), state=answer.state, status=answer.status, errors=answer.errors
            )
            if answer.output:
                name = re.sub(r"[^A-Za-z0-9.=-]+", "_", answer.command)[:100] + f".{len(calls)}.txt"
                (directory / name).write_text(answer.output)
                call.output = name
            calls.append(call)
        known = {*self._files, *self._links}
        # A directory that something below is known of needs no line of its own.
        above = {parent for path in known for parent in _parents(path)}
        nodes = sorted(self._nodes - known - above)
        whole = Manifest(
            recording=1, about=about, files=self._files, links=self._links, nodes=nodes, calls=calls
        )
        text = yaml.safe_dump(
            whole.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120
        )
        manifest.write_text(text)


def _parents(path: str) -> list[str]:
    found = []
    while (path := posixpath.dirname(path)) not in ("/", ""):
        found.append(path)
    return found
