"""The process that compiles some packages of a bundle, for a GPU that is here or for one that is not.

Its argument is a JSON object: `request` (file of the pickled `BuildRequest`), `packages` (name -> file to write),
`device`, and `null_gpu`, whether the GPU is that of `null_gpu`. It sends a message when a package is there, or fails.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from export.parts.worker import Send, peak_bytes, serve


def _work(job: dict[str, Any], send: Send) -> None:
    if job["null_gpu"]:
        from .pretend import pretend

        pretend()
    from export.errors import BuildError

    from .packages import compile_package, package_modules

    request = pickle.loads(Path(job["request"]).read_bytes())
    modules = package_modules(request)
    for name, file in job["packages"].items():
        written = Path(file).with_suffix(".writing.pt2")
        try:
            compile_package(modules[name](), written, job["device"])
        except BuildError as error:
            send({"failed": str(error)})
            sys.exit(1)
        os.replace(written, file)
        send({"phase": name, "done": 1, "total": 1})
    send({"peak_bytes": peak_bytes()})


if __name__ == "__main__":
    serve(_work)
