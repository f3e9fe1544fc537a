"""mlflow: finished stages as metrics, params, tags and files of one run per workspace.

Names in that run: facts are metrics ``stage/path/to/number``, whose step counts how often the stage
was rebuilt; training curves are metrics ``stage/curve/loss`` with the training's steps; the
deciding configuration is params ``stage.key``; tags begin with ``minitron.``. MLflow's params and
points cannot be taken back: where a stage is rebuilt, its curves, and those of its params that
changed, get the prefix ``stage.v2`` (v3, ...).
"""

import contextlib
import datetime
import importlib.util
import json
import logging
import math
import numbers
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.evaluation import report
from nemo_minitron.security.links import leads_out
from nemo_minitron.security.masking import masked
from nemo_minitron.workspace import training_log
from nemo_minitron.workspace.layout import Workspace, metrics_in
from nemo_minitron.workspace.manifest import Manifest, digest, read_manifest
from nemo_minitron.workspace.pictures import pictures_in

IDENTITY = "minitron.identity"
"""Tag by which a workspace finds its run again."""
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "60",
}
"""MLflow's own: seven retries of 120 s each, and whatever wait a server asks for. What the user set stays."""
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""MLflow sends telemetry by default; its DO_NOT_TRACK accepts only the word true."""
_CHATTER = ("mlflow", "alembic", "urllib3.connectionpool")
_NAME, _VALUE, _TAG, _REASON = 250, 6000, 5000, 240
"""Longest name, param and tag, as MLflow takes them; and of an error's text."""
_POINTS, _PARAMS = 1000, 25
"""Entries of a request; it may hold 100 params and a million bytes, which so many long ones stay below."""
_FILES = (report.PAGE, report.FILE, training_log.TABLE)
_LOCK = threading.Lock()


def check() -> None:
    """Checks whether MLflow is installed, without the two seconds that its import takes.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ValueError(
            "track.mlflow: needs the package mlflow: pip install 'nemo-minitron[mlflow]'"
        )


def track(
    uri: str,
    experiment: str,
    run_name: str,
    folder: Path,
    stage: str,
    facts: Mapping[str, Any],
    headline: str,
    identity: str,
) -> str | None:
    """Logs a finished stage into the workspace's run; nothing, where that artifact is in it already.

    MLflow's global state (tracking URI, active run) is neither read nor changed. Weights are never
    sent, and tokens of the hub are masked.

    Args:
        uri: a tracking server or database, as MLflow spells them.
        experiment: made where there is none.
        run_name: name of the run where it has to be made.
        folder: the stage's artifact.
        stage: what the stage is called in the run.
        facts: the numbers behind it, nested as they are.
        headline: one line about it.
        identity: the workspace's own, by which later calls find the run again.

    Returns:
        None; or one line that says why the stage is not in the run, or not all of it. Another call
        resumes.

    Raises:
        ValueError: MLflow is not installed.
    """
    check()
    try:
        with _LOCK, _bounded():
            manifest = read_manifest(folder)
            if manifest is None:
                raise FileNotFoundError(f"{folder}: no complete artifact")
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            place = _experiment(client, uri, experiment)
            run = _run(client, place, run_name, identity, _millis(manifest.started))
            _log(client, run, manifest, folder, stage, facts, headline)
    except (
        Exception
    ) as error:  # a server's bad day, in whatever words of whichever library, is no stage's
        reason = " ".join(masked(str(error).strip() or type(error).__name__).split())
        reason = re.sub(r".*\(Caused by (.*)\)$", r"\1", reason)
        return f"track.mlflow: {stage} is not logged at {masked(uri)}: {_cut(reason, _REASON)}"
    return None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Sets MLflow to few retries, no telemetry and no log lines during the block."""
    wanted = {
        **_LIMITS,
        **{name: os.environ[name] for name in _LIMITS if name in os.environ},
        **_QUIET,
    }
    before = {name: os.environ.get(name) for name in wanted}
    loggers = {logger: logger.level for logger in map(logging.getLogger, _CHATTER)}
    os.environ.update(wanted)
    try:
        import mlflow  # noqa: F401  (sets up its loggers)

        loggers = {logger: logger.level for logger in loggers}
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _experiment(client: Any, uri: str, name: str) -> str:
    """The experiment's id; it is made where there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith(
            "sqlite:///"
        ):  # files lie beside it, not wherever the command was started
            database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
            location = (database.parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:  # else another workspace was faster
                raise
    return str(found.experiment_id)


def _run(client: Any, experiment: str, name: str, identity: str, started: int) -> Any:
    """The workspace's run; it is made where there is none."""
    quote = '"' if "'" in identity else "'"
    wanted = f"tags.`{IDENTITY}` = {quote}{identity}{quote}"
    order = ["attributes.start_time ASC"]
    for run in client.search_runs([experiment], wanted, max_results=1, order_by=order):
        return run
    tags = {IDENTITY: identity}
    return client.create_run(experiment, start_time=started, tags=tags, run_name=masked(name))


def _log(
    client: Any, run: Any, manifest: Manifest, folder: Path, stage: str, facts: Any, headline: str
) -> None:
    """Sends what the run does not have of an artifact yet.

    Two tags keep the books: ``build``, written first, which making of the stage this is; and
    ``logged``, written last. What comes between has the same names, steps and times in every try,
    so that a database takes nothing of it twice.
    """
    from mlflow.entities import Metric, Param, RunTag

    own, run_id, there = f"minitron.{stage}", run.info.run_id, run.data.tags
    stamp, when = digest([manifest.fingerprint, manifest.finished])[:16], _millis(manifest.finished)
    if there.get(f"{own}.logged") == stamp:
        return
    number, _, last = there.get(f"{own}.build", "0").partition(" ")
    build = int(number) + (last != stamp)
    prefix = stage if build == 1 else f"{stage}.v{build}"
    found = {
        (name, build - 1): value for name, value in _named(stage, "/", _leaves(facts, True)).items()
    }
    points, odd = _finite(found | _curves(prefix, folder))
    inputs = [{"path": item.path, "fingerprint": item.fingerprint} for item in manifest.inputs]
    tags = {
        name: getattr(manifest, name) for name in ("kind", "fingerprint", "package", "finished")
    }
    tags |= {"build": f"{build} {stamp}", "inputs": json.dumps(inputs), "headline": headline}
    if odd or f"{own}.not_finite" in there:
        tags["not_finite"] = ", ".join(odd) or "none"
    tags = {f"{own}.{name}": text for name, text in tags.items()} | _source(
        Workspace(folder.parent).teacher
    )
    run_tags = [RunTag(name, _cut(masked(text), _TAG)) for name, text in tags.items()]
    client.log_batch(run_id, tags=run_tags, synchronous=True)
    params = [
        Param(*pair) for pair in _params(run.data.params, stage, prefix, manifest.config).items()
    ]
    for start in range(0, len(params), _PARAMS):
        client.log_batch(run_id, params=params[start : start + _PARAMS], synchronous=True)
    metrics = [Metric(name, value, when, step) for (name, step), value in points.items()]
    for start in range(0, len(metrics), _POINTS):
        client.log_batch(run_id, metrics=metrics[start : start + _POINTS], synchronous=True)
    _send_files(client, run_id, folder, stage)
    client.set_terminated(run_id, "FINISHED", max(when, run.info.end_time or 0))
    client.log_batch(run_id, tags=[RunTag(f"{own}.logged", stamp)], synchronous=True)


def _curves(prefix: str, folder: Path) -> dict[tuple[str, int], Any]:
    """A training's log by name and step; a step that has several lines counts once."""
    found = {}
    for line in training_log.read_log(metrics_in(folder)):
        values = ((("curve", name), value) for name, value in line.items() if name != "step")
        for name, value in _named(prefix, "/", values).items():
            found[name, int(line["step"])] = value
    return found


def _finite(found: Mapping[tuple[str, int], Any]) -> tuple[dict[tuple[str, int], float], list[str]]:
    """Finite numbers, and a note for each other one: MLflow would store inf as 1.8e308."""
    kept, odd = {}, []
    for (name, step), value in found.items():
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            if math.isfinite(value):
                kept[name, step] = float(value)
            else:
                odd.append(f"{name} at {step}: {float(value)}")
    return kept, odd


def _params(
    there: Mapping[str, str], stage: str, prefix: str, config: Mapping[str, Any]
) -> dict[str, str]:
    """Params that the run lacks; what it has under the stage's name with another value gets the prefix."""
    leaves = list(_leaves(config, False))
    lacking = {}
    plain, versioned = _named(stage, ".", leaves), _named(prefix, ".", leaves)
    for (name, value), other in zip(plain.items(), versioned, strict=True):
        is_text = isinstance(value, str) and value != ""
        text = value if is_text else json.dumps(value, ensure_ascii=False, default=str)
        text = _cut(masked(text), _VALUE)
        key = name if there.get(name, text) == text else other
        if there.get(key) != text:
            lacking[key] = text
    return lacking


def _source(teacher: Path) -> dict[str, str]:
    """The model that the workspace compresses, where it is known by now."""
    manifest = read_manifest(teacher)
    if manifest is None:
        return {}
    tags = {
        f"minitron.source.{name}": str(value) for name, value in manifest.config.items() if value
    }
    for item in manifest.inputs:
        tags |= {
            "minitron.source.model": item.path,
            "minitron.source.fingerprint": item.fingerprint,
        }
    return tags


def _send_files(client: Any, run_id: str, folder: Path, stage: str) -> None:
    for name in _FILES:
        if not (folder / name).is_file() or leads_out(folder / name, folder):
            continue
        text = (folder / name).read_bytes().decode("utf-8")
        if masked(text) == text:
            client.log_artifact(run_id, str(folder / name), stage)
        else:
            client.log_text(run_id, masked(text), f"{stage}/{name}")
    for picture in pictures_in(folder):
        client.log_artifact(run_id, str(picture), f"{stage}/plots")


def _leaves(
    value: Any, lists: bool, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of nested containers, each with its path; lists are entered if wanted."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, lists, (*path, str(name)))
    elif lists and isinstance(value, Sequence) and not isinstance(value, str):
        for position, item in enumerate(value):
            yield from _leaves(item, lists, (*path, str(position)))
    else:
        yield path, value


def _named(
    prefix: str, separator: str, leaves: Iterable[tuple[tuple[str, ...], Any]]
) -> dict[str, Any]:
    """Values by names that MLflow takes; equal names get a number."""
    named: dict[str, Any] = {}
    for path, value in leaves:
        parts = [re.sub(r"[^\w.\- ]", "_", masked(part)) for part in path]
        whole = separator.join(
            [prefix, *("_" if part.strip(".") == "" else part for part in parts)]
        )
        if len(whole) > _NAME - 5:
            whole = f"{whole[: _NAME - 22]}-{digest(whole)[:16]}"
        name, number = whole, 2
        while name in named:
            name, number = f"{whole}_{number}", number + 1
        named[name] = value
    return named


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def _millis(moment: str) -> int:
    return int(datetime.datetime.fromisoformat(moment).timestamp() * 1000)
