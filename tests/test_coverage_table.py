# SPDX-License-Identifier: Apache-2.0
"""The table of lines that tests ran, over files that were really counted: small ones, by SlipCover and by gcov."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from coverage import CoverageData
from coverage.exceptions import CoverageException

from scripts import coverage_table
from scripts.coverage_table import Lines

SCRIPTS = Path(coverage_table.__file__).parent
#: Two of its three statements run.
MODULE = "a = 1\nif a == 2:\n    a = 3\n"
RAN = "import ran"
FORKED = f"""
import os, time
if os.fork():
    os.wait()
else:
    {RAN}
    time.sleep(4)
    os.kill(os.getpid(), 9)
"""
#: Both instances of the template have the same lines, and only one runs.
SOURCE = """
template <int N>
int plus(int number) {
  return number + N;
}
int main(int argc, char**) {
  if (argc > 1) {
    return plus<1>(argc);
  }
  return plus<0>(0);
}
"""


def counted(checkout: Path) -> Path:
    """What the files of lines begin with."""
    return checkout / "build" / "python" / "lines"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of a project with a module that ran, one that nothing imports, and a C++ program that ran."""
    package = tmp_path / "sage_kv_connector"
    for folder in (
        package / "room",
        package / "csrc" / "shm",
        tmp_path / "vendors",
        tmp_path / "build" / "python",
    ):
        folder.mkdir(parents=True)
    (package / "room" / "ran.py").write_text(MODULE)
    (tmp_path / "vendors" / "never.py").write_text(MODULE)
    settings = tmp_path / "pyproject.toml"
    settings.write_text("[tool.coverage.report]\nfail_under = 50\n")
    monkeypatch.setattr(coverage_table, "ROOT", tmp_path)
    monkeypatch.setattr(coverage_table, "MEASURED", tmp_path / "build")
    monkeypatch.setattr(coverage_table, "COUNTED", counted(tmp_path))
    return tmp_path


def counting(checkout: Path, code: str) -> subprocess.Popen[bytes]:
    """A process of Python that counts; nothing else counts its lines: not those who measure this test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_KVT_")}
    env |= {"SAGE_KVT_CHECKOUT": str(checkout), "SAGE_KVT_COUNTED": str(counted(checkout))}
    folders = [str(checkout / "sage_kv_connector" / "room"), str(SCRIPTS)]
    begun = f"import sys; sys.path[:0] = {folders!r}; import counted_process"
    return subprocess.Popen([sys.executable, "-c", f"{begun}; {code}"], cwd=checkout, env=env)


def run_python(checkout: Path, code: str = RAN) -> None:
    with counting(checkout, code) as process:
        assert process.wait() == 0


def kill_python(checkout: Path) -> None:
    """As run_python, in a process that runs on and is killed when it has written something."""
    with counting(checkout, f"{RAN}; import time; time.sleep(60)") as process:
        try:
            until = time.monotonic() + 60
            while not has_written(checkout):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.1)
        finally:
            process.kill()


def has_written(checkout: Path) -> bool:
    for path in counted(checkout).parent.iterdir():
        data = CoverageData(str(path))
        with contextlib.suppress(CoverageException):  # half of a file
            data.read()
            return any(data.lines(file) for file in data.measured_files())
    return False


def run_cpp(checkout: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("wants g++")
    source, program = checkout / "sage_kv_connector" / "csrc" / "shm" / "ran.cc", checkout / "build" / "ran"
    source.write_text(SOURCE)
    words = ["g++", "--coverage", "-fprofile-abs-path", "-o", str(program), str(source)]
    subprocess.run(words, cwd=checkout / "build", check=True)
    subprocess.run([program], check=True)


def status_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["coverage_table", *words])
    return coverage_table.main()


def test_both_languages_are_counted(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python(checkout)
    run_cpp(checkout)
    assert status_of(monkeypatch, "--json") == 1
    said = capsys.readouterr()
    languages = json.loads(said.out)["languages"]
    assert languages["Python"]["parts"] == {
        "sage_kv_connector/room": {"lines": 3, "covered": 2, "percent": 66.6},
        "vendors": {"lines": 3, "covered": 0, "percent": 0.0},
    }
    # A line of a template is one line, however many instances there are.
    (cpp,) = languages["C++"]["files"].items()
    assert cpp == ("sage_kv_connector/csrc/shm/ran.cc", {"lines": 6, "covered": 5, "percent": 83.3})
    assert "Python 33.3 %" in said.err and "C++" not in said.err
    # What was counted stays for parts of make test that run later.
    assert status_of(monkeypatch, "--least", "1") == 1
    assert capsys.readouterr().out.splitlines()[-1].split() == ["vendors/never.py", "3", "0", "0.0"]


def test_enough_is_a_success(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "vendors" / "never.py").unlink()
    run_python(checkout)
    run_cpp(checkout)
    assert status_of(monkeypatch) == 0


def test_a_killed_process_has_counted(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_python(checkout)
    run_cpp(checkout)
    assert status_of(monkeypatch, "--json") == 1
    room = json.loads(capsys.readouterr().out)["languages"]["Python"]["parts"]["sage_kv_connector/room"]
    assert room["covered"] == 2


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(f"import os; {RAN}; os._exit(0)", id="leaves at once"),
        pytest.param(FORKED, id="is forked, and killed"),
        pytest.param("import runpy; runpy.run_module('ran', run_name='__main__')", id="python -m"),
    ],
)
def test_lines_are_counted_however_a_process_runs_and_ends(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    run_python(checkout, f"exec({code!r})")
    run_cpp(checkout)
    assert status_of(monkeypatch, "--json") == 1
    room = json.loads(capsys.readouterr().out)["languages"]["Python"]["parts"]["sage_kv_connector/room"]
    assert room["covered"] == 2


def test_half_a_file_of_a_killed_process_is_passed_over(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (checkout / "vendors" / "never.py").unlink()
    run_python(checkout)
    run_cpp(checkout)
    counted(checkout).with_name("lines.host.pid1.half").touch()
    assert status_of(monkeypatch) == 0
    assert not recwarn.list


def test_nothing_counted_is_no_success(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch) == 2
    assert "no process counted lines of Python" in capsys.readouterr().err
    run_python(checkout)
    assert status_of(monkeypatch) == 2
    assert "no process counted lines of C++" in capsys.readouterr().err


def test_a_reset_forgets_counts_only(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_python(checkout)
    run_cpp(checkout)
    assert status_of(monkeypatch, "--reset") == 0
    assert list((checkout / "build" / "python").iterdir()) == []
    assert [path.suffix for path in (checkout / "build").glob("*.gc*")] == [".gcno"]


def test_a_share_is_never_rounded_up_to_the_floor() -> None:
    assert Lines(10_000, 8_499).percent == 84.9
    assert not coverage_table.reaches({"kernels/x.py": Lines(10_000, 8_499)}, 85)
    assert coverage_table.reaches({"kernels/x.py": Lines(10_000, 8_500)}, 85)
