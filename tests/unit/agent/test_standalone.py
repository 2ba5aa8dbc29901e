"""Configuration files: everything wrong is told at once, with file, object and field."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from blobcache_agent.errors import UsageError
from blobcache_agent.settings import Permissions
from blobcache_agent.standalone import load, uid_of
from blobcache_storage.credentials import AccessKey, Anonymous, BasicAuth

PERMISSIONS = Permissions(localfs_roots={"*": ("/srv",)}, insecure_tls_namespaces=frozenset({"*"}))
CANARY = "canary-71ab"

LOCAL = """\
apiVersion: blobcache.dev/v1alpha1
kind: BlobCacheConfig
metadata: {name: models}
spec:
  backend:
    type: LocalFS
    localFS: {directory: /srv/models}
"""
S3 = """\
apiVersion: blobcache.dev/v1alpha1
kind: BlobCacheConfig
metadata: {name: weights, namespace: ml}
spec:
  backend:
    type: S3
    s3: {endpoint: "https://s3.example", bucket: weights}
    credentialsSecretRef: {name: key}
"""
SECRET = f"""\
apiVersion: v1
kind: Secret
metadata: {{name: key, namespace: ml}}
stringData: {{accessKeyID: AKIA, secretAccessKey: {CANARY}}}
"""


def write(folder: Path, *documents: str, name: str = "blobs.yaml") -> Path:
    """Write documents into one file."""
    path = folder / name
    path.write_text("---\n".join(documents))
    return path


def problems_of(*files: Path, permissions: Permissions = PERMISSIONS) -> list[str]:
    """Return what loading complains about; never a secret."""
    with pytest.raises(UsageError) as caught:
        load(files, permissions)
    assert CANARY not in str(caught.value)
    return list(caught.value.problems)


def test_configs_and_secrets_of_several_files(tmp_path: Path) -> None:
    """Documents and files join; the namespace is `default` where none is given."""
    first = write(tmp_path, LOCAL, S3)
    second = write(tmp_path, SECRET, name="secret.yaml")
    models, weights = load([first, second], PERMISSIONS)
    assert models.resource.id == "default/models"
    assert models.resource.uid == uid_of("default", "models")
    assert models.credentials == Anonymous()
    assert weights.resource.id == "ml/weights"
    assert weights.credentials == AccessKey("AKIA", SecretStr(CANARY))


def test_uids_are_stable_and_distinct() -> None:
    """A restart finds the bytes of the same name, and of no other."""
    assert uid_of("a", "b") == uid_of("a", "b")
    assert uid_of("a", "b") != uid_of("b", "a")


def test_base64_data_and_plain_text_data(tmp_path: Path) -> None:
    """`data` is decoded; `stringData` wins where both are given."""
    secret = """\
apiVersion: v1
kind: Secret
metadata: {name: login}
data: {username: dXNlcg==, password: d3Jvbmc=}
stringData: {password: right}
"""
    proxy = LOCAL.replace("type: LocalFS", "type: HTTPProxy").replace(
        "localFS: {directory: /srv/models}",
        "httpProxy: {address: 'http://127.0.0.1:1'}\n    credentialsSecretRef: {name: login}",
    )
    (config,) = load([write(tmp_path, proxy, secret)], PERMISSIONS)
    assert config.credentials == BasicAuth("user", SecretStr("right"))


def test_a_list_is_its_items(tmp_path: Path) -> None:
    """What `kubectl get -o yaml` prints can be used as it is."""
    body = "".join(f"  {line}\n" for line in LOCAL.splitlines())
    listed = "apiVersion: v1\nkind: List\nitems:\n- " + body.lstrip()
    assert len(load([write(tmp_path, listed)], PERMISSIONS)) == 1


def test_a_typo_is_named_with_file_object_and_field(tmp_path: Path) -> None:
    """The line says where to look and what to do."""
    path = write(tmp_path, LOCAL.replace("directory", "direktory"))
    where = f"{path}: BlobCacheConfig default/models"
    assert problems_of(path) == [
        f"{where}: `spec.backend.localFS.directory` must be given",
        f"{where}: `spec.backend.localFS.direktory` is not a field; check its spelling and place",
    ]


def test_all_errors_of_all_files_at_once(tmp_path: Path) -> None:
    """One run is enough to see everything that must be mended."""
    first = write(tmp_path, LOCAL.replace("/srv/models", "/etc"), S3, "kind: Pod\n")
    second = write(tmp_path, LOCAL.replace("LocalFS", "Ftp"), "- a\n- b\n", name="b.yaml")
    third = tmp_path / "absent.yaml"
    problems = "\n".join(problems_of(first, second, third))
    for part in (
        "`spec.backend.localFS.directory` '/etc' must lie below",
        "--allow-localfs",
        "there is no 'key'",
        "`apiVersion` and `kind` must be",
        "`spec.backend.type`",
        "must be a mapping",
        f"{third}: must be readable",
    ):
        assert part in problems


@pytest.mark.parametrize(
    ("secret", "part"),
    [
        (SECRET.replace("stringData", "data"), "must be base64"),
        (SECRET.replace(f"secretAccessKey: {CANARY}", "secretAccessKey: 12"), "put it in quotes"),
        (SECRET.replace("secretAccessKey", "secretKey"), "must also have the key"),
        (SECRET.replace("stringData", "stringdata"), "`stringdata` is not a field"),
        (SECRET.replace("accessKeyID: AKIA, ", "token: x, "), "exactly one set"),
        (
            SECRET.replace("metadata", "type: kubernetes.io/service-account-token\nmetadata"),
            "service account",
        ),
    ],
)
def test_wrong_secrets(tmp_path: Path, secret: str, part: str) -> None:
    """The message names the Secret and the key, never the value."""
    path = write(tmp_path, S3, secret)
    problems = problems_of(path)
    assert any(part in problem and "ml/key" in problem for problem in problems), problems
    assert "kubectl" not in "".join(problems)


@pytest.mark.parametrize(
    "text",
    [
        f"metadata: {{name: key\nstringData: {{a: {CANARY}}}\n",
        f"a: 'b\nc: {CANARY}\n",
        f"password: *{CANARY}\n",
        f"a: {CANARY}\na: {CANARY}\n",
        f"- {CANARY}: [\n",
        f"a: !!python/object:{CANARY} {{}}\n",
        "a: \x00\n",
        "[" * 5000,
    ],
)
def test_broken_yaml_is_placed_but_not_quoted(tmp_path: Path, text: str) -> None:
    """The parser's own message may hold a secret; ours holds a position."""
    path = write(tmp_path, text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:")
    assert "YAML" in problem


def test_names_given_twice(tmp_path: Path) -> None:
    """Neither object silently wins."""
    path = write(tmp_path, LOCAL, LOCAL)
    (problem,) = problems_of(path)
    assert "must be given once" in problem


@pytest.mark.parametrize("name", ["Models", "a/b", "..", "-a", "''", "a" * 64])
def test_names_that_no_path_could_hold(tmp_path: Path, name: str) -> None:
    """A name is a Kubernetes name, also without Kubernetes."""
    problems = problems_of(write(tmp_path, LOCAL.replace("name: models", f"name: {name}")))
    assert any("`metadata.name`" in problem for problem in problems)


def test_files_without_a_config(tmp_path: Path) -> None:
    """Nothing to serve is an error, not an idle process."""
    assert "at least one" in problems_of(write(tmp_path, "---\n"))[0]


@pytest.mark.parametrize("example", ["http.yaml", "s3.yaml"])
def test_examples_load(example: str) -> None:
    """What the repository shows can be used."""
    folder = Path(__file__).parents[3] / "examples" / "standalone"
    assert load([folder / example], PERMISSIONS)


def test_local_example_loads() -> None:
    """As the README starts it."""
    folder = Path(__file__).parents[3] / "examples" / "standalone"
    permissions = Permissions(localfs_roots={"*": ("/usr/share",)})
    (config,) = load([folder / "local.yaml"], permissions)
    assert config.resource.id == "default/licenses"
