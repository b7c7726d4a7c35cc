"""Answers as NumPy, sympy and Python print them, and as people type them."""

import pytest

from tir_alp.envs.grading import Grade, grade

RIGHT = [
    ("np.pi", "\\pi"),
    ("math.sqrt(2)", "\\sqrt2"),
    ("sp.Rational(1, 2)", "\\frac12"),
    ("Rational('1/3')", "\\frac13"),
    ("S(1)/3", "\\frac13"),
    ("Decimal('0.5')", "\\frac12"),
    ("root(2, 3)", "\\sqrt[3]{2}"),
    ("(1+2j)", "1+2i"),
    ("1j", "i"),
    ("array([1, 2])", "(1,2)"),
    ("np.array([[1, 2], [3, 4]])", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("EmptySet", "\\emptyset"),
    ("set()", "\\emptyset"),
    ("frozenset({1, 2})", "\\{1,2\\}"),
    ("GoldenRatio", "\\frac{1+\\sqrt5}{2}"),
    ("Eq(y, 2*x)", "y=2x"),
    ("1_000", "1000"),
    ("x\u00b2+1", "x^2+1"),
    ("10\u207b\u00b3", "0.001"),
    ("204\u2085", "204_5"),
    ("\u00a318", "18"),
    ("18 \u20ac", "18"),
    ("18\u00b0C", "18"),
    ("18 cm\u00b2", "18"),
    ("\\approx 7", "7"),
    ("\\color{red}{7}", "7"),
    ("{\\large 7}", "7"),
]
WRONG = [
    ("6\u00b2", "36"),
    ("37*np.pi/np.pi", "37"),
    ("math.factorial(4)", "24"),
    ("Decimal('6')*7", "42"),
    ("np.array([1, 2])", "(2,1)"),
    ("1j", "1"),
    ("2j", "2"),
    ("S(6)*7", "42"),
    ("root(4, 2)*21", "43"),
    ("1_000", "1"),
    ("204\u2085", "204_6"),
    ("\u00a318", "19"),
    ("18\u00b0C", "19"),
    ("Eq(y, 2*x)", "y=3x"),
    ("GoldenRatio", "1.618"),
    ("EmptySet", "0"),
    ("Decimal('1e999999999')", "5"),
    ("Rational('9'*9**9)", "5"),
    ("np.array([[9**9**9**9]])", "5"),
    ("os.system", "5"),
    ("np.load('x')", "5"),
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_a_right_answer_is_right(answer, truth):
    assert grade(answer, truth) == Grade(correct=True)


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_a_wrong_answer_is_wrong_and_never_vanishes(answer, truth):
    assert grade(answer, truth).correct is False
