"""References to files on a model hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["FORM", "HubReference", "is_commit"]

FORM = "org/repo:file@revision"
"""How a reference is written; the revision (a branch, a tag or a commit) may be left out."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"(?P<repo>{_PART}/{_PART}):(?P<file>[^\s@:\\]+)(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit's full hash, which always means the same files."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True)
class HubReference:
    """A file of a repository on the hub.

    Attributes:
        file: path inside the repository, with forward slashes.
        revision: branch, tag or commit.
    """

    repo: str
    file: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """The reference that `text` writes down; None where it has another form."""
        match = _REFERENCE.fullmatch(text)
        if match is None or not all(part not in ("", ".", "..") for part in match["file"].split("/")):
            return None
        return cls(match["repo"], match["file"], match["revision"] or "main")

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.file.rpartition("/")[2]

    def beside(self, name: str) -> HubReference:
        """The file called `name` in the same folder and revision."""
        folder, slash, _ = self.file.rpartition("/")
        return HubReference(self.repo, f"{folder}{slash}{name}", self.revision)

    def __str__(self) -> str:
        return f"{self.repo}:{self.file}" + ("" if self.revision == "main" else f"@{self.revision}")
