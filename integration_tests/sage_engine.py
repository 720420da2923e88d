# SPDX-License-Identifier: Apache-2.0
"""One InferenceBackend in a process of its own, driven by lines of JSON: [method, arguments] in, the result out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import msgspec

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.sage.inference_backend import Prefilled, RegisteredKV, create_backend


def main() -> None:
    """Arguments: backend's name, model, options of the transport and of the engine as JSON.

    Results come on lines that begin with >.
    """
    name, model = sys.argv[1:3]
    transport, options = map(json.loads, sys.argv[3:])
    backend = create_backend(name, model, KVTransportConfig.load(transport), **options)
    _say("ready")
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            _say(_call(backend, method, arguments))
        except (ValueError, RuntimeError) as error:
            _say({"error": f"{type(error).__name__}: {error}"})


def _call(backend: Any, method: str, arguments: list[Any]) -> Any:
    if method == "decode":
        arguments = [Prefilled(*arguments[0]), *arguments[1:]]
    if method == "transport_plan":
        arguments = [msgspec.convert(arguments[0], RegisteredKV)]
    return getattr(backend, method)(*arguments)


def _say(result: Any) -> None:
    print(">" + msgspec.json.encode(result).decode(), flush=True)


class Engine:
    """The other end: starts the program and calls it."""

    def __init__(
        self,
        name: str,
        model: Path,
        transport: dict[str, Any],
        options: dict[str, Any],
        env: dict[str, str],
        log: IO[str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.process = subprocess.Popen(
            [python, "-m", "integration_tests.sage_engine",
             name, str(model), json.dumps(transport), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
        )  # fmt: skip

    def ready(self) -> None:
        assert self._result() == "ready"

    def call(self, method: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode([method, arguments]).decode() + "\n")
        self.process.stdin.flush()
        return self._result()

    def stop(self) -> None:
        """Close the engine and end the process, the hard way if it does not end itself."""
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, OSError):
            self.process.communicate('["close", []]\n', timeout=20)
        self.process.kill()
        self.process.wait()

    def _result(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(">"):
                return json.loads(line[1:])
        raise AssertionError("the engine's process ended")


if __name__ == "__main__":
    main()
