"""The blocks of code that are found in an answer."""

from __future__ import annotations

import pytest

from llm_magic.text.code_blocks import code_blocks


def test_code_is_found_in_costly_text() -> None:
    costly, code = "a\n===\n" * 40_000, "x = 1\n\ny = 2"
    text = f"{costly}\n```python\n{code}\n```\n~~~\nopen\n```"
    blocks = code_blocks(text)
    assert [(b.language, b.code, b.closed) for b in blocks] == [
        ("python", code, True), ("", "open\n```", False),
    ]  # fmt: skip
    assert [b.code for b in code_blocks("![" * 300_000 + f"\n\n```python\n{code}\n```")] == [code]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("Prose `x` only", []),
        ("A:\n```python\nx = 1\n\ny = 2\n```\nB:\n~~~\nz\n~~~", [("python", "x = 1\n\ny = 2"), ("", "z")]),
        ("````md\n```python\nx\n```\n````", [("md", "```python\nx\n```")]),
        ("- a\n  ```sh\n  ls\n  ```", [("sh", "ls")]),
        ("> ```C++\n> x\n> ```", [("c++", "x")]),
        ("```python\nx = ", [("python", "x = ")]),
        ("```{python}\nx\n```\n```js:a.js\nz\n```", [("python", "x"), ("js", "z")]),
        ("```Python title='a'\ny\n```", [("python", "y")]),
        ("Code:\n\n    x = 1\n", [("", "x = 1")]),
        ("    x = 1\n\n```\ny\n```", [("", "y")]),
        ("```\"><script>\nx\n```", [("", "x")]),
        ("$$\n```\nx\n```\n$$", []),
        ("\\[ a\n```\nx\n```\n\\]\n```\ny\n```", [("", "y")]),
        ("$$ a\n```\nx\n$$ b", [("", "x\n$$ b")]),
        ("$$ a $$\n```\nx\n```", [("", "x")]),
        ("$$ a\n\n```\nx\n```\n\n$$", [("", "x")]),
        ("- $$ a\n\n```\n$$\n```", [("", "$$")]),
    ],
)  # fmt: skip
def test_code_blocks(text: str, blocks: list[tuple[str, str]]) -> None:
    assert [(block.language, block.code) for block in code_blocks(text)] == blocks


@pytest.mark.parametrize(
    ("text", "fenced", "closed"),
    [
        ("```\nx\n```", True, True),
        ("```\nx\n```\n", True, True),
        ("```\n```", True, True),
        ("```\n\n```", True, True),
        ("~~~~ py\n```\nx\n~~~~~", True, True),
        ("- ```\n  x\n  ```\n- more", True, True),
        ("> ```\n> x\n> ```", True, True),
        ("```", True, False),
        ("```\n", True, False),
        ("```\nx", True, False),
        ("```\nx\n\n", True, False),
        ("````\nx\n```", True, False),
        ("```\nx\n~~~", True, False),
        ("> ```\n> x\n\nprose", True, False),
        ("    x\n", False, True),
    ],
)
def test_block_has_fence_and_end_as_attributes(text: str, fenced: bool, closed: bool) -> None:
    (block,) = code_blocks(text)
    assert (block.fenced, block.closed) == (fenced, closed)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text", ["\\[ a\n", "$$\n", "\\begin{a}\n", "> ", "- ", "|a\n", "[a]: b\n", "```\n"]
)
def test_hostile_text_takes_no_time(text: str) -> None:
    code_blocks(text * 100_000)
