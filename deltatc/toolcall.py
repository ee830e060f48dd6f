"""The tool-call grammar: `<tool_call>calculator(EXPR)</tool_call>`, rendered, recognised and checked.

A rate that counts a string anywhere in the text counts echoes of the prompt; here a call starts the text, and a valid
one is the whole text.
"""

from typing import NamedTuple

from deltatc.calculator import evaluate
from deltatc.errors import CalcError

OPEN = "<tool_call>"
CALL = f"{OPEN}calculator("
CLOSE = ")</tool_call>"


class ToolCall(NamedTuple):
    """A well-formed call."""

    expr: str


def render(expr: str) -> str:
    """Return the call that asks for the value of `expr`."""
    return f"{CALL}{expr}{CLOSE}"


def starts_call(text: str) -> bool:
    """Say whether the text starts with the opening tag."""
    return text.startswith(OPEN)


def parse(text: str) -> ToolCall | None:
    """Return the call that is the whole text, or None: one call, closed, with an expression of balanced parentheses."""
    if not (text.startswith(CALL) and text.endswith(CLOSE) and len(text) > len(CALL) + len(CLOSE)):
        return None
    expr = text[len(CALL) : -len(CLOSE)]
    depth = 0
    for character in expr:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return None
    return None if depth or "<" in expr or ">" in expr or not expr.strip() else ToolCall(expr)


def is_valid(text: str, ended: bool) -> bool:
    """Say whether the generation is exactly one call and then stopped by itself (`ended`: EOS came)."""
    return ended and parse(text) is not None


def is_correct(text: str, ended: bool, gold: str) -> bool:
    """Say whether a valid call's exact value is that of the gold expression."""
    call = parse(text) if ended else None
    if call is None:
        return False
    try:
        return evaluate(call.expr) == evaluate(gold)
    except CalcError:
        return False
