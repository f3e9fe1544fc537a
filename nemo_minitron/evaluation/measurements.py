"""Units of measurement: each is done once per model, by one rank."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import held_out_windows
from nemo_minitron.evaluation.answers import (
    Answers,
    answers_of,
    server_print,
    stop_texts,
    with_stops,
)
from nemo_minitron.evaluation.own_tokens import byte_lengths, counted_bytes, in_own_tokens
from nemo_minitron.evaluation.task_backends import address_of, end_vllm, server_lm, vllm_lm
from nemo_minitron.families import VOCAB
from nemo_minitron.losses.kept_entries import Entries, KeptEntries, read_by_teacher
from nemo_minitron.workspace.manifest import digest
from nemo_minitron.workspace.progress_bar import bar
from nemo_minitron.workspace.results import Results

TEXT, WRITING, SPEED = "text", "writing", "speed"
_ENGINE = "engine of {}"


@dataclass(frozen=True)
class Unit:
    """One measurement: ``TEXT``, ``WRITING``, ``SPEED`` or a task, of one model."""

    model: str
    what: str


@dataclass(frozen=True)
class Failed:
    """A task that failed.

    Attributes:
        unit: which, of which model.
        words: the error in one line.
        error: the error; of another rank at most that a line was broken.
    """

    unit: Unit
    words: str
    error: Exception | None

    def plain(self) -> "Failed":
        """A copy for another rank, which may not have the error's class."""
        return replace(
            self, error=ConnectionError(self.words) if isinstance(self.error, OSError) else None
        )


@dataclass
class Bench:
    """The models, and how each unit is measured.

    Attributes:
        config: the whole configuration.
        folders: model of the workspace to its folder; the teacher first.
        text: fingerprint of the held-out text.
        tasks: folder with the data of tasks made from it.
        prints: task to what decides its questions (``task_print``).
        results: what was measured before.
        vocabulary: entries that count where teacher and student pad theirs differently, or which of the
            teacher's the others have, which then read the text in tokens of their own; None: all.
        dtypes: model to the dtype that it is measured in, where that is not the one it is stored
            in: what was trained here in float32 goes out in another.
    """

    config: Config
    folders: Mapping[str, Path]
    text: str
    tasks: Path
    prints: Mapping[str, Mapping[str, str | None]]
    results: Results
    vocabulary: Entries = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    _loaded: dict[str, Any] = field(default_factory=dict)
    _unsure: dict[Unit, dict[str, Any]] = field(default_factory=dict)

    def units(self) -> list[Unit]:
        """Everything that is to be measured, model by model."""
        settings = self.config.evaluate
        kinds = [TEXT, *([WRITING] if settings.prompts else []), *settings.tasks]
        units = [Unit(model, kind) for model in self.folders for kind in kinds]
        return units + [Unit(model, SPEED) for model in self.folders if settings.speed]

    def key(self, unit: Unit) -> dict[str, Any]:
        """Everything that decides a unit's outcome."""
        settings = self.config.evaluate
        key: dict[str, Any] = {"what": unit.what, "model": self.checkpoint(unit.model).fingerprint}
        key["dtypes"] = [self.dtypes.get(name, "auto") for name in (unit.model, "teacher")]
        if unit.what in (TEXT, WRITING):
            held_out = {"text": self.text, **self.windows()}
            key |= {"teacher": self.checkpoint("teacher").fingerprint, "held_out": held_out}
        if unit.what == WRITING:
            key |= {"prompts": settings.prompts, "tokens": settings.written_tokens}
        elif unit.what == SPEED:
            from nemo_minitron.evaluation.speed import conditions

            cases = [asdict(case) for case in self._cases()]
            key |= {
                "cases": cases,
                "device": settings.device,
                "conditions": {**conditions(settings.device), "peak": "once loaded"},
            }
        elif unit.what != TEXT:
            from nemo_minitron.evaluation.held_out_tasks import documents_of, is_made_here

            text = self.text if is_made_here(unit.what) else None
            if documents_of(unit.what, self.tasks, settings.task_limit) is not None:
                key["errors"] = "by document"
            key |= {
                "limit": settings.task_limit,
                "task": dict(self.prints[unit.what]),
                "text": text,
                **self._asked(unit.model),
                **self._lent(unit.model),
            }
        if isinstance(self.vocabulary, KeptEntries) and unit.what != SPEED:
            key["entries"] = digest(self.vocabulary.ids_V.tolist())
        return key

    def windows(self) -> dict[str, Any]:
        """What decides the held-out samples."""
        return held_out_windows(self.config, self._tokenizer())

    def _asked(self, model: str) -> dict[str, Any]:
        """What of how a task is asked decides its outcome; nothing where it is asked as it says."""
        settings = self.config.evaluate
        asked = answers_of(settings).decides()
        if settings.backend == "openai":
            asked["server"] = server_print(address_of(settings.servers, model))
            asked |= {key: value for key, value in self.windows().items() if key == "begin"}
        return {"asked": asked} if asked else {}

    def _lent(self, model: str) -> dict[str, str]:
        """The tokenizer, and chat template, that a model is asked with, where it is not as its own."""
        if (name := f"lent to {model}") not in self._loaded:
            folders = self._tokenizer_folder(model), self.folders[model]
            lent, own = map(tokenizer_fingerprint, folders)
            self._loaded[name] = {} if lent == own else {"tokenizer": lent}
        return dict(self._loaded[name])

    def cut(self, name: str) -> KeptEntries | None:
        """Which of the teacher's entries a model has, where its vocabulary was cut; None: it was not."""
        return (
            self.vocabulary
            if isinstance(self.vocabulary, KeptEntries) and name != "teacher"
            else None
        )

    def checkpoint(self, model: str) -> Checkpoint:
        """A model's checkpoint."""
        name = f"checkpoint of {model}"
        if name not in self._loaded:
            self._loaded[name] = open_checkpoint(self.folders[model])
        found: Checkpoint = self._loaded[name]
        return found

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Measures a unit, unless its result is cached."""
        key = self.key(unit)
        value = self._unsure.get(unit) or self.results.get(key)
        if value is None:
            ways: dict[str, Callable[[str], dict[str, Any]]] = {
                TEXT: self._text, WRITING: self._writing, SPEED: self._speed,
            }  # fmt: skip
            value = ways[unit.what](unit.model) if unit.what in ways else self._task(unit)
            if "failed" in value.get(
                "vllm", {}
            ):  # in part: for this report, and the next tries again
                self._unsure[unit] = value
            else:
                self.results.put(key, value)
        return dict(value)

    def _text(self, name: str) -> dict[str, Any]:
        from nemo_minitron.evaluation.held_out_loss import held_out
        from nemo_minitron.models.causal_lm import frozen

        model, teacher = self._model(name), None
        if name != "teacher":
            teacher = (self._model("teacher"), self.checkpoint("teacher").family)
        samples_NS, more = self._samples(name), dict[str, Any]()
        # what a token counts for while it is learnt decides no measure
        entries = self.vocabulary
        if isinstance(entries, KeptEntries):
            entries, tokenizer = KeptEntries(entries.ids_V), self._tokenizer(name)
            lengths_V = byte_lengths(tokenizer, self.checkpoint(name).architecture.sizes[VOCAB])
            more["counts"], more["bytes"] = counted_bytes(samples_NS, lengths_V)
        with frozen(model):
            found = held_out(
                model, self.checkpoint(name).family, samples_NS, self.config.evaluate.batch_size,
                teacher, entries,
            )  # fmt: skip
        documents, tokens = self._packed().documents, int((samples_NS[:, 1:] >= 0).sum())
        return {**asdict(found), "tokens": tokens, "documents": documents, **more}

    def covered(self) -> float:
        """Share of the held-out text's tokens that are among the entries of models that were cut."""
        import torch

        assert isinstance(self.vocabulary, KeptEntries)
        return float(torch.isin(self._samples(), self.vocabulary.ids_V).float().mean())

    def _writing(self, name: str) -> dict[str, Any]:
        """What a model writes, and what the teacher thinks of it."""
        from nemo_minitron.evaluation.generation import (
            as_text,
            continue_greedily,
            loss_of,
            repetition,
        )
        from nemo_minitron.models.causal_lm import frozen

        settings = self.config.evaluate
        samples_NS, length = self._samples(name), settings.written_tokens
        prompt = max(1, min(length, (samples_NS.shape[1] - 1) // 2))
        prompts_BP = samples_NS[: settings.prompts, :prompt]
        teacher, family = self._model("teacher"), self.checkpoint("teacher").family
        with frozen(self._model(name)) as model:
            ids_BS = continue_greedily(model, prompts_BP, length)
        truth_BS = samples_NS[: settings.prompts, prompt : prompt + length].clamp(min=0)
        tokenizer, more, read_BP, read_BS = (
            self._tokenizer(name),
            dict[str, Any](),
            prompts_BP,
            ids_BS,
        )
        with frozen(teacher):
            if (cut := self.cut(name)) is not None:  # the teacher goes on from the same beginnings
                read_BP, read_BS = (read_by_teacher(cut, ids) for ids in (prompts_BP, ids_BS))
                theirs_BS = continue_greedily(teacher, read_BP, length)
                more = {"in_teacher_ids": read_BS.tolist(), "theirs": theirs_BS.tolist()}
            loss = loss_of(teacher, family, read_BP, read_BS)
        return {
            "ids": ids_BS.tolist(), "teacher_loss": loss, "repetition": repetition(ids_BS),
            "prompts": as_text(tokenizer, prompts_BP), "texts": as_text(tokenizer, ids_BS),
            "truth": as_text(tokenizer, truth_BS), **more,
        }  # fmt: skip

    def _task(self, unit: Unit) -> dict[str, Any]:
        from nemo_minitron.evaluation.lm_eval import ask, check_tasks

        settings = self.config.evaluate
        check_tasks([unit.what], settings.task_dir)
        found = ask(
            self._lm(unit.model), unit.what, settings.task_dir, self.tasks, settings.task_limit,
            answers_of(settings),
        )  # fmt: skip
        return asdict(found)

    def _lm(self, name: str) -> Any:
        """lm-eval's model that answers for one of the workspace's."""
        settings, folder = self.config.evaluate, self.folders[name]
        answers, size = answers_of(settings), self.config.evaluate.batch_size
        if settings.backend == "hf":
            from nemo_minitron.evaluation.lm_eval import hf_lm

            lm = hf_lm(self._model(name), self._tokenizer(name), size)
        elif settings.backend == "openai":
            lm = server_lm(
                address_of(settings.servers, name), name, self._tokenizer_folder(name),
                self._positions(name), size, settings.seed,
            )  # fmt: skip
        else:
            lm = self._engine(name)
        if answers == Answers():
            return lm
        return with_stops(lm, stop_texts(folder, self._tokenizer(name)))

    def _engine(self, name: str) -> Any:
        """VLLM of a model; it takes the device's memory for itself, so that no other model stays in it."""
        if _ENGINE.format(name) not in self._loaded:
            self.release()
            dtype, size = self.dtypes.get(name, "auto"), self.config.evaluate.batch_size
            engine = vllm_lm(self.folders[name], self._tokenizer_folder(name), dtype, size)
            self._loaded[_ENGINE.format(name)] = engine
        return self._loaded[_ENGINE.format(name)]

    def _positions(self, name: str) -> int:
        """Tokens that a model reads at most, by its config.json."""
        found = self.checkpoint(name).config.get("max_position_embeddings")
        return found if isinstance(found, int) else 2048

    def _speed(self, name: str) -> dict[str, Any]:
        from nemo_minitron.evaluation.speed import measure_in_process

        dtype = self.dtypes.get(name, "auto")
        return measure_in_process(
            self.folders[name], self.config.evaluate.device, self._cases(), dtype
        )

    def _cases(self) -> list[Any]:
        from nemo_minitron.evaluation.speed import Case

        settings = self.config.evaluate
        contexts = [settings.prompt_tokens, *settings.contexts]
        return [Case(b, c, settings.new_tokens) for c in contexts for b in settings.speed_batches]

    def _model(self, name: str) -> Any:
        """A loaded model; besides the teacher one model is in memory at a time."""
        if name not in self._loaded:
            from nemo_minitron.models.causal_lm import load_model, pick_device

            for other in [other for other in self.folders if other != "teacher"]:
                self._loaded.pop(other, None)
            self._release_engines()
            device = pick_device(self.config.evaluate.device)
            self._loaded[name] = load_model(
                self.folders[name], self.dtypes.get(name, "auto"), device
            )
        return self._loaded[name]

    def release(self) -> None:
        """Frees all models, because speed is measured in processes that need the memory."""
        from nemo_minitron.models.causal_lm import free

        for name in self.folders:
            self._loaded.pop(name, None)
        self._release_engines()
        free()

    def _release_engines(self) -> None:
        for name in self.folders:
            if (engine := self._loaded.pop(_ENGINE.format(name), None)) is not None:
                end_vllm(engine)

    def _tokenizer_folder(self, model: str) -> Path:
        """Where the tokenizer that a model reads by lies."""
        return self.folders["teacher" if self.cut(model) is None else "student"]

    def _tokenizer(self, model: str = "teacher") -> Any:
        folder = self._tokenizer_folder(model)
        name = f"tokenizer of {folder}"
        if name not in self._loaded:
            from nemo_minitron.models.causal_lm import load_tokenizer

            self._loaded[name] = load_tokenizer(folder)
        return self._loaded[name]

    def _packed(self) -> Any:
        if "samples" not in self._loaded:
            from nemo_minitron.data.mixtures import validation_packed

            self._loaded["samples"] = validation_packed(self.config, self._tokenizer())
        return self._loaded["samples"]

    def _samples(self, model: str = "teacher") -> Any:
        """The held-out text in a model's own tokens."""
        if self.cut(model) is None:
            return self._packed().samples
        if "own samples" not in self._loaded:
            most = self.checkpoint(model).config.get("max_position_embeddings")
            self._loaded["own samples"] = in_own_tokens(
                self._tokenizer(), self._tokenizer(model), self._packed().samples, most and most + 1
            )
        return self._loaded["own samples"]


def work(bench: Bench, ranks: Any) -> list[Failed]:
    """Measures this rank's units; a failed task does not stop the others.

    Speed is rank 0's, when the others have done.

    Returns:
        Tasks that failed, of all ranks.
    """
    units = bench.units()
    mine = [unit for unit in units if unit.what != SPEED][ranks.rank :: ranks.size]
    failed = list(_each(bench, mine))
    bench.release()
    found = [
        failure for each in ranks.gather([each.plain() for each in failed]) for failure in each
    ]
    if ranks.rank == 0:
        found[: len(failed)] = failed
        found += _each(bench, [unit for unit in units if unit.what == SPEED])
    return found


def _each(bench: Bench, units: list[Unit]) -> Iterator[Failed]:
    with bar("evaluating", len(units)) as advance:
        for unit in units:
            try:
                bench.measure(unit)
            except Exception as error:  # whatever a task's own code raises
                if unit.what in (TEXT, WRITING, SPEED):
                    raise
                words = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                yield Failed(unit, words, error)
            advance(1)
