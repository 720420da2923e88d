# SPDX-License-Identifier: Apache-2.0
"""Who may read an engine's numbers, and what a reader does with engines that are gone, silent, strange or new."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.recording import snapshot as snapshots
from sage_kv_connector.telemetry.recording.publishing import Publisher, publish
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot


def taken(engine: str = "e", rank: int = 0) -> Snapshot:
    return Snapshot(engine, rank, os.getpid(), 0.0, 1.0, (Sample("offers", (), 3),), ())


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher(taken)
    yield made
    made.close()


@contextmanager
def answering(place: Path, name: str, data: bytes, *, slow: bool = False) -> Iterator[None]:
    """A socket beside the engines' own that answers with these bytes, or with nothing."""
    place.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(place / name))
        listening.listen()
        over = threading.Event()

        def serve() -> None:
            reader, _ = listening.accept()
            with reader:
                if slow:
                    over.wait(30)
                else:
                    reader.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        over.set()
        thread.join(10)


def test_engines_of_this_machine_are_found_in_order(publisher: Publisher, place: Path) -> None:
    other = Publisher(lambda: taken("d", 1))
    try:
        found = sources.local()
        assert [(one.engine, one.rank) for one in found.snapshots] == [("d", 1), ("e", 0)]
        assert not found.silent
        assert place.stat().st_mode & 0o777 == 0o700
    finally:
        other.close()
    assert [one.engine for one in sources.local().snapshots] == ["e"]
    assert sources.local(place / "none") == sources.Found([])


def test_a_socket_of_a_process_that_is_gone_is_taken_away(publisher: Publisher, place: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = place / f"{gone.pid}-0.sock"
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(left))
    assert len(sources.local().snapshots) == 1
    assert not left.exists()


def test_an_engine_that_hangs_or_says_nonsense_is_silent_by_name(
    publisher: Publisher, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PATIENCE_S", 0.3)
    mine = f"{os.getpid()}-"
    bad = msgspec.json.encode(msgspec.structs.replace(taken(), samples=(Sample("dials_total", (), 1),)))
    with (
        answering(place, f"{mine}a.sock", b"", slow=True),
        answering(place, f"{mine}b.sock", b"{}"),
        answering(place, f"{mine}c.sock", bad),
        answering(place, f"{mine}d.sock", b""),
    ):
        found = sources.local()
    assert [one.engine for one in found.snapshots] == ["e"]
    assert set(found.silent) == {f"{mine}{one}.sock" for one in "abcd"}
    assert "timed out" in found.silent[f"{mine}a.sock"]
    assert "not a telemetry snapshot" in found.silent[f"{mine}b.sock"]
    assert found.silent[f"{mine}c.sock"] == "dials_total: labels are (), must be those of ('code',)"


def test_a_metric_of_a_later_release_is_left_out() -> None:
    later = msgspec.structs.replace(taken(), samples=(*taken().samples, Sample("news_total", ("x",), 1)))
    assert snapshots.decode(snapshots.encode(later)) == taken()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_directory_that_others_can_enter_is_used_by_nobody(
    place: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    place.mkdir()
    place.chmod(mode)
    assert publish(taken) is None
    assert f"has mode {mode:o}" in caplog.text and "SAGE_KVT_TELEMETRY_DIR" in caplog.text
    with pytest.raises(PermissionError):
        sources.local()


def test_another_user_gets_nothing(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_kv_connector.telemetry.recording import publishing

    monkeypatch.setattr(publishing, "_user_of", lambda peer: os.getuid() + 1)
    assert sources.local().snapshots == []


def test_a_reader_that_hangs_does_not_keep_others_or_the_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sage_kv_connector.telemetry.recording import publishing

    monkeypatch.setattr(publishing, "SLOWEST_READER_S", 0.2)
    much = Snapshot(
        "e", 0, 1, 0, 0, tuple(Sample("dials_total", (f"{n:0100}",), 1) for n in range(20_000)), ()
    )
    made = Publisher(lambda: much)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.connect(str(made.path))
        assert len(sources.local().snapshots) == 1
    made.close()
    made.close()
    assert not made.path.exists()


def test_what_an_exporter_says_is_checked() -> None:
    found = sources.Found([taken()], {"7-0.sock": "timed out"})
    assert sources.found_of(sources.body_of(found)) == found
    for data in (b"[]", b'{"engines": []}', b'{"engines": 5, "silent": {}}', b"x"):
        with pytest.raises(ValueError, match="not an exporter's /snapshot"):
            sources.found_of(data)
    with pytest.raises(ValueError, match="must begin with http"):
        sources.exporter("file:///etc/passwd")
