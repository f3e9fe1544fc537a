"""Stages run as the flows run them, and questions to the server."""

import asyncio

from nemo_minitron.config.compose import as_dict, load_config
from tests.support.processes import until


def read(what):
    """Asks the server."""
    from prefect.client.orchestration import get_client

    async def ask():
        async with get_client() as client:
            return await what(client)

    return asyncio.run(ask())


def artifacts_of(workspace):
    """The artifacts of a workspace of that name, by key; the newest of them first."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    mine = ArtifactFilter(key=ArtifactFilterKey(like_=f"minitron-{workspace}-%"))
    found = {}
    for artifact in read(lambda client: client.read_artifacts(artifact_filter=mine)):
        found.setdefault(artifact.key, []).append(artifact)
    return found


def in_a_flow(name, *words, workspace):
    """Runs one stage as the flows do; returns what it reports, and the states its task went through."""
    from prefect import flow

    from nemo_minitron.flows.tasks import run_stage_task

    config = load_config("config", [f"workspace={workspace}", "launch.retry_seconds=0", *words])
    ids = []

    @flow
    def one():
        from prefect.runtime import flow_run

        ids.append(flow_run.id)
        return run_stage_task(name, config, as_dict(config))

    failure = result = None
    try:
        result = one()
    except Exception as error:
        failure = error

    async def states(client):
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        (run,) = await client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[ids[0]]))
        )
        return run, [state.name for state in await client.read_task_run_states(run.id)]

    def ended():
        run, names = read(states)
        return run.state.is_final() and (run, names)

    return result, failure, *until(ended, 30, 0.1)  # the last state arrives a moment later
