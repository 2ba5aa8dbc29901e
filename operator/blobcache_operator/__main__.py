"""The command line: `blobcache-operator`, or `python -m blobcache_operator`."""

import asyncio
import sys
from typing import Any

import click
from pydantic import ValidationError

from blobcache_operator.cleanup import Cleanup, Leftover
from blobcache_operator.errors import KubeError, SettingsError
from blobcache_operator.kube import Kube
from blobcache_operator.kubeauth import NAMESPACE_DEFAULT, KubeAccess, find_access
from blobcache_operator.logs import configure_logging
from blobcache_operator.program import Program, environment, run_until_signalled
from blobcache_operator.settings import ENV_PREFIX, OperatorSettings

EPILOG = """
Every flag can be given as BLOBCACHE_OPERATOR_<FLAG>, too; flags win.

\b
In a cluster (what the chart does):
  blobcache-operator
\b
Outside, with an agent on this machine:
  kubectl apply -f crds/ && kubectl create namespace blobcache-system
  blobcache-operator --namespace blobcache-system --kubeconfig ~/.kube/config \\
      --write-agent-certs /tmp/agent-tls --agent node-1=https://127.0.0.1:7443
  blobcache-agent serve --node-name node-1 --tls-dir /tmp/agent-tls ...
\b
Several replicas may run; the Lease says which one acts, the others stand by.
"""

NODES_MISSED = 3

_MANY = {"agent"}
_METAVARS = {"agent": "NODE=URL", "write_agent_certs": "DIR", "health_listen": "HOST:PORT"}


def _options(command: click.Command) -> click.Command:
    """Add a flag for each setting, with the setting's own text."""
    for name, field in OperatorSettings.model_fields.items():
        default = "" if field.default_factory or field.default is None else str(field.default)
        text = " ".join((field.description or "").split())
        command.params.append(
            click.Option(
                [f"--{name.replace('_', '-')}"],
                multiple=name in _MANY,
                metavar=_METAVARS.get(name, "VALUE"),
                help=f"{text} [{default}]" if default else text,
            )
        )
    return command


@click.group(
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="blobcache")
@click.pass_context
def command(context: click.Context, /, **flags: Any) -> None:
    """
    Keep every node's agent at what the BlobCacheConfigs say, and say in their status what is so.

    Reads configs, Nodes and the Secrets that configs name; pushes each node's desired state to its
    agent over mutual TLS; writes the status of configs and BlobCacheNodes; decides evictions.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    try:
        settings = OperatorSettings(**given)
        access = find_access(environment(), settings.kubeconfig)
    except ValidationError as error:
        raise click.UsageError(_explain(error)) from None
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    configure_logging(settings.log_level)
    if context.invoked_subcommand is None:
        asyncio.run(run_until_signalled(Program(settings, access, environment())))
    else:
        context.obj = (settings, access)


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        flag = f"--{name.replace('_', '-')}"
        message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{flag} (or {ENV_PREFIX}{name.upper()}): {message}")
    return "; ".join(faults)


@command.command(name="cleanup")
@click.option("--daemonset", metavar="NAME", help="DaemonSet whose pods put the nodes back.")
@click.option(
    "--timeout-seconds",
    default=200.0,
    show_default=True,
    type=click.FloatRange(min=1, max=3600),
    help="How long to wait for all of them.",
)
@click.pass_obj
def clean_up(
    chosen: tuple[OperatorSettings, KubeAccess], daemonset: str | None, timeout_seconds: float
) -> None:
    """
    Remove what the operator made, after uninstalling; wait until each node says it is done.

    Exit codes: 0 all is done, 1 the API server refuses, 3 the nodes named were not reached.
    """
    settings, access = chosen
    namespace = settings.namespace or access.namespace or NAMESPACE_DEFAULT

    async def run() -> tuple[Leftover, ...]:
        async with Kube(access) as kube:
            cleanup = Cleanup(
                kube, namespace=namespace, lease_name=settings.lease_name, tell=click.echo
            )
            return await cleanup.run(daemonset=daemonset, timeout_seconds=timeout_seconds)

    try:
        leftovers = asyncio.run(run())
    except KubeError as error:
        raise click.ClickException(str(error)) from None
    for leftover in leftovers:
        where = f"node '{leftover.node}'" if leftover.node else "nodes"
        click.echo(f"not cleaned up, {where}: {leftover.why}", err=True)
    if leftovers:
        sys.exit(NODES_MISSED)


main = _options(command)

if __name__ == "__main__":
    sys.exit(main())
