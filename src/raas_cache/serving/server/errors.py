"""Errors of the server, in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .upstream_server import CBWorkerDeadError


def refused(
    message: str, param: str | None = None, *, status: int = 400, headers: dict[str, str] | None = None
) -> HTTPException:
    """An error for the client.

    Args:
        message: what is wrong, and a mend.
        param: the parameter of the request that is wrong.
        status: the HTTP status.
        headers: more headers of the response.
    """
    return HTTPException(status, {"message": message, "param": param}, headers)  # type: ignore[arg-type]


def answer_errors(app: FastAPI, count: Callable[[], None]) -> None:
    """Let an application answer each error as OpenAI's API does.

    Args:
        app: the application.
        count: called for each refused POST request.
    """

    @app.exception_handler(HTTPException)
    async def _refusal(request: Request, error: HTTPException) -> Response:
        detail: Any = error.detail
        if not isinstance(detail, dict):
            detail = {"message": f"{detail}".rstrip(".") + "."}
        if request.method == "POST":
            count()
        return _answer(error.status_code, detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _no_object(request: Request, error: RequestValidationError) -> Response:
        count()
        first = error.errors()[0]
        reason = first.get("ctx", {}).get("error")
        what = f"not valid JSON ({reason})" if reason else "no JSON object"
        return _answer(400, {"message": f"The body is {what}: send a JSON object with content-type application/json."})

    @app.exception_handler(TemplateError)
    async def _template(request: Request, error: TemplateError) -> Response:
        count()
        return _answer(
            400, {"message": f"messages do not fit the chat template of this model ({error}): change them."}, None
        )

    @app.exception_handler(CBWorkerDeadError)
    async def _dead(request: Request, error: CBWorkerDeadError) -> Response:
        return _answer(503, {"message": f"The generation has stopped ({error}): restart the server."})


def _answer(status: int, detail: dict[str, Any], headers: Any = None) -> Response:
    kind = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
    error = {"param": None, "code": None, **detail, "type": kind}
    return JSONResponse({"error": error}, status, headers)
