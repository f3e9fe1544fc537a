"""Pictures of an artifact, as they are shown in the report and in Prefect."""

import base64
from pathlib import Path

from nemo_minitron.security.links import leads_out
from nemo_minitron.workspace.layout import plots_in


def pictures_in(folder: Path) -> list[Path]:
    """The PNGs of an artifact, in order; a link out of its folder is none, whatever its name."""
    found = sorted(plots_in(folder).glob("*.png"))
    return [path for path in found if path.is_file() and not leads_out(path, folder)]


def inline(picture: bytes) -> str:
    """A PNG as the address of itself (RFC 2397)."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()
