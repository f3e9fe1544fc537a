"""Files that are links: what is copied or shown out of a folder must lie in it.

A stranger's folder may hold a link named LICENSE that leads to a file of the user's, whose contents
would then go out with the result.
"""

import os
import stat
from pathlib import Path

from nemo_minitron.security.plain_text import plain


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a folder lies, by links, outside of it.

    A snapshot in the hub's cache consists of links into the blobs of its repository, and these may
    be links into the blobs of the whole cache: those are its own files. Source: huggingface_hub's
    guide "Understand caching".
    """
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return False
    repository = root.parent.parent
    in_cache = root.parent.name == "snapshots" and repository.name.startswith("models--")
    blobs = (repository / "blobs", repository.parent / "blobs")
    return not (in_cache and any(real.is_relative_to(place) for place in blobs))


def refuse_link(path: Path, folder: Path) -> None:
    """Refuses a file that is a link to somewhere else.

    Raises:
        ValueError: it is; the message names both ends.
    """
    if leads_out(path, folder):
        raise ValueError(
            f"{path}: a link to {path.resolve()}, outside of {folder}; put a copy in its place if that file "
            "belongs to the model"
        )


def refuse_links(model: Path) -> None:
    """Refuses a model's folder in which a file is a link to somewhere else: whatever reads it would show it.

    Weights and config.json may be links, for models are assembled that way.

    Raises:
        ValueError: there is one.
    """
    for path in sorted([*model.glob("*"), *model.glob("additional_chat_templates/*")]):
        if path.is_file() and path.name != "config.json" and path.suffix != ".safetensors":
            refuse_link(path, model)


def check_tree(root: Path, enclosing: Path) -> None:
    """Refuses links out of a folder, and what is neither file nor folder (nobody ends a pipe).

    Args:
        root: is looked through; links are not followed.
        enclosing: where links may lead: the folder around it.

    Raises:
        ValueError: there is one; the message names it.
    """
    around = enclosing.resolve()
    _check_entry(root, around)
    for at, folders, files in os.walk(root) if not root.is_symlink() else ():
        for name in (*folders, *files):
            _check_entry(Path(at) / name, around)


def _check_entry(path: Path, around: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # of another run, which is at work there
        return
    if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(around):
        raise ValueError(
            f"{plain(path)}: a link to {plain(path.resolve())}, outside of {plain(around)}; nothing is read "
            "or written through it: remove it, or move the whole folder to where there is room"
        )
    if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{plain(path)}: neither a file nor a folder; remove it")
