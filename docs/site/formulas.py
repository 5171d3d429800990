"""Formulas: of docstrings into LaTeX, and of LaTeX into MathML."""

import re

from docutils import nodes
from latex2mathml.converter import convert

# In a docstring a formula is text that reads well in an editor. In this order:
RULES = (
    (r"\s+", " "),
    (r"<(\S[^<>]*)>", r"\\left\\langle \1 \\right\\rangle "),  # not "i < j"
    (r"\|\|(.+?)\|\|", r"\\left\\lVert \1 \\right\\rVert "),
    (r"\|(.+?)\|", r"\\left\\lvert \1 \\right\\rvert "),
    (r"\bsum over (\w) of\b", r"\\sum_{\1}"),
    (r"\b(max|min) over (\w) of\b", r"\\\1_{\2}"),
    (r"\bmean over pairs( i < j)? of\b", r"\\underset{i<j}{\\mathrm{mean}}"),
    (r"(?<!\\)\b(cos|max)\(", r"\\\1("),
    (r"\bd([A-Z])/d(\w)", r"\\frac{\\partial \1}{\\partial \2}"),
    (r"\bE\b", r"\\mathbb{E}\\,"),
    (r"\bgamma\b", r"\\gamma"),
    (r"(?<!\\)\bsum\b(?!_)", r"\\sum"),
    (r" \* ", r" \\cdot "),
)
# Words, and single letters among them, that are left: prose.
PROSE = re.compile(r"(?<![\\{A-Za-z_])[A-Za-z]{2,}(?: (?:[A-Za-z]{2,}|[a-z](?= [A-Za-z]{2})))*")
COMMANDS = re.compile(r"(\\mathrm\{\w+\}|\\[A-Za-z]+)")


def latex(formula: str) -> tuple[list[str], list[str]]:
    """A docstring's formula in LaTeX: its lines, and those that explain its letters."""
    first, *others = ([_latex(line) for line in part.splitlines()] for part in _parts(formula))
    return first, [line for part in others for line in part]


def _parts(formula: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for at, letter in enumerate(formula):
        opens = letter in "([" or (letter == "<" and formula[at + 1 : at + 2].strip())
        closes = letter in ")]" or (letter == ">" and formula[at - 1 : at].strip())
        depth += bool(opens) - bool(closes)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _latex(text: str) -> str:
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    pieces = COMMANDS.split(text)  # every second one is a command, which holds no prose
    pieces[::2] = [PROSE.sub(lambda m: rf"\text{{ {m[0]} }}", piece) for piece in pieces[::2]]
    return "".join(pieces).strip()


def visit_inline(translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode
