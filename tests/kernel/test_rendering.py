"""What an answer contains is shown in the cell, and stays harmless where the notebook goes next."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import nbformat
import pytest

from tests.kernels import Kernel
from tests.payloads import payloads

_ANSWER = r"""# Least squares

It is unbiased[^1]; see https://example.org/ols_(a). \u05d0

- [x] center
- [ ] solve H<sub>2</sub>O

| a | b |
|---|---|
| 1 | 2 |

\begin{align}
a &= b
\end{align}

- שלום `x`
- hello (world)

```python
a = 1


b = "![x](http://leak.example/y)"
```

[^1]: The **Gauss–Markov** theorem.
"""


def _shown(k: Kernel, answer: str) -> dict[str, Any]:
    k.ok(f"backend.will({answer!r}, *whole_answer())")
    (output,) = k.ok("%%llm --literal\nExplain.").outputs
    data: dict[str, Any] = output["data"]
    return data


def test_an_answer_is_rendered_with_all_of_its_markdown(scripted: Kernel) -> None:
    html = _shown(scripted, _ANSWER)["text/html"]
    for part in (
        "Least squares</h1>", "unbiased<sup>[1]</sup>", '<a href="https://example.org/ols_(a)" ',
        'checked="checked"', "H<sub>2</sub>O", "<table>", r"\[\begin{align}", '<ul dir="rtl">',
        '<span dir="ltr">hello (world)</span>', "<sup>[1]</sup> The <strong>Gauss",
    ):  # fmt: skip
        assert part in html, part


@pytest.fixture(scope="module")
def outputs(scripted: Kernel) -> list[dict[str, Any]]:
    """Return what cells show for a usual answer and for hostile ones."""
    hostile = "\n\n".join([*payloads().values(), r"\end{Verbatim}\input{/etc/passwd}"])
    scripted.ok(f"hostile = {hostile!r}\nbackend.will(hostile, *whole_answer())")
    cells = ("%llm --over [hostile] {item}", "%llm --dry-run {hostile}", "%llm_chats hostile")
    scripted.ok("backend.will(hostile, *whole_answer())\n%llm -c hostile {hostile}")
    tables = [scripted.ok(cell).outputs[0]["data"] for cell in cells]
    return [_shown(scripted, _ANSWER), _shown(scripted, hostile), *tables]


def _exported(exporter: str, outputs: list[dict[str, Any]]) -> str:
    import nbconvert

    v4 = nbformat.v4
    cells = [
        v4.new_code_cell(outputs=[v4.new_output("display_data", data=data)]) for data in outputs
    ]
    notebook = v4.new_notebook(cells=cells)
    return str(getattr(nbconvert, exporter)().from_notebook_node(notebook)[0])


def test_an_answer_has_html_and_text_and_no_markdown(outputs: list[dict[str, Any]]) -> None:
    assert [set(data) for data in outputs] == [{"text/html", "text/plain"}] * 5


def test_markdown_export_is_the_html_and_nothing_else(outputs: list[dict[str, Any]]) -> None:
    from markdown_it import MarkdownIt

    page = MarkdownIt("gfm-like", {"linkify": False}).render(_exported("MarkdownExporter", outputs))
    assert all(data["text/html"].strip() in page for data in outputs)
    others = page
    for data in outputs:
        others = others.replace(data["text/html"].strip(), "")
    assert not re.search(r"<(?!/?(?:pre|code)\b)", others)


def _letters(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]*>", "", html)).split())


def test_html_export_is_the_html_and_latex_is_the_text(outputs: list[dict[str, Any]]) -> None:
    page = _exported("HTMLExporter", outputs)
    page = page[page.index("<main") :]
    assert all(_letters(data["text/html"]) in _letters(page) for data in outputs)
    assert not re.search(r"<(?:img|iframe|object|embed|video|svg)\b", page)
    latex = _exported("LatexExporter", outputs)
    latex = latex[latex.index(r"\begin{document}") :]
    assert latex.count(r"\end{Verbatim}") == len(outputs) * 2  # each cell has an empty input
    assert r"\input{/etc/passwd}" not in latex
    assert "/etc/passwd" in latex


def test_a_fragment_that_is_saved_is_marked_incomplete(scripted: Kernel) -> None:
    scripted.ok(
        "from tests.scripted import Hang, at_release\nhang = Hang()\nat_release(hang.go.set)"
    )
    scripted.ok("backend.will('The first part', hang, ' and the rest.', *whole_answer())")
    cell = scripted.send("%llm --quiet Go.")
    scripted.wait_for_output(cell, "The first part")
    # What a frontend has now is what it would save if the kernel died.
    (saved,) = scripted.state(cell).outputs
    assert "The first part" in saved["data"]["text/html"]
    for form in saved["data"].values():
        assert "tiny: incomplete so far · when complete: llm.last" in form
    scripted.release()
    whole = scripted.wait(cell)
    assert whole.text == "The first part and the rest."
    assert "incomplete" not in whole.html
