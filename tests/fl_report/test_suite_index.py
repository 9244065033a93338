from __future__ import annotations

import json
from pathlib import Path

from fl_report.suite_index import page

ROOT = Path(__file__).parents[2]
RESULTS, SUITES = ROOT / "docs" / "results", ROOT / "experiments"


def test_the_page_is_made_from_the_results_and_the_suites():
    told = "run: python -m fl_report.suite_index > docs/results/README.md"
    assert (RESULTS / "README.md").read_text() == page(RESULTS, SUITES), told


def test_what_is_there_and_what_is_open(tmp_path):
    lines = page(RESULTS, SUITES).splitlines()
    [c1] = [line for line in lines if "(fedpart-c1-cifar10.md)" in line]
    cells = json.loads((RESULTS / "fedpart-c1-cifar10.json").read_text())["cells"]
    assert f"| full | {len(cells)} |" in c1
    assert "statistics [%]: -3.1 to +0.5 (4 numbers)" in c1
    opened = [line for line in lines if "`flatfed suite" in line]
    [zeta] = [line for line in opened if "man-zeta.toml" in line]
    assert "| 36 | " in zeta and zeta.endswith("data.path=CIFAR10_DIR` |")
    assert not any("fedpart-c1" in line or "smoke" in line for line in opened)
    # Nothing is there: a suite of digits needs no path, and of a run that is missing no date.
    [smoke] = [line for line in page(tmp_path, SUITES).splitlines() if "smoke.toml" in line]
    assert smoke.endswith("smoke.toml --device cuda engine.cohort=auto` |")
    table = json.loads((RESULTS / "smoke.json").read_text())
    for cell in table["cells"]:
        cell["status"] = "missing"
    (tmp_path / "smoke.json").write_text(json.dumps(table))
    assert "| full | 0 of 8 | - | - | - |" in page(tmp_path, SUITES)
