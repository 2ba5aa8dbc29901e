"""The command line: `blobcache-operator`, or `python -m blobcache_operator`."""

import asyncio
import sys
from typing import Any

import click
from pydantic import ValidationError

from blobcache_operator.errors import SettingsError
from blobcache_operator.kubeauth import find_access
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


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blobcache")
def command(**flags: Any) -> None:
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
    asyncio.run(run_until_signalled(Program(settings, access, environment())))


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        flag = f"--{name.replace('_', '-')}"
        message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{flag} (or {ENV_PREFIX}{name.upper()}): {message}")
    return "; ".join(faults)


main = _options(command)

if __name__ == "__main__":
    sys.exit(main())
