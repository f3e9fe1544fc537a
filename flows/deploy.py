"""Deployments without a file: 'minitron deploy' for a server's workers, 'minitron serve' for this one."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import EntrypointType
from prefect.settings import PREFECT_API_URL
from pydantic import ValidationError

from nemo_minitron.config.compose import load_config
from nemo_minitron.flows.cascade import cascade
from nemo_minitron.flows.compress import compress
from nemo_minitron.flows.evaluate_checkpoint import evaluate_checkpoint
from nemo_minitron.flows.search import search
from nemo_minitron.flows.sweep import sweep
from nemo_minitron.security.masking import masked_values

FLOWS: dict[str, Flow[Any, Any]] = {
    "compress": compress, "search": search, "sweep": sweep, "evaluate_checkpoint": evaluate_checkpoint,
    "cascade": cascade,
}  # fmt: skip
TAGS = ["nemo_minitron"]


def deployment(
    name: str,
    flow: str,
    config_name: str,
    overrides: Sequence[str],
    parameters: dict[str, Any],
    cron: str | None,
    timezone: str | None,
) -> Any:
    """A deployment of a flow with its parameters and its schedule, not registered yet.

    Raises:
        ValueError: an unknown flow, a configuration that cannot be composed, a schedule that is
            none, a credential.
    """
    from prefect.client.schemas.schedules import CronSchedule

    if flow not in FLOWS:
        raise ValueError(f"--flow: no flow {flow!r}; there are: {', '.join(FLOWS)}")
    _refuse_credentials({"overrides": list(overrides), **parameters})
    with _named_variables(overrides):
        load_config(config_name, list(overrides))
    schedules: list[Any] = []
    if cron is not None:
        try:
            schedules = [CronSchedule(cron=cron, timezone=timezone)]
        except ValidationError as error:
            text = error.errors()[0]["msg"]
            raise ValueError(
                f"--cron: no schedule {cron!r} in {timezone or 'UTC'}: {text}"
            ) from error
    given = {"config_name": config_name, "overrides": list(overrides), **parameters}
    unknown = sorted(set(given) - set(FLOWS[flow].parameters.properties))
    if unknown:
        known = ", ".join(FLOWS[flow].parameters.properties)
        raise ValueError(f"--parameter: {flow} has no parameter {unknown[0]!r}; it has: {known}")
    return FLOWS[flow].to_deployment(
        name, schedules=schedules, parameters=given, tags=TAGS, description=FLOWS[flow].description,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )  # fmt: skip


def _refuse_credentials(given: Mapping[str, Any]) -> None:
    """Refuses credentials, which a server would store readable for all its users.

    Raises:
        ValueError: a parameter, or an override, holds a credential; the message names it.
    """
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            shown = masked_values(each, name)
            if shown != each:
                where = f"--parameter {name}={shown}" if name != "overrides" else shown
                raise ValueError(
                    f"{where}: holds a credential, and the server keeps a deployment's parameters for all to "
                    "read; write ${oc.env:NAME} in its place, which is read from the worker's environment"
                )


@contextlib.contextmanager
def _named_variables(overrides: Sequence[str]) -> Iterator[None]:
    """Sets variables that overrides refer to and that only the worker has, during the block."""
    names = set(re.findall(r"\$\{oc\.env:(\w+)", " ".join(overrides))) - set(os.environ)
    os.environ.update(dict.fromkeys(names, "set-on-the-worker"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def need_server() -> None:
    """Checks that a Prefect server is set; the embedded one would not do.

    Raises:
        ValueError: none is set; the embedded one fires no schedule.
    """
    if not PREFECT_API_URL.value():
        raise ValueError(
            "no Prefect server: start one (prefect server start) and set PREFECT_API_URL, as in "
            "http://127.0.0.1:4200/api"
        )


def deploy(made: Any, pool: str, kind: str = "process") -> str:
    """Registers a deployment with the server; its work pool is made where there is none.

    Returns:
        Its full name, FLOW/NAME.

    Raises:
        ValueError: no server is set: an embedded one runs nothing that is scheduled.
    """
    need_server()
    with get_client(sync_client=True) as client:
        try:
            kind = client.read_work_pool(pool).type
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=pool, type=kind))
    if (
        kind == "process"
    ):  # else a worker would run it in a temporary folder, and remove that with all it made
        made.job_variables = {"working_dir": str(Path.cwd()), **(made.job_variables or {})}
    made.apply(work_pool_name=pool)
    return f"{made.flow_name}/{made.name}"


def serve(made: Any) -> None:
    """Runs what is scheduled and what is asked for, in processes that this one starts, until it is ended.

    Raises:
        ValueError: no server is set: an embedded one fires no schedule.
    """
    need_server()
    from prefect import serve as serve_here

    print(f"serving {made.flow_name}/{made.name}; Ctrl-C ends it", file=sys.stderr, flush=True)
    serve_here(made, print_starting_message=False)
