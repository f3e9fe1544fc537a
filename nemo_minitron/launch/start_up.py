"""What a program does before anything else."""

import gc
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, cast


def start_fast() -> None:
    """Leaves out of a command's start what costs much and is of no use there."""
    look_for_old_garbage_seldom()
    load_scipy_signal_later()


def look_for_old_garbage_seldom() -> None:
    """Lets Python look for garbage among old objects a hundred times less often than by default.

    torch, transformers and NeMo make a million objects while they are imported, which all stay. To
    go through them again and again takes a fifth of a command's start. Garbage of young objects is
    found as ever, and that of models where they are let go (``models.causal_lm.free``).
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1_000)


class _Later(ModuleType):
    """A module that is executed once something of it is asked for, as by importlib's LazyLoader."""

    def __getattr__(self, name: str) -> Any:
        own, module = self.__dict__, cast(ModuleType, self)
        # others wait; whoever executes it comes here again, and goes on
        with own["_one_at_a_time"]:
            if "_begun" not in own:
                own["_begun"] = True
                try:
                    own["__loader__"].exec_module(self)
                except BaseException:
                    del own["_begun"]
                    raise
                module.__class__ = ModuleType
            if name in own:
                return own[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _LoadsLater(Loader):
    """Makes ``scipy.signal`` a module that is executed later, with what torchmetrics looks for."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> None:
        """Python makes the module, and knows its place."""

    def exec_module(self, module: ModuleType) -> None:
        """Executes nothing yet."""

        def hamming(*arguments: Any, **how: Any) -> Any:
            """``scipy.signal.windows.hamming``."""
            from scipy.signal.windows import hamming

            return hamming(*arguments, **how)

        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        module.__dict__.update(_one_at_a_time=threading.RLock(), hamming=hamming)
        module.__class__ = _Later


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "scipy.signal" else None
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadsLater(spec.loader)
        return spec


def load_scipy_signal_later() -> None:
    """Lets ``scipy.signal`` be imported in no time, and be loaded by whoever uses it.

    Lightning imports torchmetrics, which imports it only to see whether it has a function ``hamming``,
    and to put in its place the one of ``scipy.signal.windows``. With all that it imports in turn, that
    takes a sixth of the start of a command. Here the function is there from the beginning.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
