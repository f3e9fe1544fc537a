"""Files that are links: what is copied or shown out of a folder must lie in it.

A stranger's folder may hold a link named LICENSE that leads to a file of the user's, whose contents would
then go out with the result.
"""

from pathlib import Path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a folder lies, by links, outside of it.

    A snapshot in the hub's cache consists of links into the blobs of its repository, and these may be links
    into the blobs of the whole cache: those are its own files. Source: huggingface_hub's guide "Understand
    caching".
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
