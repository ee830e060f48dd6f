"""The prompts: tool calls and copies from templates, or external datasets, in splits that share nothing.

Rows are {input, target, label, template, expr}; `label` is the subset. Splits are disjoint in operand tuples
(a, op, b) and in copied sentences; the OOD subsets are also disjoint in templates. External files are external.py's.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deltatc.config import Prompts
from deltatc.errors import DataError
from deltatc.files import read_json
from deltatc.toolcall import OPEN, render

SUBSETS = ("tool", "copy", "tool_ood", "copy_ood", "tool_decimal", "tool_two_step")
SPLITS = ("finetune_train", "finetune_validation", "delta_train", "delta_validation", "eval")
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
CONTEXT_SHARE = 0.3  # of tool rows that start with a sentence of context


class Prompted(NamedTuple):
    """The splits, and what happened to the rows on the way."""

    rows: dict[str, list[dict]]
    """{split: rows}."""
    dropped: dict[str, int]
    """{reason: rows} that overlap or cannot be used."""


class Generator:
    """Draws rows of every subset; no operand tuple and no sentence is drawn twice, whatever split it goes to."""

    def __init__(self, source: str | Path, seed: int):
        folder = Path(source)
        for name in ("templates.json", "words.json", "numbers.json"):
            if not (folder / name).is_file():
                raise DataError(f"{folder / name} is missing; run `dvc pull data.dvc models.dvc`")
        self.templates = read_json(folder / "templates.json")
        self.words = read_json(folder / "words.json")
        self.numbers = read_json(folder / "numbers.json")
        self.random = random.Random(seed)
        self.used: set[str] = set()

    def row(self, label: str) -> dict:
        """Draw one row of a subset."""
        return self._copy(label) if label.startswith("copy") else self._tool(label)

    def _tool(self, label: str) -> dict:
        # Every phrasing is as likely: "the difference between" has to be learned as often as "{a} - {b}".
        choices = [(group, i) for group, phrasings in self.templates[label].items() for i in range(len(phrasings))]
        group, index = self.random.choice(choices)
        op = self.random.choice("+-*/") if group == "any" else group
        a, b, expr, spaced = self._fresh(lambda: self._operands(label, op))
        text = self.templates[label][group][index].format(a=a, b=b, op=op, word=WORDS[op], expr=spaced)
        if label == "tool" and self.random.random() < CONTEXT_SHARE:
            text = f"{self.random.choice(self.words['context'])} {text}"
        return make_row(text, render(expr), label, f"{label}/{group}{index}", expr)

    def _operands(self, label: str, op: str) -> tuple[str, str, str, str]:
        """Return (a, b, the expression as called, the expression as written in a prompt)."""
        number = self._decimal if label == "tool_decimal" else self._integer
        a, b = number(), number()
        if label != "tool_two_step":
            return a, b, f"{a}{op}{b}", f"{a} {op} {b}"
        c, second = number(), self.random.choice("+-*/")
        if op == "-" and second == "/" and a == b:
            b = f"{int(b) + 1}"  # nothing is divided by zero
        if self.random.random() < 0.5:
            return a, b, f"({a}{op}{b}){second}{c}", f"({a} {op} {b}) {second} {c}"
        if (op == "-" and second == "/") or a == b:
            second = "+"
        return a, b, f"{c}{second}({a}{op}{b})", f"{c} {second} ({a} {op} {b})"

    def _copy(self, label: str) -> dict:
        patterns = self.templates[label]
        index = self.random.randrange(len(patterns))
        (text,) = self._fresh(lambda: (re.sub(r"\{(\w+)\}", self._fill, patterns[index]),))
        return make_row(text, text, label, f"{label}/{index}", None)

    def _fill(self, match: re.Match) -> str:
        return (
            self._digits(*self.numbers["copy_digits"]) if match[1] == "n" else self.random.choice(self.words[match[1]])
        )

    def _fresh(self, draw: Any) -> tuple:
        for _ in range(1000):
            found = draw()
            if found[-1] not in self.used:
                self.used.add(found[-1])
                return found
        raise DataError("the templates and numbers in data/ are used up; ask for fewer rows in params.yaml: prompts")

    def _integer(self) -> str:
        return self._digits(*self.numbers["digits"])

    def _decimal(self) -> str:
        places = self.random.randint(*self.numbers["decimal_places"])
        fraction = "".join(self.random.choice("0123456789") for _ in range(places - 1))
        return f"{self._digits(*self.numbers['decimal_digits'])}.{fraction}{self.random.choice('123456789')}"

    def _digits(self, low: int, high: int) -> str:
        n = self.random.randint(low, high)
        return str(self.random.randint(10 ** (n - 1), 10**n - 1))


def generate_splits(source: str | Path, settings: Prompts) -> dict[str, list[dict]]:
    """Return {split: rows} from the project's own templates."""
    generator = Generator(source, settings.seed)
    sizes = {
        "finetune_train": settings.n_finetune,
        "finetune_validation": settings.n_finetune_validation,
        "delta_train": settings.n_delta,
        "delta_validation": settings.n_delta_validation,
    }
    splits = {}
    for split, n in sizes.items():
        n_copy = round(n * settings.copy_fraction)
        rows = [generator.row("copy" if i < n_copy else "tool") for i in range(n)]
        generator.random.shuffle(rows)
        splits[split] = rows
    splits["eval"] = [generator.row(label) for label in SUBSETS for _ in range(settings.n_eval)]
    check_splits(splits)
    return splits


def check_splits(splits: Mapping[str, list[dict]], allow_shared_expressions: bool = False) -> None:
    """Refuse splits that share a prompt, an expression, or (OOD) a template, and OOD prompts that show the call's tag.

    External data may share expressions, templates and tags: it was written without this rule.
    """
    home: dict[str, str] = {}
    for split, rows in splits.items():
        for row in rows:
            expr = None if allow_shared_expressions else row["expr"]
            for item in {row["input"], expr or row["input"]}:
                if home.setdefault(item, split) != split:
                    raise DataError(f"{item!r} is in both {home[item]} and {split}; splits must be disjoint")
    if allow_shared_expressions:
        return
    trained = {row["template"] for split, rows in splits.items() if split != "eval" for row in rows}
    for row in splits["eval"]:
        if row["label"].endswith("_ood") and (row["template"] in trained or OPEN in row["input"]):
            raise DataError(f"the OOD prompt {row['input']!r} has a trained template or shows {OPEN}")


def counts(splits: Mapping[str, list[dict]]) -> dict[str, dict[str, int]]:
    """Return {split: {subset: rows}}."""
    return {split: dict(Counter(row["label"] for row in rows)) for split, rows in splits.items()}


def make_row(text: str, target: str, label: str, template: str, expr: str | None) -> dict:
    """Return a row of the prompts' JSONL files."""
    return {"input": text, "target": target, "label": label, "template": template, "expr": expr}
