"""Keys of ``evaluate``."""

from dataclasses import dataclass

from nemo_minitron.config.bounds import ANY_SEED, SHARE, Bounds
from nemo_minitron.config.option import option


@dataclass
class EvaluateConfig:
    """What is measured, and the gate before export."""

    tasks: list[str] = option(
        [],
        "lm-eval tasks by name, with @ and the number of examples before each question where it is not the "
        "task's own (arc_challenge@25); held_out_choice and held_out_bytes are made from the validation text",
    )
    task_dir: str | None = option(None, "folder with own lm-eval task YAMLs")
    task_limit: int | None = option(None, "documents per task; null: all", least=1)
    chat: bool = option(
        False,
        "ask as in a chat: questions as messages in the chat template, the examples before them as turns",
    )
    backend: str = option(
        "hf",
        "what answers in tasks: transformers in this process, vLLM, or servers that speak OpenAI's "
        "completions (evaluate.servers)",
        ("hf", "vllm", "openai"),
    )
    servers: dict[str, str] = option(
        {},
        "addresses for backend=openai, as in +evaluate.servers.student=http://127.0.0.1:8000/v1, for each "
        "model that is measured, or all",
    )
    repeats: int = option(
        1,
        "answers drawn to each question of tasks in which the model writes, whose mean counts; 1: one, as "
        "the task says",
        bounds=Bounds(least=1, most=1_024),
    )
    temperature: float = option(
        1.0, "softmax temperature of the draws of repeats", bounds=Bounds(above=0)
    )
    seed: int = option(0, "seed of the draws of repeats", bounds=ANY_SEED)
    model: str | None = option(
        None,
        "model folder or GGUF file, such as an earlier export, to measure against source.model; null: what "
        "this workspace pruned and distilled",
    )
    teacher: str | None = option(
        None,
        "model folder or GGUF file that all are measured against; null: the (corrected) source",
    )
    beside: dict[str, str] = option(
        {},
        "folders or GGUF files of further models to measure beside, by name, as in "
        "+evaluate.beside.last=runs/last/export",
    )
    from_scratch: bool = option(
        False, "also train and measure a model of the student's shape from random weights"
    )
    min_retention: float | None = option(
        None,
        "least allowed perplexity retention (teacher perplexity / student perplexity), 0 to 1",
        least=0,
    )
    floors: list[str] = option(
        [],
        "TASK:METRIC:VALUE each: what the student must reach (or stay under, where less is better) "
        "to be exported",
    )
    previous: str | None = option(
        None, "folder of an earlier export that the student must not fall behind"
    )
    max_regression: float = option(
        0.02,
        "how far, relatively, the student may fall behind evaluate.previous in any measure",
        bounds=SHARE,
    )
    batch_size: int = option(8, "samples per forward pass", bounds=Bounds(least=1, most=16_384))
    prompts: int = option(
        16,
        "held-out prompts that every model continues; 0: none",
        bounds=Bounds(least=0, most=16_384),
    )
    written_tokens: int = option(
        64,
        "tokens that a model writes after each prompt; prompts have as many tokens",
        bounds=Bounds(least=1, most=2**20),
    )
    speed: bool = option(
        True, "measure tokens per second and peak memory, each model in a process of its own"
    )
    speed_batches: list[int] = option(
        [1, 8], "samples at a time in the speed measurement", bounds=Bounds(least=1, most=2**14)
    )
    prompt_tokens: int = option(
        256, "prompt length of the speed measurement", bounds=Bounds(least=1, most=2**20)
    )
    contexts: list[int] = option(
        [], "further prompt lengths of the speed measurement", bounds=Bounds(least=1, most=2**20)
    )
    new_tokens: int = option(
        64, "generated tokens of the speed measurement", bounds=Bounds(least=1, most=2**20)
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
