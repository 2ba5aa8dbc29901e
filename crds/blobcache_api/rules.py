"""Rules that hold on the API server (CEL) and in the models, told in one sentence.

A `Rule` is metadata of a field's type, or one of a model's `rules`. The sentence exists once: the
CRD generator puts it beside the CEL expression, the model raises it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

VALIDATIONS = "x-kubernetes-validations"


@dataclass(frozen=True, slots=True)
class Rule:
    """A constraint on one value, in CEL over `self` and in Python over the validated value."""

    cel: str
    message: str
    holds: Callable[[Any], bool]

    def check(self, value: Any) -> Any:
        """Return the value.

        Raises:
            ValueError: The rule does not hold; the text is the rule's sentence.
        """
        if not self.holds(value):
            raise ValueError(self.message)
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return add_validation(handler(schema), self.cel, self.message)


@dataclass(frozen=True, slots=True)
class TransitionRule:
    """A constraint on a change, in CEL over `self` and `oldSelf` and in Python over (new, old).

    A model cannot know the old value; `find_forbidden_changes` in `v1alpha1.config` compares.
    """

    cel: str
    message: str
    allows: Callable[[Any, Any], bool]

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return add_validation(handler(schema), self.cel, self.message)


def add_validation(schema: JsonSchemaValue, cel: str, message: str) -> JsonSchemaValue:
    """Return the schema with one more CEL rule."""
    known = schema.get(VALIDATIONS, [])
    return {**schema, VALIDATIONS: [*known, {"rule": cel, "message": message}]}
