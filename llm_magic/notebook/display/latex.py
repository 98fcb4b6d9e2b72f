r"""Formulas in an answer: the rules that parse them, and the commands that are typeset.

The delimiters are ``$…$``, ``$$…$$``, ``\(…\)``, ``\[…\]`` and ``\begin{align}…\end{align}`` with the
other environments of amsmath. JupyterLab's MathJax typesets whatever is TeX. Some of its commands
write links, styles and ids (``\href``, ``\style``, ``\bbox``, ``\fcolorbox``, ``\mmlToken``, …), load
code (``\require``) or change every later formula of the page (``\def``). So a formula is typeset only
if it is made of commands on the list below; of any other its source is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline

    BlockRule = Callable[[StateBlock, int, int, bool], bool]

# A longer one would block the page while MathJax works on it.
_MAX_FORMULA = 5_000

# The plugins have no rule for brackets that takes linear time. The bodies exclude a second opening
# bracket: else thousands of unclosed ones would each be searched to the end.
_BRACKETS = re.compile(
    r"\\\( ((?: [^\\] | \\[^()] )++) \\\) | \\\[ ((?: [^\\] | \\[^][] )++) \\\]",
    re.VERBOSE | re.DOTALL,
)
_BRACKET_BLOCK = re.compile(r"\\\[((?:[^\\]|\\[^][])++)\\\][ \t]*(?:\n|\Z)")
# "from $5/month to 3$": words after a number and nothing of TeX.
_MONEY = re.compile(r"\d[^\\^_={}]*\Z")
_WORD = re.compile(r"[A-Za-z]{3}")
# MathJax complains about a label it has seen, and an answer is rendered again as it grows.
_LABEL = re.compile(r"(?<!\\)((?:\\\\)*)\\label\s*\{[^{}\\]*\}")
_COMMAND = re.compile(r"\\(?:([A-Za-z]+)|.)", re.DOTALL)
_ENVIRONMENT_TAGS = re.compile(r"\\(?:begin|end)(?![A-Za-z])(?:\{([A-Za-z]+\*?)\})?")
_INTERRUPTED = ["paragraph", "reference", "blockquote", "list"]


def add_rules(parser: MarkdownIt) -> None:
    """Add the rules for formulas to a parser; their tokens are ``math_inline`` and ``math_block``."""
    from mdit_py_plugins.amsmath import amsmath_block
    from mdit_py_plugins.dollarmath.index import math_block_dollar, math_inline_dollar

    dollars = math_inline_dollar(allow_space=False, allow_digits=False, allow_double=True)
    parser.inline.ruler.before("escape", "math_dollars", _inline_rule(dollars))
    parser.inline.ruler.before("escape", "math_brackets", _inline_brackets)
    blocks: dict[str, BlockRule] = {
        "$$": math_block_dollar(allow_labels=False, allow_blank_lines=False),
        "\\[": _block_brackets,
        "\\begin{": amsmath_block,
    }
    for opening, rule in blocks.items():
        parser.block.ruler.before(
            "fence", f"math {opening}", _block_rule(opening, rule), {"alt": _INTERRUPTED}
        )


def _inline_rule(
    rule: Callable[[StateInline, bool], bool],
) -> Callable[[StateInline, bool], bool]:
    """Return the plugin's rule for dollars, which does not take an amount of money for a formula."""

    def run(state: StateInline, only_check: bool) -> bool:
        start, source = state.pos, state.src
        if source[start] != "$":
            return False
        if start == 0:
            # The plugin reads the last character where it should read the one before the first.
            state.src += " "
        try:
            found = rule(state, True) and state.pos <= state.posMax
            tex, state.pos = source[start + 1 : state.pos - 1], start
            if not found or (_MONEY.match(tex) and _WORD.search(tex)):
                return False
            return rule(state, only_check)
        finally:
            state.src = source

    return run


def _inline_brackets(state: StateInline, only_check: bool) -> bool:
    match = _BRACKETS.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not only_check:
        token = state.push("math_inline" if match[1] else "math_inline_double", "math", 0)
        token.content = match[match.lastindex or 0]
    state.pos = match.end()
    return True


def _block_rule(opening: str, rule: BlockRule) -> BlockRule:
    """Return a rule that takes a formula to the end of its paragraph, list item or quotation at most.

    The rules of the plugins do not stop there, and push a token where they should only search.
    """

    def run(state: StateBlock, start_line: int, end_line: int, only_check: bool) -> bool:
        start = state.bMarks[start_line] + state.tShift[start_line]
        if not state.src.startswith(opening, start) or state.is_code_block(start_line):
            return False
        end = start_line + 1
        while end < end_line and not state.isEmpty(end) and state.sCount[end] >= state.blkIndent:
            end += 1
        state.env["steps"] += end - start_line  # `markdown` counts and limits them
        line, count = state.line, len(state.tokens)
        found = rule(state, start_line, end, False)
        tex = state.getLines(start_line, state.line, state.blkIndent, False).strip()
        if opening != "\\begin{":
            tex = tex[2:-2]
        found = found and bool(tex.strip()) and not (opening == "$$" and "$$" in tex)
        if only_check or not found:
            del state.tokens[count:]
            state.line = line
        else:
            token = state.tokens[-1]
            token.type, token.content, token.map = "math_block", tex, [start_line, state.line]
        return found

    return run


def _block_brackets(state: StateBlock, start_line: int, end_line: int, _only_check: bool) -> bool:
    text = state.getLines(start_line, end_line, state.blkIndent, False).lstrip()
    match = _BRACKET_BLOCK.match(text)
    if match is None:
        return False
    state.push("math_block", "math", 0).block = True
    state.line = start_line + match[0].rstrip("\n").count("\n") + 1
    return True


def delimited(tex: str, display: bool) -> str:
    """Return the formula (not escaped) with the delimiters that every typesetter supports."""
    tex = _LABEL.sub(r"\1", tex)
    return f"\\[{tex}\\]" if display else f"\\({tex}\\)"


def is_harmless(tex: str) -> bool:
    """Return whether a formula can only draw itself."""
    if len(tex) > _MAX_FORMULA:
        return False
    tex = _LABEL.sub(r"\1", tex)
    commands, environments = set(_COMMAND.findall(tex)), set(_ENVIRONMENT_TAGS.findall(tex))
    return commands <= _known_commands() and environments <= _ENVIRONMENTS


@cache
def _known_commands() -> frozenset[str]:
    # "" stands for the commands of one character, as in `\{` and `\,`.
    return frozenset({"", "begin", "end", *_SYMBOLS.split(), *_MACROS.split()})


_ENVIRONMENT_NAMES = """
align align* alignat alignat* aligned alignedat array Bmatrix bmatrix cases dcases drcases eqnarray
eqnarray* equation equation* flalign flalign* gather gather* gathered matrix multline multline*
pmatrix rcases smallmatrix split subarray Vmatrix vmatrix
"""
_ENVIRONMENTS = frozenset(_ENVIRONMENT_NAMES.split())

# The symbols of MathJax 3.2 (base, ams, gensymb), without the rare ones.
_SYMBOLS = """
aleph alpha amalg angle approx approxeq ast asymp backepsilon backprime backsim backsimeq backslash
barwedge because beta beth between bigcap bigcirc bigcup bigodot bigoplus bigotimes bigsqcup bigstar
bigtriangledown bigtriangleup biguplus bigvee bigwedge blacklozenge blacksquare blacktriangle
blacktriangledown blacktriangleleft blacktriangleright bot bowtie Box boxdot boxminus boxplus
boxtimes bullet Bumpeq bumpeq Cap cap cdot cdotp cdots celsius centerdot checkmark chi circ circeq
circlearrowleft circlearrowright circledast circledcirc circleddash circledS clubsuit colon
complement cong coprod Cup cup curlyeqprec curlyeqsucc curlyvee curlywedge curvearrowleft
curvearrowright dagger daleth dashleftarrow dashrightarrow dashv ddagger ddots degree Delta delta
Diamond diamond diamondsuit digamma div divideontimes Doteq doteq doteqdot dotplus dotsb dotsc dotsi
dotsm dotso doublebarwedge doublecap doublecup Downarrow downarrow downdownarrows downharpoonleft
downharpoonright ell emptyset epsilon eqcirc eqsim eqslantgtr eqslantless equiv eta exists
fallingdotseq flat forall frown Gamma gamma ge geq geqq geqslant gets gg ggg gggtr gimel gnapprox
gneq gneqq gnsim gt gtrapprox gtrdot gtreqless gtreqqless gtrless gtrsim gvertneqq hbar heartsuit
hookleftarrow hookrightarrow hslash iiiint iiint iint Im imath impliedby implies in infty int
intercal intop iota jmath Join kappa Lambda lambda land langle lbrace lbrack lceil ldotp ldots le
leadsto Leftarrow leftarrow leftarrowtail leftharpoondown leftharpoonup leftleftarrows
Leftrightarrow leftrightarrow leftrightarrows leftrightharpoons leftrightsquigarrow leftthreetimes
leq leqq leqslant lessapprox lessdot lesseqgtr lesseqqgtr lessgtr lesssim lfloor lhd ll llcorner
Lleftarrow lll llless lmoustache lnapprox lneq lneqq lnot lnsim Longleftarrow longleftarrow
Longleftrightarrow longleftrightarrow longmapsto Longrightarrow longrightarrow looparrowleft
looparrowright lor lozenge lparen lrcorner Lsh lt ltimes lVert lvert lvertneqq mapsto measuredangle
mho micro mid models mp mu multimap nabla natural ncong ne nearrow neg neq nexists ngeq ngeqq
ngeqslant ngtr ni nLeftarrow nleftarrow nLeftrightarrow nleftrightarrow nleq nleqq nleqslant nless
nmid notin nparallel nprec npreceq nRightarrow nrightarrow nshortmid nshortparallel nsim nsubseteq
nsubseteqq nsucc nsucceq nsupseteq nsupseteqq ntriangleleft ntrianglelefteq ntriangleright
ntrianglerighteq nu nVDash nVdash nvDash nvdash nwarrow odot ohm oint Omega omega omicron ominus
oplus oslash otimes owns parallel partial perp perthousand Phi phi Pi pi pitchfork pm prec
precapprox preccurlyeq preceq precnapprox precneqq precnsim precsim prime prod propto Psi psi rangle
rbrace rbrack rceil Re restriction rfloor rhd rho Rightarrow rightarrow rightarrowtail
rightharpoondown rightharpoonup rightleftarrows rightleftharpoons rightrightarrows rightsquigarrow
rightthreetimes risingdotseq rmoustache rparen Rrightarrow Rsh rtimes rVert rvert S searrow setminus
sharp shortmid shortparallel Sigma sigma sim simeq smallfrown smallint smallsetminus smallsmile
smile spadesuit sphericalangle sqcap sqcup sqsubset sqsubseteq sqsupset sqsupseteq square star
Subset subset subseteq subseteqq subsetneq subsetneqq succ succapprox succcurlyeq succeq succnapprox
succneqq succnsim succsim sum Supset supset supseteq supseteqq supsetneq supsetneqq surd swarrow tau
therefore Theta theta thickapprox thicksim times to top triangle triangledown triangleleft
trianglelefteq triangleq triangleright trianglerighteq twoheadleftarrow twoheadrightarrow ulcorner
unlhd unrhd Uparrow uparrow Updownarrow updownarrow upharpoonleft upharpoonright uplus Upsilon
upsilon upuparrows urcorner varDelta varepsilon varGamma varkappa varLambda varnothing varOmega
varPhi varphi varPi varpi varpropto varPsi varrho varSigma varsigma varsubsetneq varsubsetneqq
varsupsetneq varsupsetneqq varTheta vartheta vartriangle vartriangleleft vartriangleright varUpsilon
varXi Vdash vDash vdash vdots vee veebar Vert vert Vvdash wedge wp wr Xi xi zeta
"""

# Its commands that change how something is drawn, without those that take a URL, a color or an
# attribute, define or load something, or shift their argument over the text around it.
_MACROS = """
acute arccos arcsin arctan arg atop bar Bbb bcancel bf Big big Bigg bigg Biggl biggl Biggm biggm
Biggr biggr Bigl bigl Bigm bigm Bigr bigr binom bmod boldsymbol boxed Bra bra brace brack Braket
braket breve cal cancel cancelto ce centernot cfrac check choose coloneq coloneqq cos cosh cot coth
csc dbinom ddddot dddot ddot deg det dfrac dim displaystyle dot dots enspace eqqcolon exp fbox frac
frak gcd genfrac grave hat hdashline hline hom hphantom hspace idotsint iff inf injlim it ker Ket
ket Ketbra ketbra Large large LaTeX left lg lim liminf limits limsup ln log mathbb mathbf mathbin
mathcal mathclap mathclose mathfrak mathinner mathit mathnormal mathop mathopen mathord mathpunct
mathrel mathring mathrm mathscr mathsf mathtt max mbox middle min mod negmedspace negthickspace
negthinspace newline nobreakspace nolimits nonumber not notag operatorname over overbrace
overbracket overleftarrow overleftrightarrow overline overparen overrightarrow overset phantom pmb
pmod pod Pr prescript projlim pu qquad quad right rm scr scriptscriptstyle scriptstyle sec Set set
sf sideset sin sinh small smash splitfrac sqrt stackbin stackrel substack sup tag tan tanh tbinom
TeX text textbf textdegree textit textnormal textrm textsf textstyle texttimes texttt textup tfrac
thinspace tilde tiny tripledash tt underbrace underbracket underleftarrow underleftrightarrow
underline underparen underrightarrow underset varinjlim varliminf varlimsup varprojlim vec vphantom
widehat widetilde xcancel xLeftarrow xleftarrow xLeftrightarrow xleftrightarrow xLeftrightharpoons
xlongequal xmapsto xRightarrow xrightarrow xRightleftharpoons xrightleftharpoons xtofrom
xtwoheadleftarrow xtwoheadrightarrow
"""
