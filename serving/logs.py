"""Structured logs: one JSON object a line, with the session that it is about."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import Any

__all__ = ["JsonFormatter", "SessionLog", "configure"]

_log = logging.getLogger("serving")
_PREVIEW = 12


class JsonFormatter(logging.Formatter):
    """Formats records, and what was passed as `extra={"fields": {...}}`, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class SessionLog:
    """Logs with a session's id. Prompts appear as their length and a digest unless they may be shown in full."""

    def __init__(self, session: str, *, prompts: bool) -> None:
        self.session = session
        self._prompts = prompts

    def info(self, message: str, **fields: Any) -> None:
        """Something worth knowing."""
        _log.info(message, extra={"fields": {"session": self.session, **fields}})

    def error(self, message: str, **fields: Any) -> None:
        """Something that should not happen."""
        _log.error(message, extra={"fields": {"session": self.session, **fields}})

    def prompt(self, message: str, prompt: str, **fields: Any) -> None:
        """Something about a prompt."""
        if self._prompts:
            fields["prompt"] = prompt
        else:
            fields["prompt_chars"] = len(prompt)
            fields["prompt_sha256"] = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:_PREVIEW]
        self.info(message, **fields)


def configure(level: str = "INFO") -> None:
    """Send the process's logs to standard error as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    if logging.getLogger().level == logging.INFO:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # a line for every connection
