"""The calculator against Python's fractions, and against input that wants to hurt.

pytest tests/test_calculator.py
"""

import random
from fractions import Fraction

import pytest

from deltatc.calculator import evaluate
from deltatc.errors import CalcError

HOSTILE = [
    "", " ", "9**9**9", "4e6", "1e999", "2^3", "1//2", "1%2", "a+1", "__import__('os')", "1;2", "(1", "1)", "()",
    "1 2", "1+", "*1", "1/0", "1/(2-2)", "0/0", "1..2", "1.", "1.2.3", "\u0661+1", "\uff11+1", "1+1\x00", "inf",
    "nan", "0x10", "1_000", "(" * 40 + "1" + ")" * 40, "-" * 100 + "1", "1+" * 70 + "1", "9" * 129,
    "9" * 60 + "*" + "9" * 60, "f'1'", "[1]", "1,2", "x:=1", "1\n+1", "1\t+1", "True", "1 if 1 else 2",
]  # fmt: skip


def random_expression(draw: random.Random, depth: int) -> tuple[str, Fraction | None]:
    """Return an expression and its value built by another route: a tree of Fractions, None when it divides by zero."""
    if depth == 0 or draw.random() < 0.3:
        text = str(draw.randint(0, 999)) + (f".{draw.randint(0, 99)}" if draw.random() < 0.3 else "")
        return text, Fraction(text)
    op = draw.choice("+-*/")
    (a, x), (b, y) = random_expression(draw, depth - 1), random_expression(draw, depth - 1)
    text = f"({a}){op}({b})" if draw.random() < 0.5 else f"( {a} ) {op} ( {b} )"
    if x is None or y is None or (op == "/" and y == 0):
        return text, None
    return text, {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[op]()


def test_ten_thousand_expressions_equal_fractions():
    draw, checked = random.Random(0), 0
    while checked < 10_000:
        text, wanted = random_expression(draw, draw.randint(1, 3))
        if len(text) > 128:
            continue
        if wanted is None:
            with pytest.raises(CalcError):
                evaluate(text)
        else:
            assert evaluate(text) == wanted, text
        checked += 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), ("10-4-3", 3), ("100/5/2", 10), ("-3+5", 2), ("2*-3", -6),
     ("0.1+0.2", Fraction(3, 10)), ("7/3", Fraction(7, 3)), ("--2", 2), (" 1 + 1 ", 2), ("12/4*3", 9)],
)  # fmt: skip
def test_precedence_and_exactness(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_refused_with_the_typed_error(text):
    with pytest.raises(CalcError):
        evaluate(text)


def test_bounds_are_reached_not_passed():
    assert evaluate("10" + "0" * 17) == 10**18
    with pytest.raises(CalcError):
        evaluate("10" + "0" * 17 + "+1")
    assert evaluate("(" * 15 + "7" + ")" * 15) == 7
