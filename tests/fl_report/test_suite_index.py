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
    table = json.loads((RESULTS / "smoke.json").read_text())

    def told(**more) -> tuple[str, str]:
        """The result's line, and that of the open suite, if it is that."""
        (tmp_path / "smoke.json").write_text(json.dumps(table | more))
        there, _, left = page(tmp_path, SUITES).partition("## Open")
        [found] = [line for line in there.splitlines() if "(smoke.md)" in line]
        return found, "".join(line for line in left.splitlines() if "smoke.toml" in line)

    whole, left = told()
    assert "| full | 8 | - | cpu" in whole and left == ""
    command = "`flatfed suite experiments/smoke.toml --device cuda engine.cohort=auto`"
    reduced, left = told(reduced=True)
    assert "| reduced | 8 |" in reduced and left.endswith(f"| 8 | {command} |")
    other, left = told(overrides=["run.rounds"])
    assert "| full, other settings | 8 |" in other and left.endswith(f"| 8 | {command} |")
    cells = [cell | {"status": "missing"} for cell in table["cells"][1:]]
    some, left = told(cells=[table["cells"][0], *cells])
    assert "| full | 1 of 8 |" in some and left.endswith(f"| 7 | {command} |")
    none, left = told(cells=[cell | {"status": "missing"} for cell in table["cells"]])
    assert "| full | 0 of 8 | - | - | - |" in none and left.endswith(f"| 8 | {command} |")


def test_how_far_ours_are_from_published_numbers(tmp_path):
    table = json.loads((RESULTS / "smoke.json").read_text())
    block = {"table": "T", "metric": "accuracy", "settings": [], "note": "", "differs": ""}
    block["values"] = {"fedavg": [90.0], "feddyn": [99.0]}
    (tmp_path / "smoke.json").write_text(json.dumps(table | {"published": [block]}))
    means = {
        method: sum(c["values"]["accuracy"] for c in table["cells"] if c["method"] == method) / 2
        for method in block["values"]
    }
    low, high = means["feddyn"] - 99, means["fedavg"] - 90
    assert f"accuracy [%]: {low:+.1f} to {high:+.1f} (2 numbers)" in page(tmp_path, SUITES)


def test_a_suite_whose_data_are_elsewhere_or_not_named(tmp_path):
    for data, end in (
        ("", ""),
        ('data.source = "tiny-imagenet"\n', " data.path=TINY_IMAGENET_DIR"),
    ):
        text = f'title = "One"\nseeds = [3]\nmetrics = ["loss"]\n[base]\n{data}[methods.fedavg]\n'
        (tmp_path / "one.toml").write_text(text)
        (tmp_path / "plain.toml").write_text("[run]\nrounds = 2\n")
        lines = page(tmp_path, tmp_path).splitlines()
        assert lines[-1].startswith("| One | 1 | `flatfed suite experiments/one.toml --device")
        assert lines[-1].endswith(f"engine.cohort=auto{end}` |")
