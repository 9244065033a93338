"""What the regularizers cost per step: `python -m benchmarks.regularizers`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.steps import Case, compare

EVERYWHERE = ("lenet", "cnn", "resnet8")
BARS = {
    "proximal": dict.fromkeys(EVERYWHERE, 1.05),
    "man": dict.fromkeys(EVERYWHERE, 1.10),
    "sam": dict.fromkeys(EVERYWHERE, 2.15),
    "asam": dict.fromkeys(EVERYWHERE, 2.25),
    "moon": {"resnet8": 1.85, "lenet": 2.3},
    "fedalign": {"resnet8": 1.30, "cnn": 1.9},
    "mixup": {"resnet8": 1.04, "cnn": 1.04, "lenet": 1.15},
    "stochastic-depth": {"resnet8": 1.03},
    "gradaug n=1": {"resnet8": 1.65},
    "gradaug n=2": {"resnet8": 2.3},
}
MORE = {
    "moon": {"model.head": "moon"},
    "gradaug n=1": {"gradaug.n": 1},
    "gradaug n=2": {"gradaug.n": 2},
}
"""Settings beside the name; those of the model belong to the plain run too."""
CASES = [
    Case(label, model, bar, {"regularizers": label.split()[0], **MORE.get(label, {})})
    for label, bars in BARS.items()
    for model, bar in bars.items()
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11, help="turns per case")
    parser.add_argument("--steps", type=int, default=6, help="steps per round")
    parser.add_argument("--only", metavar="NAME", help="one regularizer")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in (None, case.label.split()[0])]
    return 1 if compare("regularizers", cases, args.turns, args.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
