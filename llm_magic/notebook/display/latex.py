r"""Formulas in an answer: found before Markdown spoils them, and kept harmless.

JupyterLab's MathJax typesets whatever looks like TeX. Some of its commands write links, styles
and ids (``\href``, ``\style``, ``\bbox``, ``\fcolorbox``, ``\mmlToken``, …), load code
(``\require``) or change every later formula of the page (``\def``). So a formula is typeset only
if it is made of known commands; else its source is shown.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline

# A longer one would block the page while MathJax works on it.
_MAX_FORMULA = 5_000

# The bodies exclude a second opening delimiter: without that, thousands of unclosed ones would
# each be searched to the end. `$5 and $10` is money, so a single dollar wants its formula tight
# (the rule of pandoc). A blank line ends a display, as in Jupyter.
_INLINE = re.compile(
    r"""
    \\\( ((?: [^\\] | \\[^()] )++) \\\)
  | \\\[ ((?: [^\\] | \\[^][] )++) \\\]
  | \$\$ ((?: [^\\$] | \\. | \$(?!\$) )++) \$\$
  | (?<!\d) \$ (?![\s$]) ((?: [^\\$] | \\. )++) (?<!\s) \$ (?!\d)
    """,
    re.VERBOSE | re.DOTALL,
)
_DISPLAY = re.compile(
    r"""
    (?: \\\[ (?: [^\\\n] | \\[^][\n] | \\?\n(?![ \t]*(?:\n|\Z)) )++ \\\]
      | \$\$ (?: [^\\\n$] | \\[^\n] | \\?\n(?![ \t]*(?:\n|\Z)) | \$(?!\$) )++ \$\$
    ) [ \t]*$
    """,
    re.VERBOSE | re.MULTILINE,
)
# "from $5/month to 3$": words after a number and nothing of TeX.
_MONEY = re.compile(r"\d[^\\^_={}]*\Z")
_WORD = re.compile(r"[A-Za-z]{3}")
# MathJax complains about a label it has seen, and an answer is rendered again as it grows.
_LABEL = re.compile(r"(?<!\\)((?:\\\\)*)\\label\s*\{[^{}\\]*\}")
_COMMAND = re.compile(r"\\(?:([A-Za-z]+)|.)", re.DOTALL)
_BEGIN_END = re.compile(r"\\(?:begin|end)(?![A-Za-z])(?:\{([A-Za-z]+\*?)\})?")


def inline_rule(state: StateInline, silent: bool) -> bool:
    """Take a formula inside a paragraph, with any of the four pairs of delimiters."""
    if state.src[state.pos] not in "$\\":
        return False
    match = _INLINE.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    tex = match[match.lastindex or 0]
    if match.lastindex == 4 and _MONEY.match(tex) and _WORD.search(tex):
        return False
    if not silent:
        token = state.push("math_inline", "math", 0)
        token.content = tex
        token.meta = {"display": match[0].startswith(("\\[", "$$"))}
    state.pos = match.end()
    return True


def block_rule(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    r"""Take a ``\[…\]`` or ``$$…$$`` that has its lines for itself."""
    start = state.bMarks[start_line] + state.tShift[start_line]
    if state.is_code_block(start_line) or state.src[start : start + 2] not in ("\\[", "$$"):
        return False
    match = _DISPLAY.match(state.src, start)
    if match is None:
        return False
    last = start_line
    while last + 1 < end_line and state.eMarks[last] < match.end():
        last += 1
    lines = range(start_line, last + 1)
    if state.eMarks[last] < match.end() or any(state.sCount[n] < state.blkIndent for n in lines):
        return False  # it ends outside of the list item or the quotation that it began in
    if not silent:
        token = state.push("math_block", "math", 0)
        token.block = True
        token.map = [start_line, last + 1]
        token.content = state.getLines(start_line, last + 1, state.blkIndent, False).strip()[2:-2]
        state.line = last + 1
    return True


def delimited(tex: str, display: bool) -> str:
    """Return the formula (not escaped) with the delimiters that every typesetter knows."""
    tex = _LABEL.sub(r"\1", tex)
    return f"\\[{tex}\\]" if display else f"\\({tex}\\)"


def is_harmless(tex: str) -> bool:
    """Tell whether a formula can do no more than draw itself."""
    if len(tex) > _MAX_FORMULA:
        return False
    tex = _LABEL.sub(r"\1", tex)
    commands, environments = set(_COMMAND.findall(tex)), set(_BEGIN_END.findall(tex))
    return commands <= _known_commands() and environments <= _ENVIRONMENTS


@cache
def _known_commands() -> frozenset[str]:
    # "" stands for the commands of one sign, as in `\{` and `\,`.
    return frozenset({"", "begin", "end", *_SYMBOLS.split(), *_MACROS.split()})


_ENVIRONMENT_NAMES = """
align align* alignat alignat* aligned alignedat array Bmatrix bmatrix cases dcases drcases equation
equation* flalign flalign* gather gather* gathered matrix multline multline* pmatrix rcases
smallmatrix split subarray Vmatrix vmatrix
"""
_ENVIRONMENTS = frozenset(_ENVIRONMENT_NAMES.split())

# The symbols of MathJax 3.2 (base, ams, gensymb), without those that hardly anybody uses.
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

# Its commands that change how something is drawn. Left out: all that take a URL, a colour or an
# attribute, that define or load, and that shift their argument over the text around it.
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
