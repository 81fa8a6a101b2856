"""What each package of a bundle must look like, checked against its generated code and its kernels.

A fusion that is lost costs time and changes no result; the committed figures (`packages_*.toml`, one file per
precision) make it visible where no GPU is, for the version of PyTorch that they name.
"""

from __future__ import annotations

import re
import tomllib
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from export.backends.inductor.cubin import read_cubin
from export.backends.inductor.generated import read_package
from runtime.bundle import Component

_ATTENTION = re.compile(r"_scaled_dot_product_(?:cudnn|flash)_attention")


class PackageExpectation(BaseModel):
    """The figures of one package.

    Attributes:
        kernels: launches of kernels that Inductor generated.
        libraries: calls of libraries, by operator; fused attention by `attention`, whichever the GPU has.
        wide_per_token: elements of the largest float32 tensor between kernels, per token; None where it is not held.
        moved_per_token: bytes that Inductor's kernels move at most, per token, of the tiny model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernels: Annotated[int, Field(gt=0)]
    libraries: dict[str, int]
    wide_per_token: Annotated[int, Field(ge=0)] | None = None
    moved_per_token: Annotated[int, Field(gt=0)]

    def problems(self, path: Path, component: Component, tokens: int) -> list[str]:
        """In what the package `path` differs; empty if it is as expected.

        Args:
            tokens: of a chunk, or of the prompt for the text encoder.

        Raises:
            BuildError: the package holds no code that is known.
        """
        launches = read_package(path, component)
        kernels = sum(launch.is_generated for launch in launches)
        names = (_ATTENTION.sub("attention", launch.name) for launch in launches if not launch.is_generated)
        libraries = dict(Counter(names))
        own = {spec.name for spec in component.outputs}
        wide = max(
            (
                operand.elements
                for launch in launches
                for operand in launch.outputs
                if operand.dtype == "float32" and operand.name.startswith("buf") and operand.name not in own
            ),
            default=0,
        )
        found = []
        if copies := sum(launch.copies_images for launch in launches):
            found.append(
                f"{copies} convolutions of images whose channels do not lie last, which the library copies"
            )
        if kernels != self.kernels:
            found.append(f"{kernels} kernels of Inductor's, expected {self.kernels}")
        if libraries != self.libraries:
            found.append(f"calls of libraries {libraries}, expected {self.libraries}")
        if self.wide_per_token is not None and wide > self.wide_per_token * tokens:
            found.append(
                f"a float32 tensor of {wide} elements between kernels, expected at most {self.wide_per_token * tokens}"
            )
        if (moved := sum(launch.nbytes for launch in launches)) > self.moved_per_token * tokens:
            found.append(f"{moved} bytes moved, expected at most {self.moved_per_token * tokens}")
        with zipfile.ZipFile(path) as package:
            for name in package.namelist():
                if name.endswith(".cubin") and (stack := read_cubin(package.read(name)).stack):
                    found.append(f"{Path(name).stem} keeps {stack} bytes of each thread on the stack")
        return found


def load_package_expectations(precision: str) -> Mapping[str, PackageExpectation]:
    """The expectations of a precision, by package."""
    document = tomllib.loads(
        (Path(__file__).parent / f"packages_{precision}.toml").read_text(encoding="utf-8")
    )
    document.pop("schema_version")
    return TypeAdapter(dict[str, PackageExpectation]).validate_python(document)
