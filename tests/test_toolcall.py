"""The tool-call grammar: what counts as a call, and what only looks like one.

pytest tests/test_toolcall.py
"""

import pytest

from deltatc.toolcall import is_correct, is_valid, parse, render, starts_call

GOOD = "<tool_call>calculator(12+30)</tool_call>"


@pytest.mark.parametrize("expr", ["12+30", "1.5/2", "(3+4)*5", "((1))", "2 + 2", "1/0"])
def test_rendered_calls_parse_back(expr):
    call = parse(render(expr))
    assert call is not None and call.expr == expr
    assert is_valid(render(expr), ended=True) and starts_call(render(expr))


@pytest.mark.parametrize(
    "text",
    ["", "12+30", " " + GOOD, GOOD + " ", GOOD + GOOD, GOOD[:-1], GOOD.replace("calculator", "calc"), "say " + GOOD,
     "<tool_call>calculator()</tool_call>", "<tool_call>calculator( )</tool_call>",
     "<tool_call>calculator(1))</tool_call>", "<tool_call>calculator((1)</tool_call>",
     "<tool_call>calculator)1(</tool_call>", "<tool_call>calculator(1)",
     "<tool_call>calculator(1)(2)</tool_call>"[:-13]],
)  # fmt: skip
def test_what_is_not_one_whole_call_is_refused(text):
    assert parse(text) is None and not is_valid(text, ended=True) and not is_correct(text, True, "12+30")


def test_two_calls_are_not_one():
    assert parse("<tool_call>calculator(1)</tool_call><tool_call>calculator(2)</tool_call>") is None


def test_a_call_without_an_end_is_not_valid():
    assert not is_valid(GOOD, ended=False) and not is_correct(GOOD, False, "12+30")


def test_correct_means_the_exact_value():
    assert is_correct(GOOD, True, "30+12") and is_correct(render("1/3"), True, "2/6")
    assert not is_correct(render("0.3333333333"), True, "1/3")
    assert not is_correct(render("1/0"), True, "1/0") and not is_correct(render("x"), True, "1")


def test_only_the_start_of_the_text_starts_a_call():
    assert starts_call("<tool_call>anything") and not starts_call("the tag <tool_call>") and not starts_call("<tool")
