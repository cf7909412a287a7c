"""Formulas as MathML, which browsers draw by themselves: no JavaScript, no fonts to fetch, readable by screen readers."""
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

log = logging.getLogger(__name__)
BARS = re.compile(r"<mo[^>]*>&#x02016;</mo>")
LIMITS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}


def move_limits(mathml):
    "Put what stands at a sum below and above it; browsers move it back beside the sum where a line is too low for that."
    for beside, below in LIMITS.items():
        pattern = re.compile(rf"<{beside}>(<mo>&#x02211;</mo>)((?:(?!</?{beside}>).)*)</{beside}>")
        mathml = pattern.sub(rf"<{below}>\1\2</{below}>", mathml)
    return mathml


def pair_bars(mathml, latex):
    "Say of each norm bar whether it opens or closes; undeclared, browsers space them like a relation."
    sides = iter(re.findall(r"\\([lr])Vert", latex))
    def declare(match):
        side = next(sides, None)
        return f'<mo form="{"prefix" if side == "l" else "postfix"}" stretchy="false">&#x02016;</mo>' if side else match.group()
    return BARS.sub(declare, mathml)


def pieces(latex):
    "A formula cut at its wide spaces (outside braces), so that a narrow page can set the pieces one below the other."
    depth, cuts = 0, [0]
    for token in re.finditer(r"\\q?quad(?![a-zA-Z])|\\.|[{}]", latex):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if "quad" in token.group() and not depth: cuts += [token.start(), token.end()]
    cuts.append(len(latex))
    return [piece for start, end in zip(cuts[::2], cuts[1::2]) if (piece := latex[start:end].strip())]


def to_mathml(latex, display):
    "MathML of a formula; `display` is 'inline' or 'block'. A formula that cannot be read raises."
    mathml = convert(latex.strip(), display=display)
    mathml = re.sub(r"<mi>(log|exp|max|min)</mi>(?!<mo[^>]*>&#x00028;)", r'<mi>\1</mi><mspace width="0.167em" />', mathml)
    mathml = mathml.replace("<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>")            # infinity is a thing, not an operator
    mathml = mathml.replace(r"\lfloor", "&#x0230A;").replace(r"\rfloor", "&#x0230B;").replace('width="negativethinmathspace"', 'width="-0.167em"')
    if "\\" in re.sub(r"<annotation.*?</annotation>", "", mathml): raise ValueError("a command is left in the output")
    return pair_bars(move_limits(mathml), latex)


def draw(translator, node, display):
    try: mathml = "".join(to_mathml(piece, display) for piece in (pieces(node.astext()) if display == "block" else [node.astext()]))
    except Exception as error:
        log.warning("formula %r cannot be turned into MathML: %s", node.astext(), error, location=node)
        mathml = f"<code>{translator.encode(node.astext())}</code>"
    if display == "block": mathml = f'<div class="math-block" tabindex="0" role="group" aria-label="formula">{mathml}</div>'
    translator.body.append(mathml)


def visit_inline(translator, node):
    draw(translator, node, "inline")
    raise nodes.SkipNode


def visit_block(translator, node):
    draw(translator, node, "block")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
