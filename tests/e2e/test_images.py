"""What is in the images, and what is not."""

import pytest

from tests.e2e import images

pytestmark = pytest.mark.timeout(1200)


def _packages(image: images.Image) -> set[str]:
    """Return the names of the top folders in the image's site-packages."""
    files = [file for file in images.list_files(image) if "/site-packages/" in file]
    assert files, image
    return {file.split("/site-packages/", 1)[1].split("/")[0] for file in files}


def test_agent_image_has_no_kubernetes_client(built: images.Images) -> None:
    """Nodes get the engine, and no client of the Kubernetes API."""
    packages = _packages(built.agent)
    assert {"blobcache_agent", "blobcache_storage", "blobcache_api", "botocore"} <= packages
    assert not {"kopf", "kubernetes", "blobcache_operator", "pip"} & packages


def test_operator_image_has_no_cloud_client(built: images.Images) -> None:
    """The operator gets no client of any origin."""
    packages = _packages(built.operator)
    assert {"blobcache_operator", "blobcache_api", "kopf", "kubernetes"} <= packages
    assert not {"boto3", "botocore", "blobcache_agent", "pip"} & packages


def test_images_say_what_they_are(built: images.Images) -> None:
    """Labels of OCI, an entry point, and the user each runs as."""
    for image, user in ((built.agent, "0:0"), (built.operator, "65532:65532")):
        config = images.inspect(image)["config"]
        title = image.name.removeprefix("localhost/")
        assert config["User"] == user
        assert config["Entrypoint"] == [title]
        assert config["Labels"]["org.opencontainers.image.title"] == title
        assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
