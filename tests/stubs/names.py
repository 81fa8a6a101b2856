"""Prints, as JSON, which of some dotted names a module does not have: `names.py MODULE`, names on standard input."""

from __future__ import annotations

import importlib
import json
import sys

module = importlib.import_module(sys.argv[1])
missing = []
for name in json.load(sys.stdin):
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
        if value is None and part != "None":
            missing.append(name)
            break
print(json.dumps({"version": module.__version__, "missing": missing}))
