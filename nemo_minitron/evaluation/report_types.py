"""What report.json and the gate's files hold, as types: what is damaged is refused by file and field."""

from typing import Any, TypedDict

from nemo_minitron.workspace.manifest import Input


class Case(TypedDict):
    """Speed at one batch and length of prompt."""

    batch: int
    prompt: int
    first_token_ms: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class ServedCase(TypedDict):
    """The same in vLLM."""

    tokens_per_second: float


class Served(TypedDict, total=False):
    """Speed in vLLM, or why there is none."""

    cases: list[ServedCase]
    failed: str


class _Unserved(TypedDict):
    cases: list[Case]
    peak_megabytes: float | None


class Speed(_Unserved, total=False):
    """Speed of a model."""

    vllm: Served


class Written(TypedDict):
    """How a model continues prompts by itself."""

    teacher_loss: float
    repetition: float
    agreement: float


class _Measured(TypedDict):
    parameters: int
    loss: float
    perplexity: float
    retention: float
    divergence: float | None
    top1: float | None


class Row(_Measured, total=False):
    """What was measured of one model."""

    writing: Written
    tasks: dict[str, dict[str, float]]
    speed: Speed
    bits_per_byte: float
    tokens_per_byte: float
    own_loss: float


class Compared(TypedDict):
    """One model against the teacher in one measure."""

    task: str
    metric: str
    higher_is_better: bool
    model: str
    difference: float
    error: float | None
    p: float | None
    recovered: float | None
    documents: int


class MeasuredOn(TypedDict):
    """Text, tasks and limits; only what is read is typed."""

    task_limit: int | None
    tasks: dict[str, Any]


class Kept(TypedDict):
    """Entries of the vocabulary that were kept, and the share of the held-out text's tokens that they are."""

    kept: int
    of: int
    held_out: float


class _Report(TypedDict):
    workspace: str
    models: dict[str, Row]
    better: dict[str, dict[str, bool]]
    data_sets: dict[str, Any]
    compared: list[Compared]
    measured_on: MeasuredOn


class Report(_Report, total=False):
    """report.json."""

    prompts: int
    vocabulary: Kept
    writing: list[dict[str, str]]


class Verdict(TypedDict):
    """gate.json."""

    report: tuple[str, str]
    rows: list[tuple[str, str, str, str]]


class _Scored(TypedDict):
    perplexity: float


class Scored(_Scored, total=False):
    """The student of an earlier export."""

    tasks: dict[str, dict[str, float]]


class Results(TypedDict):
    """What was measured of an earlier export."""

    student: Scored
    measured_on: dict[str, Any]


class Made(TypedDict):
    """An artifact that an export came from."""

    kind: str
    config: dict[str, Any]
    inputs: list[Input]
    fingerprint: str


class Lineage(TypedDict, total=False):
    """minitron.json, as far as it is read again."""

    results: Results
    stages: list[Made]
