"""MkDocs hook: links from the documents to files outside of their folder.

In the repository they lead to the file; the site does not hold it, so there its path is shown instead. A file that is
not there is an error, as every other broken link is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["on_page_markdown"]

_ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by MkDocs with each page."""
    folder = _ROOT / "docs" / Path(page.file.src_uri).parent

    def shown(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match[2]}, which does not exist")
        if path.is_relative_to(_ROOT / "docs"):
            return match[0]
        name = path.relative_to(_ROOT).as_posix()
        return f"{match[1]} (`{name}` in the repository)" if name not in match[1] else f"`{name}`"

    return _OUTSIDE.sub(shown, markdown)
