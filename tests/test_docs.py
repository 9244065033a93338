"""The pages' numbers are what commands print: docs/outputs.py, and the blocks that it can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import outputs  # noqa: E402

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "docs" / "outputs.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marked_block_was_written_by_its_commands(page: Path) -> None:
    text = page.read_text()
    blocks = list(outputs.BLOCK.finditer(text))
    assert len(blocks) == text.count("<!-- output")  # none is malformed
    for block in blocks:
        lines = block["text"].splitlines()
        assert lines[0].startswith("$ ")
        assert outputs.commands(block["text"])
        if not block["same"]:
            assert re.fullmatch(r"# \d{4}-\d\d-\d\d, .* code [0-9a-f]{12}", lines[-1]), lines[0]


def test_what_prints_the_same_everywhere_still_does() -> None:
    done = call("--check", ROOT / "docs" / "fedpart.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flatfed cost" in done.stdout
    assert "flatfed groups" in done.stdout


def test_a_page_that_says_something_else_is_found_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "<!-- output: the same -->\n```\n$ echo a \\\n  b\n{}\n$ echo c > d; cat d\nc\n```\n"
    page.write_text("Before\n\n" + block.format("a c") + "\nAfter\n")
    before = page.read_text()
    done = call("--check", page)
    assert done.returncode == 1
    assert "another output than in the page: page.md: echo a" in done.stderr
    assert page.read_text() == before
    assert call(page).returncode == 0
    assert page.read_text() == before.replace("a c", "a b")
    assert call("--check", page).returncode == 0


def test_a_block_that_needs_a_card_stays_where_there_is_none(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    said = "no GPU that torch can use; nothing was measured"
    block = "<!-- output -->\n```\n$ echo '{}'; exit 2\nfound on a card\n```\n"
    page.write_text(block.format(said))
    assert call(page).returncode == 0
    assert page.read_text() == block.format(said)
    page.write_text(block.format("something else"))
    assert call(page).returncode == 1


def test_a_block_that_changes_gets_day_machine_and_versions(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- output -->\n```\n$ pwd\n```\n<!-- output -->\n```\n$ echo b\n```\n")
    assert call(page, "--only", "pwd").returncode == 0
    lines = page.read_text().splitlines()
    assert lines[2:4] == ["$ pwd", "..."]  # folders of one machine are not for a page
    assert lines[4].startswith("# 20")
    assert lines[-3:] == ["```", "$ echo b", "```"]


def test_a_benchmark_that_has_no_table_is_not_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- output -->\n```\n$ python -m benchmarks.nothing\n```\n")
    before = page.read_text()
    assert call(page).returncode == 1
    assert page.read_text() == before


def test_a_command_that_fails_leaves_the_page_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- output -->\n```\n$ echo told; false\n```\n")
    done = call(page)
    assert "told" in done.stdout
    assert "exit code 1" in done.stderr
    assert done.returncode == 1
    assert "told\n" not in page.read_text().replace("$ echo told; false", "")
