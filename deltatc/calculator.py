"""Exact arithmetic for expressions that a model wrote: rational numbers, hard bounds, no evaluation of code.

Grammar: integers and decimals in ASCII digits, + - * /, unary minus and plus, parentheses; no powers, names or calls.
The bounds make hostile input cheap; they are not a sandbox, because nothing is ever executed.
"""

import re
from fractions import Fraction

from deltatc.errors import CalcError

MAX_CHARS = 128
MAX_TOKENS = 64
MAX_DEPTH = 16
MAX_VALUE = 10**18

_TOKEN = re.compile(r" *(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|([-+*/()])|($))")


def evaluate(expr: str) -> Fraction:
    """Return the exact value of an expression; raises CalcError outside the grammar or the bounds."""
    if len(expr) > MAX_CHARS:
        raise CalcError(f"the expression has {len(expr)} characters; expected at most {MAX_CHARS}")
    value, rest = _sum(_tokens(expr), 0)
    if rest:
        raise CalcError(f"{expr!r}: {rest[0]!r} is not expected there")
    return value


def _tokens(expr: str) -> list[str]:
    found, at = [], 0
    while at < len(expr):
        match = _TOKEN.match(expr, at)
        if match is None:
            raise CalcError(f"{expr!r}: {expr[at:].strip()[:1]!r} is not a digit, an operator or a parenthesis")
        at = match.end()
        if match[3] is None:
            found.append(match[1] or match[2])
    if len(found) > MAX_TOKENS:
        raise CalcError(f"the expression has {len(found)} numbers and signs; expected at most {MAX_TOKENS}")
    return found


def _sum(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens, depth)
    while tokens and tokens[0] in "+-":
        right, rest = _product(tokens[1:], depth)
        value, tokens = _bounded(value + right if tokens[0] == "+" else value - right), rest
    return value, tokens


def _product(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, tokens = _factor(tokens, depth)
    while tokens and tokens[0] in "*/":
        right, rest = _factor(tokens[1:], depth)
        if tokens[0] == "/" and right == 0:
            raise CalcError("division by zero")
        value, tokens = _bounded(value * right if tokens[0] == "*" else value / right), rest
    return value, tokens


def _factor(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    if depth > MAX_DEPTH:
        raise CalcError(f"the expression is nested deeper than {MAX_DEPTH}")
    if not tokens:
        raise CalcError("the expression ends where a number is expected")
    first, rest = tokens[0], tokens[1:]
    if first in "+-":
        value, rest = _factor(rest, depth + 1)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = _sum(rest, depth + 1)
        if not rest or rest[0] != ")":
            raise CalcError("a parenthesis is not closed")
        return value, rest[1:]
    if first in "*/)":
        raise CalcError(f"{first!r} stands where a number is expected")
    return _bounded(Fraction(first)), rest


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > MAX_VALUE or value.denominator > MAX_VALUE**2:
        raise CalcError(f"a value is beyond {MAX_VALUE:.0e} in size or precision")
    return value
