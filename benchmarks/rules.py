"""What the strategies' client rules cost per step: `python -m benchmarks.rules`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.steps import Case, compare

BAR = 1.06
CASES = [
    Case(name, model, BAR, {"strategy.name": name})
    for model in ("lenet", "cnn")
    for name in ("fedprox", "feddyn", "feddc", "scaffold")
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="turns per case")
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    args = parser.parse_args()
    return 1 if compare("client rules", CASES, args.turns, args.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
