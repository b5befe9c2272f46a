"""What a test asks of a web page: every element is closed, and nothing gets in or out."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A strict reader: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def assert_shut(text: str) -> Page:
    """Assert that a page takes nothing from outside and runs nothing."""
    read = Page(text)
    known = {"alt", "charset", "class", "content", "http-equiv", "lang", "name", "open", "scope",
             "src", "style"}  # fmt: skip
    for tag, attributes in read.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert set(attributes) <= known, (tag, attributes)
        if "src" in attributes:
            assert tag == "img"
            assert (attributes["src"] or "").startswith(
                ("data:image/jpeg;base64,", "data:image/svg+xml;base64,")
            )
        if "style" in attributes:
            assert re.fullmatch(r"width:[\d.]+rem", attributes["style"] or "")
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policy = {"http-equiv": "Content-Security-Policy"}.items()
    (found,) = [attributes for _, attributes in read.tags if policy <= attributes.items()]
    assert (found["content"] or "").startswith("default-src 'none'; img-src data:;")
    return read
