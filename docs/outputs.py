"""Where the numbers of these pages come from: `python docs/outputs.py PAGE ...`.

In a page, `<!-- output -->` stands before a block whose lines that begin with `$` are commands; the
others are what they printed.  This runs the commands, in a folder of the page's own, and writes
what they print into the page, and day, machine and versions below.  `--only TEXT` takes the blocks
alone in whose commands TEXT is.  Blocks that are marked `<!-- output: the same -->` print the same
everywhere; `--check` says whether they still do, and writes nothing.  A block that needs a GPU
stays as it is where there is none.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^<!-- output(?P<same>: the same)? -->\n```\n(?P<text>.*?)^```$", re.M | re.S)
LINKS = ("docs", "experiments", "benchmarks")


def commands(text: str) -> list[str]:
    """What follows `$ `; a line that ends with a backslash goes on in the next one."""
    found = re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [command.strip() for command in found]


def place(folder: Path) -> dict[str, str]:
    """Make `folder` look like a checkout, and give the environment of commands there."""
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    if data := os.environ.get("CIFAR10_DIR"):
        (folder / "CIFAR10_DIR").symlink_to(Path(data).resolve())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def printed(command: str, folder: Path, environment: dict[str, str]) -> str | None:
    """What a command prints, less complaints; None if it needs a GPU and there is none.  Exits if
    it fails, which a benchmark that misses a bar does not."""
    print(f"$ {command}", flush=True)
    where = ROOT if command.startswith("make ") else folder
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=where, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    print(done.stdout + done.stderr, flush=True)
    if done.returncode == 2 and done.stdout.startswith("no GPU "):
        return None
    tables = command.startswith("python -m benchmarks.") and done.stdout.strip()
    missed = tables and done.returncode == 1 and "Traceback" not in done.stderr
    if done.returncode and not missed:
        sys.exit(f"exit code {done.returncode}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    text = "\n".join(lines).strip("\n")
    for known in (folder, ROOT):
        text = text.replace(str(known), "...")
    return text


def stamp() -> str:
    """Day, machine and versions."""
    from fl_common import machine
    from fl_common.fingerprint import code_sha256

    torch = version("torch").partition("+")[0]
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} processors "
        f"({machine.processor()}), Python {sys.version.split()[0]}, torch {torch}, "
        f"code {code_sha256()[:12]}"
    )


def page(path: Path, only: str, check: bool) -> list[str]:
    """Run a page's blocks, each written when it is done; gives those that differ, where that is
    what was asked."""
    differ = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = place(folder)
        for block in BLOCK.finditer(path.read_text()):
            calls = commands(block["text"])
            if (check and not block["same"]) or not any(only in call for call in calls):
                continue
            text = ""
            for call in calls:
                output = printed(call, folder, environment)
                if output is None:
                    text = block["text"]
                    break
                text += f"$ {call}\n" + (f"{output}\n" if output else "")
            if check and text != block["text"]:
                differ.append(f"{path.name}: {calls[0]}")
            if check or text == block["text"]:
                continue
            if not block["same"]:
                text += f"# {stamp()}\n"
            now = path.read_text()  # which may have been edited meanwhile
            if now.count(block[0]) != 1:
                sys.exit(f"{path}: the block of `{calls[0]}` is gone, or there twice")
            path.write_text(now.replace(block[0], block[0].replace(block["text"], text)))
    return differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only blocks whose commands contain this"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check, and write nothing: say which blocks print something else",
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    differ = [what for path in args.pages for what in page(path, args.only, args.check)]
    for what in differ:
        print(f"another output than in the page: {what}", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
