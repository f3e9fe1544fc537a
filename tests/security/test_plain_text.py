import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown

from nemo_minitron.security.plain_text import code, markdown, plain


def rendered(source):
    """What a CommonMark renderer shows of a source, as text without any style."""
    console = Console(file=io.StringIO(), width=10_000, no_color=True)
    console.print(Markdown(source))
    return console.file.getvalue().strip()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\rb\nc", "a b c"),
        ("x\u202egnp.exe", "x\\u202egnp.exe"),
        ("f\udcff", "f\\udcff"),
        ("Grüße 模型 👩‍💻", "Grüße 模型 👩‍💻"),
    ],
)
def test_a_terminal_shows_what_it_would_obey(given, shown):
    assert plain(given) == shown
    shown.encode()


def test_a_very_long_text_keeps_its_ends():
    text = plain("a" * 50_000 + "the end")
    assert len(text) <= 4000
    assert text.startswith("aaa")
    assert text.endswith("the end")


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>", "![x](http://host/pixel.png)", "[click](http://host)", "a | b", "`code`",
        "*bold* and \\ and &lt;", "<!-- -->",
    ],
)  # fmt: skip
def test_nothing_in_a_text_is_markup(text):
    assert rendered(f"before {markdown(text)} after") == f"before {text} after"
    row = f"| a | b |\n|---|---|\n| {markdown(text)} | end |"
    assert rendered(row).splitlines()[-1].split("end")[0].strip() == text


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1))
def test_a_code_span_holds_any_backticks(text):
    line = plain(text)
    (paragraph,) = [
        token for token in MarkdownIt().parse(f"a {code(text)} b") if token.type == "inline"
    ]
    found = [child.content for child in paragraph.children if child.type == "code_inline"]
    assert [each.strip() for each in found] == [line.strip()]
