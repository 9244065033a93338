"""The page of all methods, made from the code itself: docs/methods.md is its output."""

from __future__ import annotations

import inspect
import sys
from textwrap import fill
from typing import TYPE_CHECKING

from fl_common.config import fields, meaning, methods

if TYPE_CHECKING:
    from typing import Any

HEAD = """\
# Methods

`python -m fl_report.methods > docs/methods.md` makes this page from the code. A strategy is chosen
with `strategy.name`, regularizers with `regularizers=one,another`; the keys of each are listed
below. `flatfed run` refuses combinations that make no sense, with the reason, before anything
starts.

N is the number of clients and S a round's cohort. In a round, w is the model that is sent, theta_i
client i's trained model, and Delta_i = theta_i - w. Client i has n_i samples: a share p_i of the
cohort's samples, and omega_i times the mean over all clients. It takes K_i local steps with the
learning rate eta.
"""
FLOWERS = "Flower's own strategies are there too: {}. Their arguments go into `strategy.params`."
WORKS, NEEDLESS, REFUSED, PART = "yes", "needless", "no", "part of it"
LEGEND = f"""\
*{PART}*: the strategy has it already, and naming it again is refused; *{NEEDLESS}*: it works, and a
warning says that it adds nothing; *{REFUSED}*: refused.
"""


def page() -> str:
    """The whole page as Markdown."""
    strategies = {n: m for n, m in methods("strategies").items() if ":" not in n}
    regularizers = methods("regularizers")
    flowers = ", ".join(f"`{name}`" for name in methods("strategies") if name not in strategies)
    parts = [HEAD, fill(FLOWERS.format(flowers), 100, break_on_hyphens=False), "\n## Strategies\n"]
    parts += [_section(name, cls, _kept(cls)) for name, cls in strategies.items()]
    parts.append("## Regularizers\n")
    parts += [_section(name, cls, _held(cls)) for name, cls in regularizers.items()]
    parts += ["## Combinations\n", LEGEND, _matrix(strategies, regularizers), _notes(strategies)]
    return "\n".join(parts)


def _section(name: str, cls: type[Any], last: str) -> str:
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    keys = [(key, field) for key, field in fields() if key.startswith(f"{name}.")]
    table = [f"| `{key}` | {_default(field)} | {_cell(meaning(field))} |" for key, field in keys]
    if table:
        table = ["| key | default | |", "|---|---|---|", *table, ""]
    rules, plain = [inspect.getdoc(cls)], methods("strategies")["fedavg"].Rule
    if (rule := getattr(cls, "Rule", plain)) is not plain:
        rules.append(f"Client: {inspect.getdoc(rule)}")
    own = "\n".join(["```", *rules, "```\n"])
    return "\n".join([f"### `{name}`\n", f"{module}\n", own, *table, f"{last}\n"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: Any) -> str:
    value = field.default
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _kept(cls: type[Any]) -> str:
    model = "the active groups up, the parts of the model that a client lacks down"
    up_down = [
        model if cls.partial else "the model both ways",
        *(f"{name} down" for name in cls.sends),
    ]
    client = ", ".join(cls.Rule.memory) or "nothing"
    if cls.Rule.also:
        client += f" ({cls.Rule.also})"
    server = ", ".join(cls.keeps) or "nothing"
    size = " (each as large as the model)" if cls.Rule.memory or cls.keeps else ""
    return f"Sent: {', '.join(up_down)}. A client remembers {client}, the server {server}{size}."


def _held(cls: type[Any]) -> str:
    remembered = ", ".join(cls.memory) or "nothing"
    models = f"{cls.copies or 'no'} extra model{'s' * (cls.copies > 1)}"
    return (
        f"Off with `{cls.neutral}`: the same bits as without it. In a round a client holds "
        f"{models}; it remembers {remembered}. Nothing else is sent."
    )


def _matrix(strategies: dict[str, Any], regularizers: dict[str, Any]) -> str:
    head = ["| | " + " | ".join(f"`{name}`" for name in regularizers) + " |"]
    head.append("|---" * (len(regularizers) + 1) + "|")
    rows = [
        f"| `{name}` | " + " | ".join(_with_strategy(cls, other) for other in regularizers) + " |"
        for name, cls in strategies.items()
    ]
    rows += [
        f"| *`{name}`* | "
        + " | ".join(_together(regularizers, name, other) for other in regularizers)
        + " |"
        for name in regularizers
    ]
    return "\n".join([*head, *rows, ""])


def _with_strategy(cls: Any, regularizer: str) -> str:
    if regularizer in cls.regularizers:
        return PART
    if regularizer in cls.refuses or _refused_by_part(cls, regularizer):
        return REFUSED
    return NEEDLESS if regularizer in cls.redundant else WORKS


def _refused_by_part(cls: Any, regularizer: str) -> bool:
    known = methods("regularizers")
    return any(regularizer in known[part].refuses for part in cls.regularizers)


def _together(regularizers: dict[str, Any], one: str, other: str) -> str:
    if one == other:
        return ""
    apart = other in regularizers[one].refuses or one in regularizers[other].refuses
    return REFUSED if apart else WORKS


def _notes(strategies: dict[str, Any]) -> str:
    lines = []
    for name, cls in strategies.items():
        for other, reason in {**cls.refuses, **cls.redundant}.items():
            lines.append(f"- `{other}` with `{name}`: {reason}.")
    for name, cls in methods("regularizers").items():
        for other, reason in cls.refuses.items():
            if name < other:
                lines.append(f"- `{other}` with `{name}`: {reason}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
