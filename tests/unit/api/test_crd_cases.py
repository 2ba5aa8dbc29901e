"""The models judge resources as the API server does: same cases, same sentences."""

from __future__ import annotations

import pytest
from tests.contract.crd_cases import BASE, CASES, UPDATES, Case, Update, apply_patch

from blobcache_api.v1alpha1.common import MalformedError
from blobcache_api.v1alpha1.config import find_forbidden_changes, from_resource


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_judge_as_the_api_server(case: Case) -> None:
    """A resource is read, or refused with the sentence of its rule."""
    if case.is_accepted:
        assert from_resource(case.body()).spec.backend.type
        return
    with pytest.raises(MalformedError) as caught:
        from_resource(case.body())
    assert (case.says or case.model) in str(caught.value)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.name)
def test_models_tell_forbidden_changes(update: Update) -> None:
    """A change of an immutable field is told by the API server's sentence."""
    old, new = (from_resource(apply_patch(BASE, patch)).spec for patch in (update.old, update.new))
    told = " ".join(find_forbidden_changes(new, old))
    assert (update.says in told) if update.says else told == ""


def test_names_of_cases_differ() -> None:
    """Each case can be found by its name."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
