"""safetensors: hidden states that wait between two layers, in memory, beyond a budget on disk; and saved."""

import json
import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.artifacts.build import discard
from nemo_minitron.artifacts.manifest import write_json
from nemo_minitron.artifacts.scores import Scores, read_scores, write_scores
from nemo_minitron.bridge.scoring import Block
from nemo_minitron.core.tally import Tally

Stream = tuple[Block | None, int]
"""Hidden states that wait for the next layer: of the model without a block (None: whole), for a batch."""


class Shelf:
    """Tensors kept in memory up to a budget, and beyond it on disk."""

    def __init__(self, budget: int, folder: Path) -> None:
        """An empty shelf.

        Args:
            budget: bytes to keep in memory.
            folder: an existing folder for the rest.
        """
        self._left, self._folder = budget, folder
        self._memory: dict[Stream, Tensor] = {}
        self._disk: dict[Stream, Path] = {}

    def put(self, key: Stream, tensor: Tensor) -> None:
        """Keeps a tensor; one with the same key gives way."""
        self.drop(key)
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._memory[key] = tensor.cpu()
            return
        path = self._folder / f"{_name(key)}.safetensors"
        save_file({"hidden": tensor.cpu().contiguous()}, path)
        self._disk[key] = path

    def get(self, key: Stream) -> Tensor:
        """A tensor, by key."""
        return self._memory[key] if key in self._memory else load_file(self._disk[key])["hidden"]

    def drop(self, key: Stream) -> None:
        """Forgets a tensor, where there is one."""
        if key in self._memory:
            self._left += self._memory.pop(key).nbytes
        elif key in self._disk:
            self._disk.pop(key).unlink()

    def keys(self) -> list[Stream]:
        """What is there."""
        return [*self._memory, *self._disk]


def _name(key: Stream) -> str:
    block, batch = key
    return f"{batch}-{'-'.join(map(str, block or ()))}"


def _key(name: str) -> Stream:
    batch, *block = name.split("-")
    return tuple(int(layer) for layer in block if layer) or None, int(batch)


class Savings:
    """What a pass layer by layer goes on from after it was killed: hidden states, sums, the next layer."""

    def __init__(self, folder: Path, recipe: str, seconds: float | None) -> None:
        """Savings of one pass.

        Args:
            folder: where they lie, or will.
            recipe: what the pass computes; savings of another are not taken.
            seconds: least time between two savings; None: never save.
        """
        self._folder, self._recipe, self._seconds = folder, recipe, seconds
        self._last, self._cost = time.monotonic(), 0.0

    def load(self, shelf: Shelf) -> tuple[int, Tally]:
        """Fills the shelf; gives the position of the next layer, 0 where there is nothing, and the sums."""
        for folder in (self._folder, self._folder.with_name(f"{self._folder.name}.old")):
            stamp = folder / "next.json"
            if stamp.is_file():
                found = json.loads(stamp.read_text(encoding="utf-8"))
                if found["recipe"] == self._recipe:
                    for path in folder.glob("*.hidden"):
                        shelf.put(_key(path.stem), load_file(path)["hidden"])
                    return int(found["next"]), read_scores(folder).tally
        return 0, Tally()

    def save(self, shelf: Shelf, following: int, tally: Tally) -> None:
        """Saves, where it is time; at most a tenth of the time goes into saving."""
        waited = time.monotonic() - self._last
        if self._seconds is None or waited < max(self._seconds, 9 * self._cost):
            return
        started = time.monotonic()
        fresh, old = (self._folder.with_name(f"{self._folder.name}.{end}") for end in ("new", "old"))
        discard(fresh)
        fresh.mkdir(parents=True)
        for key in shelf.keys():  # noqa: SIM118 (a Shelf is no mapping)
            save_file({"hidden": shelf.get(key).contiguous()}, fresh / f"{_name(key)}.hidden")
        write_scores(fresh, Scores({}, tally))
        write_json(fresh / "next.json", {"recipe": self._recipe, "next": following})  # last
        discard(old)
        if self._folder.exists():
            self._folder.rename(old)
        fresh.rename(self._folder)
        discard(old)
        self._last, self._cost = time.monotonic(), time.monotonic() - started

    def clear(self) -> None:
        """Removes them."""
        for end in ("", ".old", ".new"):
            discard(self._folder.with_name(f"{self._folder.name}{end}"))
