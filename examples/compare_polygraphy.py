"""Compare a component of two bundles with Polygraphy: the same inputs through both graphs, output by output.

    python examples/compare_polygraphy.py engines/built/demo engines/built/mine --component conditioner

For the comparison with the PyTorch model, of whole rollouts and with a report, there is `python -m export compare`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc, DataLoader

from runtime import load_bundle


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs=2, metavar="BUNDLE")
    parser.add_argument("--component", default="conditioner", help="one without a symbolic dimension")
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--atol", type=float, default=1e-4)
    options = parser.parse_args()

    runners = []
    for folder in options.bundles:
        bundle = load_bundle(folder)
        file = bundle.component(options.component).file
        if bundle.manifest.backend != "onnxruntime" or file is None:
            sys.exit(f"error: {folder} has no ONNX graph of {options.component!r}; take a bundle for a CPU")
        runners.append(OnnxrtRunner(SessionFromOnnx(str(bundle.path(file))), name=str(folder)))
    results = Comparator.run(runners, data_loader=DataLoader(seed=0))
    compare = CompareFunc.simple(rtol=options.rtol, atol=options.atol)
    return 0 if bool(Comparator.compare_accuracy(results, compare_func=compare)) else 1


if __name__ == "__main__":
    sys.exit(main())
