"""Requests drawn from the OpenAPI document, and the answers that it describes."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks
from service import KEY, Service


@pytest.fixture(scope="module")
def api(service: Service) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


TAKING = ["POST /v1/encode", "POST /v1/decode", "POST /v1/reconstruct"]

GIVING = ["GET /v1/models", "GET /healthz", "GET /readyz"]

KINDS = [(operation, mode) for operation in TAKING for mode in GenerationMode]
KINDS += [(operation, GenerationMode.POSITIVE) for operation in GIVING]


@pytest.mark.parametrize(("operation", "mode"), KINDS, ids=lambda part: str(part))
def test_openapi_document_describes_every_answer(api: Any, operation: str, mode: GenerationMode) -> None:
    """Requests that the OpenAPI document allows or forbids are answered as the document describes."""
    method, path = operation.split()

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(
            headers={"Authorization": f"Bearer {KEY}"},
            checks=[
                checks.not_a_server_error,
                openapi_checks.status_code_conformance,
                openapi_checks.content_type_conformance,
                openapi_checks.response_headers_conformance,
                openapi_checks.response_schema_conformance,
            ],
        )

    ask()


def test_openapi_document_lists_every_operation(api: Any) -> None:
    """The OpenAPI document lists every operation of the service."""
    found = {operation.ok().label for operation in api.get_all_operations()}
    assert found == {*TAKING, *GIVING}
