"""The scenes of the demo, in the order they are played."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tests.demo.narration import DemoFailedError, Narrator
from tests.demo.stage import MIB, NODES, SHARD_BYTES, SHARDS, Stage
from tests.harness.installation import AgentProcess, Answer
from tests.harness.process import poll_until

EXAMPLES = ("s3.yaml", "registry.yaml", "localfs.yaml")
CONFIGS = ("models", "layers", "datasets")
PREFETCHED = SHARDS[4]
ROTATION_TIMEOUT_SECONDS = 75.0
_WAIT_SECONDS = 60.0


class Play:
    """All scenes over one stage."""

    def __init__(self, stage: Stage, narrator: Narrator) -> None:
        self._stage = stage
        self._narrator = narrator
        self._agents = list(stage.installation.agents.values())
        self._token = ""

    def run(self) -> None:
        """Play everything from an empty machine to `kubectl describe`."""
        self._set_up()
        self._apply_examples()
        self._read_cold()
        self._refuse_other_tenants()
        self._read_hot()
        self._rotate()
        self._prefetch()
        self._evict()
        self._delete()
        self._read_with_new_key()
        self._show_status()

    def _set_up(self) -> None:
        stage, narrator = self._stage, self._narrator
        with narrator.step("A Kubernetes API server: etcd and kube-apiserver"):
            stage.start_control_plane()
            narrator.show(f"{stage.control_plane.url}")
        with narrator.step("Origins: an S3 server, an OCI registry, a shared directory"):
            stage.start_origins()
            total = stage.fill_origins()
            narrator.show(f"{total / MIB:.0f} MiB in {len(stage.digests)} blobs")
        with narrator.step("The CRDs, the operator and three agents, each standing for a node"):
            narrator.command("kubectl apply --server-side -f crds/")
            stage.start_installation()
            narrator.show("agents: " + ", ".join(f"{a.node} :{a.data_port}" for a in self._agents))

    def _apply_examples(self) -> None:
        with self._narrator.step("Three configurations: S3 with a Secret, registry, local files"):
            for namespace in ("demo", "other"):
                self._kubectl("create", "namespace", namespace, is_shown=False)
            self._wait_for("service accounts", self._has_service_accounts)
            for name in EXAMPLES:
                self._narrator.command(f"kubectl apply -f examples/{name}")
                self._kubectl("apply", "-f", "-", stdin=self._stage.example(name), is_shown=False)
            for config in CONFIGS:
                self._kubectl("wait", "--for=condition=Ready", f"bcc/{config}", "-n", "demo",
                              "--timeout=60s")  # fmt: skip
            self._token = self._stage.token("demo")

    def _read_cold(self) -> None:
        with self._narrator.step("First reads, through every agent, compared with the origin"):
            paths = self._paths(leave_out=PREFETCHED)
            statuses = self._read_everywhere(paths)
            reads = len(paths) * len(self._agents)
            self._narrator.check(
                all("stored" in status for status in statuses),
                f"{reads} reads, every sha256 equals the origin's, every byte cached",
                sorted(set(statuses)),
            )

    def _refuse_other_tenants(self) -> None:
        with self._narrator.step("Who may read: a token of another namespace, and none at all"):
            agent, path = self._agents[0], f"demo/models/{SHARDS[0]}"
            other = agent.read(path, token=self._stage.token("other"))
            self._narrator.show(f"{other.status} {other.body.decode()}")
            self._narrator.check(other.status == 403, "another namespace's token: 403")
            nobody = agent.read(path)
            self._narrator.show(f"{nobody.status} {nobody.body.decode()}")
            self._narrator.check(nobody.status == 401, "no token: 401")

    def _read_hot(self) -> None:
        with self._narrator.step("The same reads again: hits, and the origins are not asked"):
            before = self._stage.origin_bytes()
            statuses = self._read_everywhere(self._paths(leave_out=PREFETCHED))
            asked = self._stage.origin_bytes() - before
            self._narrator.check(set(statuses) == {"hit"}, "every answer a hit", set(statuses))
            self._narrator.check(asked == 0, "0 bytes from the origins", asked)

    def _rotate(self) -> None:
        with self._narrator.step("A new key in the Secret; the old one is revoked at the origin"):
            patch = self._stage.rotate_key()
            self._narrator.command("kubectl patch secret models-s3 -n demo -p '{\"data\": …}'")
            self._kubectl("patch", "secret", "models-s3", "-n", "demo", "-p", patch,
                          is_shown=False)  # fmt: skip
            statuses = self._read_everywhere([f"demo/models/{SHARDS[0]}"])
            self._narrator.check(set(statuses) == {"hit"}, "what is cached stays served", statuses)

    def _prefetch(self) -> None:
        with self._narrator.step("Warm a layer on all nodes, and wait for it"):
            path = next(p for p in self._stage.digests if p.startswith("demo/layers/"))
            digest = path.rpartition("/")[2]
            self._forget(path)
            blobs = {"spec": {"prefetch": {"blobs": [{"id": digest, "digest": digest}]}}}
            self._patch("layers", blobs)
            self._kubectl("wait", "--for=condition=Warm", "bcc/layers", "-n", "demo",
                          "--timeout=60s")  # fmt: skip
            before = self._stage.origin_bytes()
            statuses = self._read_everywhere([path])
            self._narrator.check(
                set(statuses) == {"hit"} and self._stage.origin_bytes() == before,
                "warm on every node: hits without the origin",
                statuses,
            )

    def _forget(self, path: str) -> None:
        """Delete and apply the registry's config again, so that there is something to warm."""
        self._kubectl("delete", "bcc", "layers", "-n", "demo")
        self._wait_for_status(path, 404)
        self._kubectl("apply", "-f", "-", stdin=self._stage.example("registry.yaml"))
        self._kubectl("wait", "--for=condition=Ready", "bcc/layers", "-n", "demo",
                      "--timeout=60s")  # fmt: skip

    def _read_with_new_key(self) -> None:
        with self._narrator.step("A shard nobody has read yet, with the new key"):
            path, began = f"demo/models/{PREFETCHED}", time.monotonic()
            answers: dict[str, Answer] = {}

            def all_read() -> bool:
                for agent in self._agents:
                    if agent.node not in answers or answers[agent.node].status != 200:
                        answers[agent.node] = agent.read(path, token=self._token)
                return all(answer.status == 200 for answer in answers.values())

            is_read = poll_until(all_read, timeout=ROTATION_TIMEOUT_SECONDS)
            waited = time.monotonic() - began
            self._narrator.check(
                is_read,
                f"every agent has the new key (after {waited:.0f} s here; within a minute)",
                {node: answer.status for node, answer in answers.items()},
            )
            for answer in answers.values():
                self._compare(path, answer)

    def _evict(self) -> None:
        title = "Less capacity: the operator publishes a plan, agents evict"
        with self._narrator.step(title):
            total = (len(SHARDS) - 1) * SHARD_BYTES
            capacity = f"{total * 100 // 96 // MIB}Mi"
            self._patch("models", {"spec": {"cache": {"capacity": capacity}}})
            self._wait_for(
                "eviction on every agent",
                lambda: all(self._cached_bytes(agent, "models") < total for agent in self._agents),
            )
            self._wait_for("an eviction in the status", self._has_evicted)
            self._narrator.show(json.dumps(self._status("models")["eviction"], indent=2))
            for agent in self._agents:
                cached = self._cached_bytes(agent, "models")
                self._narrator.check(cached < total, f"{agent.node}: {cached // MIB} MiB of "
                                     f"{total // MIB} MiB still cached")  # fmt: skip

    def _delete(self) -> None:
        with self._narrator.step("Delete a configuration: agents answer 404 and drop its bytes"):
            path = "demo/datasets/train.parquet"
            self._kubectl("delete", "bcc", "datasets", "-n", "demo")
            self._wait_for_status(path, 404)
            self._wait_for(
                "freed disks",
                lambda: not any(self._cached_bytes(agent, "datasets") for agent in self._agents),
            )
            self._narrator.check(True, "404 on every agent, 0 bytes of it left")

    def _show_status(self) -> None:
        with self._narrator.step("What the API says"):
            self._kubectl("get", "bcc", "-A")
            self._kubectl("get", "bcn")
            self._kubectl("describe", "bcc", "models", "-n", "demo")

    def _paths(self, *, leave_out: str) -> list[str]:
        return [path for path in self._stage.digests if not path.endswith(leave_out)]

    def _read_everywhere(self, paths: Iterable[str]) -> list[str]:
        """Read each path through each agent, compare digests, return the cache statuses."""
        with ThreadPoolExecutor(max_workers=len(NODES)) as pool:
            reads = [pool.submit(self._read, agent, p) for p in paths for agent in self._agents]
            return [read.result() for read in reads]

    def _read(self, agent: AgentProcess, path: str) -> str:
        answer = agent.read(path, token=self._token)
        self._compare(path, answer)
        return answer.cache_status

    def _compare(self, path: str, answer: Answer) -> None:
        if answer.status != 200:
            raise DemoFailedError(f"{path}: {answer.status} {answer.body[:500].decode()}")
        if hashlib.sha256(answer.body).hexdigest() != self._stage.digests[path]:
            raise DemoFailedError(f"{path}: the sha256 is not the origin's")

    def _status(self, config: str) -> dict[str, object]:
        body = self._stage.installation.get("bcc", config, "demo")
        status: dict[str, object] = body.get("status", {})
        return status

    def _has_evicted(self) -> bool:
        eviction = self._status("models").get("eviction")
        return isinstance(eviction, dict) and eviction.get("evictedBlobs", 0) >= len(NODES)

    def _has_service_accounts(self) -> bool:
        for namespace in ("demo", "other"):
            made = self._stage.control_plane.kubectl(
                "create", "serviceaccount", "default", "-n", namespace, check=False
            )
            if made.returncode and "already exists" not in made.stderr:
                return False
        return True

    def _cached_bytes(self, agent: AgentProcess, config: str) -> int:
        name = f'blobcache_agent_config_cached_bytes{{name="{config}",namespace="demo"}}'
        return int(agent.metrics().get(name, 0))

    def _wait_for_status(self, path: str, status: int) -> None:
        self._wait_for(
            f"a {status} on every agent",
            lambda: all(
                agent.read(path, token=self._token, headers={"Range": "bytes=0-0"}).status == status
                for agent in self._agents
            ),
        )

    def _wait_for(self, what: str, is_done: Callable[[], bool]) -> None:
        if not poll_until(is_done, timeout=_WAIT_SECONDS):
            raise DemoFailedError(f"no {what} within {_WAIT_SECONDS:.0f} s")

    def _patch(self, config: str, patch: Mapping[str, object]) -> None:
        body = json.dumps(patch)
        self._narrator.command(f"kubectl patch bcc {config} -n demo --type=merge -p '{body}'")
        self._kubectl("patch", "bcc", config, "-n", "demo", "--type=merge", "-p", body,
                      is_shown=False)  # fmt: skip

    def _kubectl(self, *arguments: str, stdin: str | None = None, is_shown: bool = True) -> None:
        """Run kubectl; show the command and its output."""
        if is_shown:
            self._narrator.command("kubectl " + " ".join(arguments))
        done = self._stage.control_plane.kubectl(*arguments, input=stdin, timeout=90)
        if is_shown:
            self._narrator.show(done.stdout)
