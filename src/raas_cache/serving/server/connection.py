"""ASGI middleware: end a request of the server when its client goes away."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .upstream_server import X_REQUEST_ID


class EndWithClient:
    """Runs each POST request until its answer is complete or its client goes away.

    It gives each request an id of its own, because two clients may send the same `x-request-id`.

    Args:
        app: the application.
        end: called with the id of each request that has ended, for any reason.
    """

    def __init__(self, app: ASGIApp, end: Callable[[str], None]):
        self.app, self.end = app, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        # 1. The body, because only after it a message of `receive` says that the client is gone.
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        name, request_id = X_REQUEST_ID.encode(), uuid.uuid4().hex
        headers = [(key, value) for key, value in scope["headers"] if key != name]
        scope = {**scope, "headers": [*headers, (name, request_id.encode())]}
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if not messages:
                await anyio.sleep_forever()  # `watch` cancels this when the client is gone
            return messages.pop()

        # 2. The answer, and beside it a task that waits until the client is gone.
        try:
            async with anyio.create_task_group() as tasks:

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    tasks.cancel_scope.cancel()

                tasks.start_soon(watch)
                await self.app(scope, replay, send)
                tasks.cancel_scope.cancel()
        finally:
            self.end(request_id)
