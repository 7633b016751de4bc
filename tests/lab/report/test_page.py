import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from tethertune.lab.report import page

EVIL = "</script><!-- <script>alert('1')</script> & \" ' \u2028 \\u003c"
printable = st.text(st.characters(exclude_categories=("C",)))
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)
FILTERS = page._environment().filters


class Texts(HTMLParser):
    """The text inside each element of a page, as a browser finds its end."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.open = {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, _):
        if tag not in ("meta", "link"):
            self.open.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.inside[self.open[-1]][-1] += data


def test_a_title_is_text_whatever_it_holds():
    found = Texts(page.html("page.html.j2", title=EVIL))
    assert found.inside["title"] == found.inside["h1"] == [EVIL]
    assert len(found.inside["script"]) == 1


def test_the_style_and_the_whole_program_are_inside_and_nothing_is_fetched():
    text = page.html("page.html.j2", title="t")
    found = Texts(text)
    (style,), (program,) = found.inside["style"], found.inside["script"]
    assert style.strip() == page._text("style.css").strip()
    assert program.strip() == page._program().strip()
    rest = text.replace(program, "")
    assert not re.search(r"<(?:script|img|iframe)[^>]+src=|<link[^>]+href=\"(?!data:)|@import|url\(", rest)


def test_no_tag_begins_in_the_program():
    assert not re.search(r"</script|<!--|<script(?=[\s/>])", page._program(), re.IGNORECASE)


def test_content_that_a_template_lacks_is_an_error_and_no_gap():
    with pytest.raises(UndefinedError, match="title"):
        page.html("page.html.j2")
    with pytest.raises(UndefinedError, match="title"):
        page.markdown("report.md.j2")


@settings(deadline=None)
@given(documents)
@example([EVIL])
def test_json_in_a_script_element_is_what_it_was_and_ends_where_the_script_does(value):
    text = FILTERS["script_json"](value)
    assert "<" not in text
    found = Texts(f"<script>{text}</script>")
    assert found.inside == {"script": [str(text)]}
    assert json.loads(text) == value


def test_numbers_that_json_has_no_word_for_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        FILTERS["script_json"]([float("nan")])


@settings(deadline=None)
@given(printable)
@example(EVIL)
@example("*a* _b_ `c` [d](e) ![f](g) <h> &amp; ~~i~~ | j \\ # 1. - k\n# l")
def test_plain_text_is_the_same_text_in_markdown_and_stays_on_its_line(text):
    plain = FILTERS["plain"](text)
    assert "\n" not in plain
    (_, inline, _) = MarkdownIt("commonmark").enable("strikethrough").parse(f"Name: {plain} .")
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == f"Name: {' '.join(text.split())} ."


@settings(deadline=None)
@given(st.lists(printable, min_size=2, max_size=2))
def test_plain_text_stays_in_its_cell_of_a_markdown_table(texts):
    row = " | ".join(FILTERS["plain"](text) for text in texts)
    found = MarkdownIt("commonmark").enable("table").parse(f"| a | b |\n|---|---|\n| {row} |\n")
    cells = [found[place + 1] for place, token in enumerate(found) if token.type == "td_open"]
    assert ["".join(child.content for child in cell.children) for cell in cells] == [" ".join(t.split()) for t in texts]
