"""Deployments and schedules of the flows."""

import argparse
import json
from typing import Any


def deploy(args: argparse.Namespace) -> int:
    """Registers a deployment."""
    made = _deployment(args)
    from nemo_minitron.flows.deploy import deploy as register

    full = register(made, args.pool, args.kind)
    print(f"{full} is deployed; to run it: prefect worker start --pool {args.pool}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Runs a flow on a schedule in this process."""
    made = _deployment(args)
    from nemo_minitron.flows.deploy import serve as run

    run(made)
    return 0


def _deployment(args: argparse.Namespace) -> Any:
    from nemo_minitron.flows.local import prepare_environment

    prepare_environment()
    from nemo_minitron.flows.deploy import deployment
    from nemo_minitron.security.masking import masked

    parameters = {}
    for text in args.parameter:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--parameter: expected NAME=VALUE, found {masked(text)!r}")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return deployment(
        args.name, args.flow, args.config_name, args.overrides, parameters, args.cron, args.timezone
    )
