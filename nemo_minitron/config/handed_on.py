"""The keys that Lightning's Trainer and NeMo's exp_manager know.

They stand here because the two take 10 to 20 seconds to import, and a typing mistake has to show
before a run of hours begins. ``tests/config/test_overrides.py`` holds them against the packages.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Known = Mapping[str, "Known | None"]
"""Names of keys; to the names below, or None where anything may stand there."""


def _names(text: str) -> dict[str, Known | None]:
    return dict.fromkeys(text.split())


TRAINER: Known = _names(
    "accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs "
    "max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches "
    "limit_predict_batches overfit_batches val_check_interval check_val_every_n_epoch "
    "num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar "
    "enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm "
    "deterministic benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones "
    "plugins sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir"
)
"""Arguments of Lightning's Trainer."""

PRECISIONS = (
    "64-true", "64", "32-true", "32", "16-true", "16-mixed", "16", "bf16-true", "bf16-mixed", "bf16",
    "transformer-engine", "transformer-engine-float16",
)  # fmt: skip
"""What Lightning's Trainer takes for ``precision``."""

EXP_MANAGER: Known = {
    **_names(
        "explicit_log_dir exp_dir name version use_datetime_version resume_if_exists resume_past_end "
        "resume_ignore_no_checkpoint resume_from_checkpoint create_tensorboard_logger "
        "summary_writer_kwargs create_wandb_logger wandb_logger_kwargs create_mlflow_logger "
        "create_dllogger_logger create_clearml_logger create_neptune_logger neptune_logger_kwargs "
        "create_checkpoint_callback create_early_stopping_callback create_ipl_epoch_stopper_callback "
        "create_preemption_callback files_to_copy log_step_timing log_delta_step_timing "
        "disable_validation_on_resume max_time_per_run seconds_to_sleep "
        "create_straggler_detection_callback create_fault_tolerance_callback log_tflops_per_sec_per_gpu"
    ),
    "mlflow_logger_kwargs": _names(
        "experiment_name run_name tracking_uri tags save_dir prefix artifact_location run_id log_model"
    ),
    "dllogger_logger_kwargs": _names("verbose stdout json_file"),
    "clearml_logger_kwargs": _names(
        "project task connect_pytorch model_name tags log_model log_cfg log_metrics"
    ),
    "checkpoint_callback_params": _names(
        "filepath dirpath filename monitor verbose save_last save_top_k save_weights_only mode "
        "auto_insert_metric_name every_n_epochs every_n_train_steps train_time_interval prefix postfix "
        "save_best_model always_save_nemo save_nemo_on_train_end model_parallel_size "
        "save_on_train_epoch_end async_save save_last_n_optim_states"
    ),
    "early_stopping_callback_params": _names(
        "monitor mode min_delta patience verbose strict check_finite stopping_threshold "
        "divergence_threshold check_on_train_epoch_end log_rank_zero_only"
    ),
    "ipl_epoch_stopper_callback_params": _names("enable_stop stop_every_n_epochs"),
    "step_timing_kwargs": _names("reduction sync_cuda buffer_size"),
    "ema": _names("enable decay cpu_offload validate_original_weights every_n_steps"),
    "straggler_detection_params": _names(
        "report_time_interval calc_relative_gpu_perf calc_individual_gpu_perf "
        "num_gpu_perf_scores_to_log gpu_relative_perf_threshold gpu_individual_perf_threshold "
        "stop_if_detected"
    ),
    "fault_tolerance": _names(
        "workload_check_interval initial_rank_heartbeat_timeout rank_heartbeat_timeout "
        "calculate_timeouts safety_factor rank_termination_signal log_level max_rank_restarts "
        "max_subsequent_job_failures additional_ft_launcher_args simulated_fault"
    ),
}
"""Keys of NeMo's exp_manager."""


def refuse_unknown(section: str, values: Mapping[str, Any], known: Known, whose: str) -> None:
    """Refuses a key that those whom a section is handed to do not know.

    Args:
        section: what the message calls it.
        values: what was given.
        known: the keys that there are.
        whose: who knows them, and what they are called there, such as "exp_manager has no such key".

    Raises:
        ValueError: there is one; the message names the nearest known ones.
    """
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3)
            names = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"
            raise ValueError(f"{section}.{name}: {whose}; {names}")
        below = known[name]
        if below is not None and isinstance(value, Mapping):
            refuse_unknown(f"{section}.{name}", value, below, whose)


TAUGHT = ("divergence", "intermediate", "alpha")
"""Terms of a loss that a training has beside its cross-entropy, where it is taught."""


def logged(terms: Sequence[str] = (), validates: bool = True) -> list[str]:
    """Names of the metrics that a training logs.

    Args:
        terms: those of ``TAUGHT`` that its loss has.
        validates: whether there is a validation at all.
    """
    names = [f"train_{term}" for term in ("loss", "ce", *terms)]
    measured = ["val_loss", *(["val_divergence"] if "divergence" in terms else [])]
    return [*(measured if validates else []), *names, "learning_rate", "global_step"]


def check_monitors(
    settings: Mapping[str, Any], logged: Sequence[str], tasks: Iterable[str] = ()
) -> None:
    """Refuses to watch a metric that nobody logs: it would show at the first validation only.

    Args:
        settings: exp_manager's keys.
        logged: names of the metrics that are logged.
        tasks: names of tasks' measures, which early stopping may go by too.

    Raises:
        ValueError: early stopping, or the choice of checkpoints, goes by another one.
    """
    stopping = settings.get("early_stopping_callback_params") or {}
    if settings.get("create_early_stopping_callback"):
        _check_monitor(
            "early_stopping_callback_params",
            stopping.get("monitor", "val_loss"),
            [*logged, *tasks],
        )
    saved = settings.get("checkpoint_callback_params") or {}
    if settings.get("create_checkpoint_callback") is not False and saved.get("monitor") is not None:
        _check_monitor("checkpoint_callback_params", saved["monitor"], [*logged, "step", "epoch"])


def _check_monitor(where: str, monitor: Any, logged: Sequence[str]) -> None:
    if monitor not in logged:
        raise ValueError(
            f"exp_manager.{where}.monitor: this training logs no {monitor!r}; it logs {', '.join(logged)}"
        )
