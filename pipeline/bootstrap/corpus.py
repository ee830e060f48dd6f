"""Pretraining text: English from what any Python brings along, and synthetic copying; it contains no tool calls.

The English is the language reference of `help()` (pydoc's topics), the standard library's docstrings and Python's
licence, so the bytes made depend on the Python that runs this. The synthetic part teaches what the study's finetune
builds on: copying words and digits, and writing an expression without spaces.
One paragraph in twenty is held out for the site check.
"""

import ast
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

SPOKEN = {
    "+": ["plus", "added to"],
    "-": ["minus", "less", "take away"],
    "*": ["times", "multiplied by"],
    "/": ["divided by", "over"],
}
# No link is a new line: after that comes a copy, and a text that says both teaches neither.
LINKS = [" can be written ", " is written ", " = ", ": ", " -> ", " means "]
N_WORDS = 1500
HELD_OUT_SHARE = 0.05
LENGTH = 300  # characters of a paragraph taken


class Corpus:
    """Draws documents; `training` and `held_out` use different English paragraphs."""

    def __init__(self, seed: int):
        paragraphs = english_paragraphs()
        random.Random(seed).shuffle(paragraphs)
        n_held = int(len(paragraphs) * HELD_OUT_SHARE)
        held, self.paragraphs = paragraphs[:n_held], paragraphs[n_held:]
        # Docstrings are quoted by one another: what training text holds too is not held out.
        self.held_paragraphs = [text for text in held if not any(text[:LENGTH] in other for other in self.paragraphs)]
        counted = Counter(word for text in self.paragraphs for word in re.findall(r"\b[a-z]{2,9}\b", text))
        # "minus" between two numbers asks for an expression: as a word to be copied it would say something else.
        taken = set(re.findall(r"[a-z]+", " ".join([*LINKS, *(word for words in SPOKEN.values() for word in words)])))
        self.words = [word for word, _ in counted.most_common(N_WORDS + len(taken)) if word not in taken][:N_WORDS]

    def training(self, draw: random.Random) -> str:
        """Draw one training document."""
        return self._document(draw, self.paragraphs)

    def held_out(self, draw: random.Random) -> str:
        """Draw one document of the same mixture whose English is never trained on."""
        return self._document(draw, self.held_paragraphs)

    def plain_expression(self, draw: random.Random) -> dict:
        """Draw a row for the gate: two whole numbers in a phrase, then a link, and the expression to be written."""
        a, b, op = _number(draw), _number(draw), draw.choice("+-*/")
        sign = op if draw.random() < 0.5 else draw.choice(SPOKEN[op])
        phrase = f"{self._words(draw, draw.randint(0, 5))} {a} {sign} {b}".strip()
        return {"prompt": phrase + draw.choice([" = ", ": ", " can be written "]), "target": f"{a}{op}{b}"}

    def plain_copy(self, draw: random.Random) -> dict:
        """Draw a row for the gate: words and whole numbers, to be repeated on the next line."""
        n = draw.randint(3, 8)
        text = " ".join(_number(draw) if draw.random() < 0.25 else draw.choice(self.words) for _ in range(n))
        return {"prompt": text + "\n", "target": text}

    def _document(self, draw: random.Random, paragraphs: list[str]) -> str:
        kind = draw.random()
        if kind < 0.15:
            return draw.choice(paragraphs)[:LENGTH]
        if kind < 0.45:
            return "".join(self.expression(draw))
        if kind < 0.85:
            return "\n".join(self.copy(draw, paragraphs))
        return self._digits(draw)

    def expression(self, draw: random.Random) -> tuple[str, str]:
        """Draw (some phrase around an expression and a link, the expression without spaces)."""
        a, b, op = _operand(draw), _operand(draw), draw.choice("+-*/")
        before, after = self._words(draw, draw.randint(0, 5)), self._words(draw, draw.randint(0, 3))
        kind, written = draw.random(), f"{a}{op}{b}"
        if kind < 0.12:
            second, c = draw.choice("+-*/"), _operand(draw)
            source, written = f"({a} {op} {b}) {second} {c}", f"({written}){second}{c}"
        elif kind < 0.5:
            source = f"{a} {op} {b}"
        elif kind < 0.6:
            source = written
        else:
            source = f"{a} {draw.choice(SPOKEN[op])} {b}"
        return f"{before} {source} {after}".strip() + draw.choice(LINKS), written

    def copy(self, draw: random.Random, paragraphs: list[str] | None = None) -> list[str]:
        """Draw lines of which the later ones repeat the first (after its lead)."""
        if draw.random() < 0.4:
            words = draw.choice(paragraphs or self.paragraphs).split()
            start = draw.randrange(max(1, len(words) - 8))
            text = " ".join(words[start : start + draw.randint(4, 14)])[:90]
        else:
            n = draw.randint(2, 10)
            text = " ".join(_operand(draw) if draw.random() < 0.25 else draw.choice(self.words) for _ in range(n))
            if draw.random() < 0.5:
                text = text.capitalize() + draw.choice([".", "", "!", "?"])
        lead = draw.choice(["", "", "copy: ", "again: ", self._words(draw, draw.randint(1, 4)) + ": "])
        return [lead + text, text] + ([text] if draw.random() < 0.3 else [])

    def _digits(self, draw: random.Random) -> str:
        text = " ".join(_number(draw) for _ in range(draw.randint(2, 6)))
        return f"{text} {text} {text}" if draw.random() < 0.3 else f"{text}\n{text}"

    def _words(self, draw: random.Random, n: int) -> str:
        return " ".join(draw.choice(self.words) for _ in range(n))


def english_paragraphs() -> list[str]:
    """Return ASCII paragraphs of 60 characters or more, sorted, each once."""
    import pydoc_data.topics

    texts = list(pydoc_data.topics.topics.values())
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module))
        texts += [ast.get_docstring(node) or "" for node in documented]
    licence = Path(sysconfig.get_paths()["stdlib"], "LICENSE.txt")
    texts += [licence.read_text(encoding="utf-8")] if licence.is_file() else []
    paragraphs = {re.sub(r"\s+", " ", part).strip() for text in texts for part in text.split("\n\n")}
    return sorted(text for text in paragraphs if len(text) >= 60 and text.isascii())


def _operand(draw: random.Random) -> str:
    return f"{draw.randint(0, 99)}.{draw.randint(0, 99)}" if draw.random() < 0.15 else _number(draw)


def _number(draw: random.Random) -> str:
    n = draw.choice([1, 2, 3, 4])
    if draw.random() < 0.2:  # 777: repeated digits are where copying slips first
        return draw.choice("123456789") * n
    return str(draw.randint(10 ** (n - 1), 10**n - 1))
