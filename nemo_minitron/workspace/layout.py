"""Where everything of a run lies: the names of a workspace's folders and files are written here only.

What several subjects look for inside of an artifact is here, too; the files that one subject alone
writes and reads (scores, a plan, a report, parts of a pass) are named by that subject. ``archive``
and ``slurm_jobs`` look at the disk, nothing else does, and nothing writes.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

MADE_BY = {
    "pretrain": "pretrain",
    "teacher": "download",
    "correct": "correct",
    "scores": "score",
    "layer_times": "measure-layers",
    "screen": "screen",
    "sensitivity": "sensitivity",
    "plan": "plan",
    "pruned": "prune",
    "logits": "logits",
    "student": "distill",
    "scratch": "pretrain",
    "report": "evaluate",
    "export": "export",
}
"""Artifact to the command that makes it, in the order in which they are made."""
ARTIFACTS = tuple(MADE_BY)
"""Sub-folders of a workspace that can hold an artifact."""
MANIFEST = "manifest.json"
"""In every artifact: what it is, what it was made from, its files. Written last."""
STATE = "state"
"""Sub-folder of an artifact in the making that survives interruption: what a training resumes from."""
ASIDE = "state-"
"""How sub-folders begin that hold what other settings made or began; they are no part of the artifact."""
MODEL = "hf"
"""Sub-folder of an artifact that was trained: the model, a Hugging Face folder."""
METRICS = "metrics.jsonl"
"""In an artifact that was trained, and in its state while it is made: the log of the training."""
LOGS = "logs"
"""Sub-folder of an artifact that was trained with what loggers wrote; of a workspace: what stages printed."""
TOKENS = "tokens"
"""Sub-folder of a workspace with its texts as token ids, one folder per text and tokenizer."""
IDS = "tokens.bin"
"""In such a folder: the ids."""
DATA_COMMITS = "data_commits"
"""Sub-folder of a workspace with the commits of the hub's data sets that it stays with, one file each."""
LIVE = "live"
"""Sub-folder of a workspace with the models that teacher correction publishes while it trains."""
UNPACKED = "unpacked"
"""Sub-folder of a workspace with the models of ``.nemo`` archives, one folder per archive."""
RESULTS = "results"
"""Sub-folder of a workspace with one file per measurement."""
LOCK = ".lock"
"""Held by a run for as long as it works in the workspace."""
STAGE_LOCK = ".stage.lock"
"""Held by the process of a stage, which may live a little longer than its run."""
HOLDER = ".holder.json"
"""Which process holds the workspace, for the eyes of others; the lock itself is the operating system's."""
COMMANDS = "commands.jsonl"
"""Commands that worked on the workspace."""
VERDICT = "gate.json"
"""What the quality gate said of the report."""
MEMORY = ".memory.json"
"""Stage to how often its micro-batch was halved, for want of memory."""
_OUTCOME, _PROGRESS, _SLURM = ".outcome.json", ".progress.json", ".slurm.json"

FOLDERS = (
    *ARTIFACTS, TOKENS, DATA_COMMITS, LIVE, UNPACKED, RESULTS, ".launch", LOGS, "rounds", "variants", "steps",
)  # fmt: skip
"""Entries of a workspace that are folders."""
FILES = (
    LOCK, STAGE_LOCK, HOLDER, COMMANDS, VERDICT, MEMORY,
    "search.json", "sweep.json", "cascade.json", "pareto.png",
)  # fmt: skip
"""Entries of a workspace that are files."""


def is_own(name: str) -> bool:
    """Whether an entry of a workspace is read or written by this package; others are the user's."""
    beside = name.startswith(".") and name.endswith((".partial", ".tmp"))
    return beside or name in (*FOLDERS, *FILES)


@dataclass(frozen=True)
class Workspace:
    """The paths of a run; none of them needs to be there.

    Attributes:
        root: the workspace.
    """

    root: Path

    def artifact(self, name: str) -> Path:
        """The folder of an artifact, by its name."""
        return self.root / name

    @property
    def artifacts(self) -> tuple[Path, ...]:
        """The folders of all artifacts, in the order in which they are made."""
        return tuple(self.root / name for name in ARTIFACTS)

    @property
    def pretrain(self) -> Path:
        """Artifact: a teacher that the run trains itself, from random weights."""
        return self.root / "pretrain"

    @property
    def teacher(self) -> Path:
        """Artifact: a pointer at the model that is compressed."""
        return self.root / "teacher"

    @property
    def source(self) -> Path:
        """Where the teacher lies, what was asked for and, of a hub's model, its commit."""
        return self.teacher / "source.json"

    @property
    def correct(self) -> Path:
        """Artifact: the teacher, trained on the distillation data."""
        return self.root / "correct"

    @property
    def scores(self) -> Path:
        """Artifact: the importance of all that can be cut."""
        return self.root / "scores"

    @property
    def layer_times(self) -> Path:
        """Artifact: what each kind of layer takes on this machine, by its sizes."""
        return self.root / "layer_times"

    @property
    def screen(self) -> Path:
        """Artifact: the candidates of a search as they are cut, measured in memory."""
        return self.root / "screen"

    @property
    def sensitivity(self) -> Path:
        """Artifact: what the loss becomes when one axis, or one layer, is cut."""
        return self.root / "sensitivity"

    @property
    def plan(self) -> Path:
        """Artifact: what stays."""
        return self.root / "plan"

    @property
    def pruned(self) -> Path:
        """Artifact: the cut model, a Hugging Face folder."""
        return self.root / "pruned"

    @property
    def logits(self) -> Path:
        """Artifact: the teacher's logits, a few entries per token."""
        return self.root / "logits"

    @property
    def student(self) -> Path:
        """Artifact: the cut model, distilled."""
        return self.root / "student"

    @property
    def scratch(self) -> Path:
        """Artifact: the baseline, a model of the student's size trained from random weights."""
        return self.root / "scratch"

    @property
    def report(self) -> Path:
        """Artifact: what was measured."""
        return self.root / "report"

    @property
    def export(self) -> Path:
        """Artifact: the student as a Hugging Face folder with card and lineage."""
        return self.root / "export"

    @property
    def archive(self) -> Path:
        """The export as a NeMo archive, named like the workspace."""
        return self.root / f"{self.root.resolve().name}.nemo"

    @property
    def verdict(self) -> Path:
        """What the quality gate said of the report."""
        return self.root / VERDICT

    @property
    def tokens(self) -> Path:
        """Texts as token ids, one folder per text and tokenizer."""
        return self.root / TOKENS

    @property
    def data_commits(self) -> Path:
        """Commits of the hub's data sets that the workspace stays with."""
        return self.root / DATA_COMMITS

    @property
    def results(self) -> Path:
        """Measurements, one file for each."""
        return self.root / RESULTS

    def held_out_tasks(self, fingerprint: str) -> Path:
        """The questions that are made from a held-out text, by the text's fingerprint."""
        return self.results / f"tasks-{fingerprint[:12]}"

    @property
    def live(self) -> Path:
        """Models that teacher correction publishes while it trains."""
        return self.root / LIVE

    @property
    def unpacked(self) -> Path:
        """Models of ``.nemo`` archives, one folder per archive."""
        return self.root / UNPACKED

    def unpacked_model(self, stamp: str) -> Path:
        """The model of one ``.nemo`` archive, a Hugging Face folder."""
        return model_in(self.unpacked / stamp)

    @property
    def shared(self) -> tuple[Path, ...]:
        """What the variants of a sweep see as their own."""
        first = (self.pretrain, self.teacher, self.correct, self.scores)
        return (*first, self.tokens, self.unpacked, self.data_commits)

    @property
    def search(self) -> Path:
        """The rounds of a search, and its choice."""
        return self.root / "search.json"

    def round(self, steps: int, name: str) -> Path:
        """Workspace of a search's candidate that is distilled for so many steps."""
        return self.root / "rounds" / str(steps) / name

    @property
    def sweep(self) -> Path:
        """What became of a sweep's variants."""
        return self.root / "sweep.json"

    def variant(self, name: str) -> Path:
        """Workspace of a sweep's variant."""
        return self.root / "variants" / name

    @property
    def cascade(self) -> Path:
        """What became of a cascade's steps."""
        return self.root / "cascade.json"

    def step(self, name: str) -> "Workspace":
        """Workspace of a cascade's step."""
        return Workspace(self.root / "steps" / name)

    @property
    def pareto(self) -> Path:
        """Picture of the losses of all variants against their sizes."""
        return self.root / "pareto.png"

    @property
    def lock(self) -> Path:
        """Held by a run for as long as it works here."""
        return self.root / LOCK

    @property
    def stage_lock(self) -> Path:
        """Held by the process of a stage."""
        return self.root / STAGE_LOCK

    @property
    def holder(self) -> Path:
        """Which process holds the workspace."""
        return self.root / HOLDER

    @property
    def commands(self) -> Path:
        """Commands that worked here, in order, credentials masked."""
        return self.root / COMMANDS

    @property
    def memory(self) -> Path:
        """Stage to how often its micro-batch was halved, for want of memory."""
        return self.root / MEMORY

    @property
    def launched(self) -> Path:
        """What a run and the processes of its stages tell each other; readable by this user alone."""
        return self.root / ".launch"

    def values(self, stage: str) -> Path:
        """The configuration that a stage's process gets."""
        return self.launched / f"{stage}.json"

    def outcome(self, stage: str) -> Path:
        """What a stage's process leaves: its result, or what it failed by."""
        return self.launched / f"{stage}{_OUTCOME}"

    def progress(self, stage: str) -> Path:
        """How far a stage is."""
        return self.launched / f"{stage}{_PROGRESS}"

    def slurm(self, stage: str) -> Path:
        """The batch job that a stage runs as."""
        return self.launched / f"{stage}{_SLURM}"

    @property
    def slurm_jobs(self) -> list[Path]:
        """The notes of all batch jobs that there are; reads the folder."""
        return sorted(self.launched.glob(f"*{_SLURM}"))

    def log(self, stage: str) -> Path:
        """What a stage in processes of its own has printed."""
        return self.root / LOGS / f"{stage}.log"


def outcome_of_job(noted: Path) -> Path:
    """The outcome of the stage whose batch job is noted in a file of ``Workspace.slurm``."""
    return noted.with_name(f"{noted.name.removesuffix(_SLURM)}{_OUTCOME}")


def outcome_of_rank(outcome: Path, rank: int) -> Path:
    """Where one rank of a stage leaves its outcome: the first one the stage's, the others beside it."""
    return outcome.with_name(f"{outcome.stem}.{rank}.json") if rank else outcome


def manifest_in(folder: Path) -> Path:
    """The manifest of an artifact."""
    return folder / MANIFEST


def state_in(folder: Path) -> Path:
    """What the making of an artifact resumes from."""
    return folder / STATE


def aside_in(folder: Path, recipe: str) -> Path:
    """What another recipe has made or begun of an artifact."""
    return folder / f"{ASIDE}{recipe[:12]}"


def result_in(folder: Path) -> Path:
    """What a making that resumes has finished, before its files move up into the artifact."""
    return folder / "result"


def model_in(folder: Path) -> Path:
    """The model in an artifact that was trained, a Hugging Face folder."""
    return folder / MODEL


def metrics_in(folder: Path) -> Path:
    """The log of a training, in its artifact or its state."""
    return folder / METRICS


def logs_in(folder: Path) -> Path:
    """What loggers wrote of a training, and its archives; beside the artifact's own files."""
    return folder / LOGS


def plots_in(folder: Path) -> Path:
    """The pictures of an artifact."""
    return folder / "plots"


def nemo_in(state: Path) -> Path:
    """What NeMo's experiment manager writes while a model is trained."""
    return state / "nemo"


def checkpoints_in(state: Path) -> Path:
    """The checkpoints that a training resumes from."""
    return nemo_in(state) / "checkpoints"


def best_in(state: Path) -> Path:
    """The weights of a training's best validations, one file each."""
    return state / "best"


def teachers_in(state: Path) -> Path:
    """The snapshots that a distillation with a live teacher has taken, one folder each."""
    return state / "teachers"


def snapshot_in(folder: Path, step: int) -> Path:
    """A published model, or weights, by the step of the training that they come from."""
    return folder / f"step={step}"


def build_lock_of(folder: Path) -> Path:
    """Held by who writes a folder that several runs share."""
    return folder.with_name(f".{folder.name}{LOCK}")


def commit_in(folder: Path, repository: str, revision: str | None) -> Path:
    """The commit of a data set, in ``Workspace.data_commits``, by the revision that was asked for."""
    asked = "" if revision is None else f"@{quote(revision, safe='')}"
    return folder / f"{repository.replace('/', '--')}{asked}.json"
