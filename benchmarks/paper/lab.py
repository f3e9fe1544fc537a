"""Trains, cuts, teaches and measures for all experiments, through configurations and ``run_stage`` alone.

A model is described by a frozen value (``Model``); its workspace and its measurement are named by a hash of it, so that
experiments share what they have in common, and what has been measured is not measured again. Workspaces lie in
``runs/paper/PROFILE``; a run that was stopped goes on where it was.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.paper import criteria
from benchmarks.paper.corpus import corpora
from benchmarks.paper.profiles import Profile
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import validation_samples, validation_text
from nemo_minitron.evaluation.held_out_loss import held_out_loss
from nemo_minitron.evaluation.held_out_tasks import write_held_out_tasks
from nemo_minitron.models.causal_lm import frozen, load_model, load_tokenizer
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.stages.run import run_stage
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.training_log import read_log

ROOT = Path("runs/paper")
AXES = ("hidden", "ffn", "heads", "kv_heads", "layers")


class OutOfTime(Exception):
    """The piece's minutes are over; what has been measured is kept."""


@dataclass(frozen=True)
class Model:
    """A model that an experiment measures.

    Attributes:
        cut: overrides of score and plan; empty: the model that ``of`` names, as it is.
        teach: overrides of the distillation.
        steps: of training; 0: as it was cut.
        scratch: trained from random weights, in the shape of the cut.
        family: of the teacher.
        text: ``code`` or ``headers``: what is trained, calibrated and measured on.
        corrected: steps of teacher correction on that text.
        criterion: one of ``criteria``, whose scores stand in the place of ours; empty: ours.
        of: the model that is cut; None: the teacher.
        taught_by: the model that is learned from; None: the one that was cut (corrected, if so).
    """

    cut: tuple[str, ...] = ()
    teach: tuple[str, ...] = ()
    steps: int = 0
    scratch: bool = False
    family: str = "nemotron"
    text: str = "code"
    corrected: int = 0
    criterion: str = ""
    of: "Model | None" = None
    taught_by: "Model | None" = None


def to(sizes: dict[str, int] | Any) -> tuple[str, ...]:
    """Overrides of a plan's sizes."""
    return tuple(f"plan.{axis}={size}" for axis, size in sizes.items())


@dataclass
class Lab:
    """One seed of a profile.

    Attributes:
        profile: how large.
        seed: of the teacher's weights, the order of samples, and the random baseline.
        ends: time after which nothing new begins; None: none.
        given: a trained model in the teacher's place, and overrides that say with which text.
    """

    profile: Profile
    seed: int
    ends: float | None = None
    given: tuple[Path, tuple[str, ...]] | None = None
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        name = "given" if self.given else f"seed-{self.seed}"
        self.root = ROOT / self.profile.name / name
        self._kinds: dict[Any, Any] = {}
        self.texts = {} if self.given else corpora(ROOT / "corpus")

    # what is measured

    def measured(self, model: Model, accuracy: bool = False) -> dict[str, Any]:
        """Loss, size and cost of a model.

        Returns:
            ``loss`` (held out, nats per token), ``parameters``, ``flops_per_token``; of a trained
            one ``curve`` ([[step, loss], ...]), ``tokens`` and ``tokens_per_second``; with
            ``accuracy`` the share of right answers of a multiple-choice task made from held-out text.
        """
        found = self._kept("model", model, self._measure)
        if accuracy:
            found = {**found, **self._kept("accuracy", model, self._accuracy)}
        return found

    def before_and_after(self, model: Model, accuracy: bool = False) -> dict[str, Any]:
        """``measured`` of a model that was cut and trained; ``pruned``: its loss before (``pruned_accuracy``)."""
        cut = replace(model, steps=0, teach=(), taught_by=None)
        before = self.measured(cut, accuracy)
        found = {"pruned": before["loss"], **self.measured(model, accuracy)}
        return {**found, "pruned_accuracy": before["accuracy"]} if accuracy else found

    def _kept(self, what: str, model: Model, measure: Any) -> dict[str, Any]:
        """A measurement that is made once."""
        path = self.root / "measured" / f"{what}-{self._name(model)}.json"
        if not path.is_file():
            if self.ends is not None and time.monotonic() > self.ends:
                raise OutOfTime
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"model": asdict(model), "found": measure(model)}
            write_json(path, found)
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["found"]
        return value

    def _measure(self, model: Model) -> dict[str, Any]:
        folder = self.folder(model)
        checkpoint = open_checkpoint(folder)
        size = model_size(checkpoint.architecture, self.measuring().data.train.sequence_length)
        found: dict[str, Any] = {
            "loss": self.loss(folder, model.text, model.family), "parameters": size.parameters,
            "flops_per_token": size.flops_per_token,
        }  # fmt: skip
        if model.steps:
            log = read_log(folder.parent / "metrics.jsonl")
            found["curve"] = [
                [line["step"], line["val_loss"]] for line in log if "val_loss" in line
            ]
            found["tokens"] = log[-1]["tokens"]
            found["tokens_per_second"] = statistics.median(
                line["tokens_per_second"] for line in log if "tokens_per_second" in line
            )
        return found

    def loss(self, folder: Path, text: str, family: str) -> float:
        """Held-out loss of a folder's model, with a family's tokenizer, on a text."""
        config = self.measuring(text)
        if (family, text) not in self._kinds:
            self._kinds[family, text] = validation_samples(config, load_tokenizer(folder))
        with frozen(self._loaded(folder)) as loaded:
            samples_NS = self._kinds[family, text]
            return held_out_loss(loaded, open_checkpoint(folder).family, samples_NS, 16)

    def _loaded(self, folder: Path) -> Any:
        on_gpu = self.measuring().trainer["accelerator"] == "gpu"
        return load_model(folder).to("cuda" if on_gpu else "cpu")

    def measuring(self, text: str = "code") -> Config:
        """A configuration to measure with, made once."""
        if text not in self._kinds:
            self._kinds[text] = self.config("measuring", text=text)
        found: Config = self._kinds[text]
        return found

    def _accuracy(self, model: Model) -> dict[str, Any]:
        from nemo_minitron.data.documents import documents, plain
        from nemo_minitron.evaluation.lm_eval import run_task
        from nemo_minitron.evaluation.task_accuracy import ACCURACIES

        folder = self.folder(model)
        config = self.measuring(model.text)
        with tempfile.TemporaryDirectory() as name, frozen(self._loaded(folder)) as loaded:
            write_held_out_tasks(plain(documents(validation_text(config))), Path(name), self.seed)
            found = run_task(
                loaded, load_tokenizer(folder), "held_out_choice", None, Path(name),
                self.profile.questions, 16, quiet=True,
            )  # fmt: skip
        return {
            "accuracy": next(found.metrics[name] for name in ACCURACIES if name in found.metrics)
        }

    # what is made

    def folder(self, model: Model) -> Path:
        """The Hugging Face folder of a model, made where it is missing."""
        if not model.cut and not model.steps:
            return self._corrected(model) if model.corrected else self.teacher(model.family)
        workspace = self._place("model", model)
        config = self._config(workspace, model)
        # only what is not trained is looked for here: a student knows itself whether it is whole
        self._share(self._scored(model), workspace)
        for stage in ("plan", "prune"):
            run_stage(stage, config)
        if not model.steps:
            return Workspace(workspace).pruned
        run_stage("pretrain" if model.scratch else "distill", config)
        made = Workspace(workspace)
        return (made.scratch if model.scratch else made.student) / "hf"

    def teacher(self, family: str = "nemotron") -> Path:
        """The teacher of a family, trained where it is missing."""
        if self.given:
            return self.given[0]
        config = self.config(f"teacher-{family}", [f"pretrain.seed={self.seed}"])
        config.pretrain.model = dict(self.profile.models[family])
        made = Workspace(Path(config.workspace)).pretrain
        if not (made / "manifest.json").is_file():
            run_stage("pretrain", config)
        return made / "hf"

    def _corrected(self, model: Model) -> Path:
        return Workspace(self._scored(model)).correct / "hf"

    def _scored(self, model: Model) -> Path:
        """The workspace with source, correction and scores of a cut; made where it is missing."""
        decide = tuple(word for word in model.cut if word.startswith(("score.", "data.")))
        parts = {part for word in model.cut for part in _parts(word)}
        if {"iterations", "greedy", "contiguous"} & parts or model.criterion in criteria.ROTATED:
            decide = model.cut  # scoring looks at the sizes
        shared = Model(
            decide, family=model.family, text=model.text, corrected=model.corrected,
            criterion=model.criterion, of=model.of,
        )  # fmt: skip
        workspace = self._place("scores", shared)
        config = self._config(workspace, shared)
        stages = ["download", *(["correct"] if model.corrected else [])]
        for stage in stages:
            run_stage(stage, config)
        if not model.cut:
            return workspace
        if model.criterion:
            criteria.write(model.criterion, config)
        else:
            run_stage("score", config)
        return workspace

    def _config(self, workspace: Path, model: Model) -> Config:
        source = self.folder(model.of) if model.of else self.teacher(model.family)
        if model.criterion in criteria.ROTATED:
            source = self._rotated(source, model)
        steps, words = max(1, model.steps), list(model.teach)
        warmup = min(20, max(1, steps // 6))
        if model.taught_by is not None:
            words.append(f"distill.teacher={self.folder(model.taught_by)}")
        elif model.criterion in criteria.ROTATED:
            words.append(f"distill.teacher={self.teacher(model.family)}")
        config = self.config(
            workspace.relative_to(self.root),
            [
                f"source.model={source}", "pretrain.enabled=false", f"score.seed={self.seed}",
                f"distill.seed={self.seed}", f"pretrain.seed={self.seed + 1000 * model.scratch}",
                f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, steps // 8)}",
                f"exp_manager.checkpoint_callback_params.every_n_train_steps={max(100, steps // 8)}",
                *(f"{part}optim.sched.warmup_steps={warmup}" for part in ("", "pretrain.")),
                f"correct.enabled={bool(model.corrected)}",
                f"correct.trainer.max_steps={max(1, model.corrected)}",
                f"correct.trainer.val_check_interval={max(1, model.corrected)}",
                f"correct.optim.sched.warmup_steps={min(20, max(1, model.corrected // 6))}",
                f"correct.seed={self.seed}", *model.cut, *words,
            ],
            model.text,
        )  # fmt: skip
        config.pretrain.baseline = model.scratch
        return config

    def _rotated(self, source: Path, model: Model) -> Path:
        """The model whose last channels a rotation makes the least of."""
        hidden = int(
            next(word for word in model.cut if word.startswith("plan.hidden=")).split("=")[1]
        )
        config = self.measuring(model.text)
        target = (
            self.root / f"rotated-{self._name(Model(family=model.family, of=model.of))}-{hidden}"
        )
        return criteria.rotated(source, target, hidden, lambda: criteria.samples_of(config, source))

    def config(self, workspace: str | Path, words: Any = (), text: str = "code") -> Config:
        """A configuration of this seed."""
        own = (
            self.given[1]
            if self.given
            else (f"data.train.paths=[{self.texts[text]}]", "data.train.exclude=[]")
        )
        return load_config(
            "demo",
            [
                f"workspace={self.root / workspace}", *(f"plan.{axis}=null" for axis in AXES),
                *self.profile.words, *own, *words, *self._limit(),
            ],
        )  # fmt: skip

    def _limit(self) -> list[str]:
        """How long a training may take: what is left of the piece, but at least half a minute."""
        if self.ends is None:
            return []
        left = max(30, round(self.ends - time.monotonic()))
        return [
            f"+exp_manager.max_time_per_run='00:{left // 3600:02}:{left // 60 % 60:02}:{left % 60:02}'"
        ]

    def _name(self, model: Model) -> str:
        """A hash of everything that decides a model."""
        given = [open_checkpoint(self.given[0]).fingerprint, *self.given[1]] if self.given else []
        every = (
            asdict(model),
            self.profile.words,
            self.profile.models.get(model.family),
            self.seed,
            given,
        )
        return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()[:12]

    def _place(self, kind: str, model: Model) -> Path:
        return self.root / f"{kind}-{self._name(model)}"

    def _share(self, source: Path, workspace: Path) -> None:
        """Links source, correction, scores and tokens of a scoring into a workspace."""
        workspace.mkdir(parents=True, exist_ok=True)
        for link, target in zip(Workspace(workspace).shared, Workspace(source).shared, strict=True):
            if target == Workspace(source).tokens:
                target = self.root / "tokens"  # of all: named by text and tokenizer
                target.mkdir(exist_ok=True)
            if target.exists() and not link.is_symlink():
                link.symlink_to(os.path.relpath(target, workspace), target_is_directory=True)


def _parts(word: str) -> list[str]:
    return word.replace("=", ".").split(".")
