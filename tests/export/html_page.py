"""HTML pages as tests read them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags in order, checked for balance; text; addresses. Nothing in it may run, or be loaded from elsewhere."""

    VOID = frozenset({"meta", "img", "line", "polyline"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        source = path.read_text(encoding="utf-8")
        self.feed(source)
        assert self.open == []
        assert all(link.startswith("data:image/png;base64,") for link in self.links)
        assert not {"script", "link", "iframe", "object"} & set(self.tags)
        assert not re.search(r"@import|url\(", source)
        assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
