# SPDX-License-Identifier: Apache-2.0
"""Build the charts of the KV Transport card into the package, where npm is: python -m scripts.build_card

uPlot is fetched as web/card/package-lock.json says, bundled by esbuild, and laid beside the page with its licence.
Without npm or a registry the card is complete but for its charts, and that is said on stderr. What was built for
the same sources is kept; ``--node-modules`` prints where the npm packages lie (exit status 1: they can't be had).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.environment import CACHE, ROOT, locked, say

CARD = ROOT / "web" / "card"
BUILT = ROOT / "sage_kv_connector" / "telemetry" / "reading" / "card" / "built"
LOCKED = ("package.json", "package-lock.json", ".npmrc")


def main() -> int:
    node_modules = npm_packages()
    if "--node-modules" in sys.argv[1:]:
        if node_modules is not None:
            print(node_modules)
        return int(node_modules is None)
    if node_modules is None:
        shutil.rmtree(BUILT, ignore_errors=True)
        say("the KV Transport card is built without charts; its tables have all numbers")
    else:
        build(node_modules)
    return 0


def npm_packages() -> Path | None:
    """The folder of the locked npm packages, installed when it is not there. None: they can't be had."""
    digest = hashlib.sha256(b"".join((CARD / name).read_bytes() for name in LOCKED)).hexdigest()[:12]
    folder = CACHE / f"card-npm-{digest}"
    if folder.is_dir():
        return folder / "node_modules"
    if not all(map(shutil.which, ("npm", "node"))):
        say("npm was not found (Debian/Ubuntu: apt-get install npm)")
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"card-npm-{digest}.lock"):
        if folder.is_dir():  # another checkout made it meanwhile
            return folder / "node_modules"
        partial = CACHE / f"card-npm-{digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in LOCKED:
            shutil.copy(CARD / name, partial)
        say(f"installing web/card/package-lock.json into {folder} (once)")
        npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(npm, cwd=partial, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            say(f"npm ci failed with status {done.returncode}: {done.stdout.strip()}")
            return None
        partial.rename(folder)
    return folder / "node_modules"


def build(node_modules: Path) -> None:
    """Bundle into ``BUILT``, all of it or nothing."""
    source = CARD / "charts.js"
    digest = hashlib.sha256(
        source.read_bytes() + Path(__file__).read_bytes() + str(node_modules).encode()
    ).hexdigest()
    stamp = BUILT / "digest"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    with locked(CACHE / "card-build.lock"):
        partial = BUILT.with_name("built.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        esbuild = [
            node_modules / ".bin" / "esbuild", source, "--bundle", "--minify", "--format=esm", "--target=es2022",
            "--legal-comments=inline", "--log-level=warning", f"--outfile={partial / 'charts.js'}",
        ]  # fmt: skip
        subprocess.run(esbuild, check=True, env={**os.environ, "NODE_PATH": str(node_modules)})
        uplot = node_modules / "uplot"
        shutil.copy(uplot / "dist" / "uPlot.min.css", partial / "charts.css")
        shutil.copy(uplot / "LICENSE", partial / "charts.LICENSE.txt")
        (partial / "digest").write_text(digest)
        shutil.rmtree(BUILT, ignore_errors=True)
        partial.rename(BUILT)
    sizes = ", ".join(f"{path.name} {path.stat().st_size} bytes" for path in sorted(BUILT.glob("charts.*")))
    say(f"built the charts of the KV Transport card: {sizes}")


if __name__ == "__main__":
    sys.exit(main())
