"""datasets: folders that ``save_to_disk`` wrote: which of their splits is read, and its rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.data.row_files import guarded
from nemo_minitron.security.plain_text import plain


def saved_set(path: Path, where: str) -> Path:
    """The folder to read of one that ``save_to_disk`` wrote: of several splits ``train``, as of hf://.

    Raises:
        ValueError: it holds splits, and none of them is called so; the message names their folders.
    """
    listed = path / "dataset_dict.json"
    if not listed.is_file():
        return path
    try:
        splits = sorted(str(name) for name in json.loads(listed.read_bytes())["splits"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{where}: {plain(listed)}: not the list of a saved data set's splits: {error!r:.80}"
        ) from error
    if splits == ["train"]:
        return path  # its name, and so its place among other files, is what it was
    there = [path / name for name in splits if (path / name).is_dir()]
    if path / "train" in there:
        return path / "train"
    choice = ", ".join(map(plain, there)) or "none is there"
    raise ValueError(
        f"{where}: {plain(path)}: expected a split 'train' in this saved data set, found {plain(splits)}; "
        f"name the folder of the one to read: {choice}"
    )


def saved_rows(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """Place and value of every row of a folder that ``save_to_disk`` wrote, as ``saved_set`` names it.

    Raises:
        ValueError: it is damaged, or its parts lie elsewhere.
    """
    import datasets

    datasets.disable_progress_bars()
    _check_saved(path, where)

    def rows() -> Iterator[Any]:
        found = datasets.load_from_disk(str(path))
        yield from found if isinstance(found, datasets.Dataset) else found["train"]

    yield from guarded(rows(), path, where, "a saved data set")


def _check_saved(path: Path, where: str) -> None:
    """Refuses a saved data set whose parts lie elsewhere.

    Raises:
        ValueError: they do, or what lists them cannot be read.
    """
    for listed in sorted(path.rglob("state.json")):
        try:
            names = [
                str(part["filename"]) for part in json.loads(listed.read_bytes())["_data_files"]
            ]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{where}: {listed}: not the state of a saved data set: {error!r:.80}"
            ) from error
        outside = next((name for name in names if Path(name).name != name), None)
        if outside is not None:
            raise ValueError(f"{where}: {listed} names {outside!r}, which is no file beside it")
