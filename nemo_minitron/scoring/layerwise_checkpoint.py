"""Checkpoints of a pass layer by layer."""

import time
from pathlib import Path
from typing import TypedDict

from safetensors.torch import save_file

from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.scoring.hidden_state_store import HiddenStateStore, Stream, file_name
from nemo_minitron.scoring.scores_file import Scores, read_scores, write_scores
from nemo_minitron.workspace.atomic import clear, replacing_folder, standing
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.tensor_file import read_tensors
from nemo_minitron.workspace.typed_json import read_json

_STAMP = "next.json"


class _Stamp(TypedDict):
    recipe: str
    next: int


def key_of(name: str) -> Stream:
    """The key that a file is named after."""
    batch, *block = name.split("-")
    return tuple(int(layer) for layer in block if layer) or None, int(batch)


class LayerwiseCheckpoint:
    """Checkpoint of a pass layer by layer: hidden states, sums, the next layer."""

    def __init__(self, folder: Path, recipe: str, seconds: float | None) -> None:
        """Names the pass and the folder of its checkpoint.

        Args:
            folder: where they lie, or will.
            recipe: what the pass computes; savings of another are not taken.
            seconds: least time between two savings; None: never save.
        """
        self._folder, self._recipe, self._seconds = folder, recipe, seconds
        self._last, self._cost = time.monotonic(), 0.0

    def load(self, store: HiddenStateStore) -> tuple[int, CalibrationSums]:
        """Fills the store; gives the position of the next layer, 0 where there is nothing, and the sums."""
        folder = standing(self._folder)
        if folder is not None and (stamp := folder / _STAMP).is_file():
            found = read_json(stamp, _Stamp)
            if found["recipe"] == self._recipe:
                for path in folder.glob("*.hidden"):
                    store.put(key_of(path.stem), read_tensors(path)["hidden"])
                return int(found["next"]), read_scores(folder).calibration
        return 0, CalibrationSums()

    def save(self, store: HiddenStateStore, following: int, calibration: CalibrationSums) -> None:
        """Saves if it is time; saving takes at most a tenth of the time."""
        waited = time.monotonic() - self._last
        if self._seconds is None or waited < max(self._seconds, 9 * self._cost):
            return
        started = time.monotonic()
        store.wait()
        with replacing_folder(self._folder) as fresh:
            for key in store.keys():  # noqa: SIM118 (a HiddenStateStore is no mapping)
                save_file(
                    {"hidden": store.get(key).contiguous()}, fresh / f"{file_name(key)}.hidden"
                )
            write_scores(fresh, Scores({}, calibration))
            write_json(fresh / _STAMP, {"recipe": self._recipe, "next": following})
        self._last, self._cost = time.monotonic(), time.monotonic() - started

    def clear(self) -> None:
        """Removes the checkpoint."""
        clear(self._folder)
