"""Middleware in front of vLLM-Omni's server that checks every request before the server sees it::

    port-kit serve MODEL [options]

It serves the endpoints of the model's output only, reads bodies within bounds, checks forms and references, limits the
queue, cancels the work of clients that left, keeps the jobs of clients apart, and gives all errors one form.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from port_kit.errors import InputError
from port_kit.escape import quoted, reason_of
from port_kit.runtime.refusals import hide_tracebacks_of_refusals
from port_kit.serving.answers import Answer, StalledError
from port_kit.serving.asgi import App, Incoming, Message, Receive, Refusal, Scope, Send, header, refuse, send_json
from port_kit.serving.connections import abort, limit_connections
from port_kit.serving.forms import Disconnected, read_form, read_json, replay, with_body
from port_kit.serving.image_form import JSON_ENDPOINTS, body_names, check_image_form, check_json
from port_kit.serving.jobs import JOB, Job, Jobs, client_of, digest
from port_kit.serving.lifecycle import Lifecycle
from port_kit.serving.limits import Limits
from port_kit.serving.queue import CANCELLED, Queue, Snapshot, look, name_of_request
from port_kit.serving.served import Served, served_by
from port_kit.serving.video_form import check_video_form

logger = logging.getLogger(__name__)

#: Endpoints of every server, and those that make an output, by the model's output type.
OPEN, LISTED = ("/health", "/version", "/metrics"), ("/v1/models",)
CREATE = {
    "video": ("/v1/videos", "/v1/videos/sync"),
    "audio": ("/v1/audio/generate",),
    "image": ("/v1/images/generations", "/v1/images/edits"),
}
VIDEOS = "/v1/videos"


class Gateway:
    """ASGI middleware, the outermost of the server.

    Args:
        app: wrapped application, passed by vLLM.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._limits = Limits.from_environment(os.environ)
        self._lifecycle = Lifecycle(self._limits)
        self._jobs = Jobs()
        self._queue = Queue()
        self._keys: list[bytes] = []
        self._served: Served | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, Incoming(receive), send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start with the server; end it if the gateway cannot start: uvicorn would serve without it."""
        try:
            self._start(scope["app"].state)
        except Exception as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"the gateway cannot start: {reason_of(error)}"})
            return
        await self._app(scope, receive, send)

    def _start(self, state: Any) -> None:
        from vllm_omni.entrypoints.openai import api_server, video_api_utils
        from vllm_omni.entrypoints.openai.video.generation import helpers

        from port_kit.serving.pictures import decode_pictures_late
        from port_kit.serving.storage import use_own_storage
        from port_kit.upstream.checks import require

        require("gateway")
        require("video_storage")
        require("engine_shutdown")
        require("late_decoding")
        keys = getattr(state.args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        self._keys = [digest(key) for key in keys if key]
        # The served storage was started by the server; this one replaces it.
        storage = use_own_storage([api_server, helpers], self._limits.keep_seconds)
        decode_pictures_late(video_api_utils, helpers)
        self._sweeping = asyncio.ensure_future(storage.start())
        self._lifecycle.start(state)
        limit_connections(state.server.config, self._limits.upload_seconds)
        hide_tracebacks_of_refusals()

    async def _answer(self, scope: Scope, receive: Incoming, send: Send) -> None:
        answer = Answer(send, self._limits.idle_seconds)
        task = asyncio.current_task()
        assert task is not None
        try:
            with self._lifecycle.tracked(task):
                await self._route(scope, receive, answer)
        except Refusal as refusal:
            await refuse(receive, send, refusal)
        except InputError as error:
            await refuse(receive, send, Refusal(400, str(error)))
        except (Disconnected, StalledError):
            logger.info("the client of %s left", scope["path"])
            abort(scope)
        except asyncio.CancelledError:
            if self._lifecycle.ending is None or answer.has_started:
                raise
            await refuse(receive, send, Refusal(503, self._lifecycle.ending))

    async def _route(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        method, path = scope["method"], scope["path"]
        if method == "OPTIONS" or path in OPEN:
            await self._app(scope, receive, answer)
            return
        served = await self._describe_model(scope["app"].state)
        created = CREATE.get(served.output_type, ())
        match = JOB.fullmatch(path) if served.output_type == "video" else None
        if path not in (*LISTED, *created) and match is None:
            known = ", ".join((*OPEN, *LISTED, *created))
            raise Refusal(404, f"this server has no endpoint {quoted(path)}; it has {known}")
        client = client_of(header(scope, "authorization"), self._keys)
        if method == "POST" and path in created:
            await self._create(scope, receive, answer, served, client)
        elif path == VIDEOS and method == "GET":
            await self._list(scope, receive, answer, client)
        elif match is not None and path not in created:
            self._jobs.check_owner(match["job"], client)
            await self._use(scope, receive, answer, match["job"])
        else:
            await self._app(scope, receive, answer)

    async def _describe_model(self, state: Any) -> Served:
        if self._served is None:
            config = state.engine_client.get_diffusion_od_config()
            self._served = await asyncio.to_thread(served_by, config)
        return self._served

    # -- outputs ----------------------------------------------------------------------------------------------------

    async def _create(self, scope: Scope, receive: Receive, answer: Answer, served: Served, client: bytes) -> None:
        with self._lifecycle.admitted(await self._jobs.count_unfinished()):
            settings, body, kind = await self._checked(scope, receive, served)
            self._lifecycle.check()
            scope = with_body(scope, body, kind)
            if scope["path"] == VIDEOS:  # a job outlives its connection
                answer.rewrite = partial(self._register, client, settings, await look(self._queue))
                await self._app(scope, replay(body, receive), answer)
            else:
                with self._queue.holding(name_of_request(scope)):
                    await self._run_while_connected(scope, body, receive, answer)

    async def _checked(self, scope: Scope, receive: Receive, served: Served) -> tuple[dict[str, Any], bytes, bytes]:
        """Read and check the body of a request for an output; return a job's settings, the body and its type."""
        if query := scope["query_string"]:
            raise Refusal(
                400,
                f"[input_value] the request has the query {quoted(query.decode('latin-1'))}, which is not read\n"
                "hint: give all values in the body",
            )
        names = body_names(scope["app"], scope["path"])
        settings: dict[str, Any] = {}
        if scope["path"] in JSON_ENDPOINTS:
            given = await read_json(scope, receive, self._limits)
            check_json(given, names, self._limits)
            return settings, json.dumps(given).encode(), b"application/json"
        form = await read_form(scope, receive, self._limits)
        try:
            if served.output_type == "video":
                settings = await check_video_form(form, served, self._limits)
            else:
                await check_image_form(form, names, self._limits)
            return settings, *await asyncio.to_thread(form.encode)
        finally:
            form.close()

    async def _run_while_connected(self, scope: Scope, body: bytes, receive: Receive, answer: Answer) -> None:
        """Cancel the work if the client leaves; the pipeline then stops before its next step."""
        left: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def wait() -> Message:
            return await asyncio.shield(left)

        work = asyncio.ensure_future(self._app(scope, replay(body, wait), answer))
        watch = asyncio.ensure_future(_until_disconnect(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                logger.info("the client of %s left; its request is cancelled", scope["path"])
                work.cancel()
                await asyncio.wait((work,))
            if not work.cancelled():
                work.result()
        finally:
            for task in (work, watch, left):
                task.cancel()

    # -- jobs -------------------------------------------------------------------------------------------------------

    def _register(self, client: bytes, settings: dict[str, Any], state: Snapshot, status: int, record: Any) -> Any:
        self._jobs.known[record["id"]] = Job(client, settings)
        self._queue.add(record["id"])
        return self._jobs.describe(record, state)

    async def _use(self, scope: Scope, receive: Receive, answer: Answer, job: str) -> None:
        """Answer a request for one job, its video or its deletion."""
        method, known = scope["method"], self._jobs.known.get(job)
        is_record = scope["path"] == f"{VIDEOS}/{job}"
        if is_record and known is not None and known.cancelled is not None and method in ("GET", "DELETE"):
            if method == "DELETE":
                del self._jobs.known[job]
            await send_json(answer, known.cancelled if method == "GET" else _deleted(job))
            return
        state = await look(self._queue)
        if method == "DELETE":
            answer.rewrite = partial(self._forget, job, state)
        elif is_record:
            answer.rewrite = lambda status, record: self._jobs.describe(record, state)
        await self._app(scope, receive, answer)

    def _forget(self, job: str, state: Snapshot, status: int, deleted: Any) -> Any:
        """Forget a job that was deleted; the record of one that was not finished stays."""
        record = state.unfinished.get(job)
        if record is None or job not in self._jobs.known:
            self._jobs.known.pop(job, None)
            return deleted
        self._jobs.cancel(record.model_dump(mode="json"), state)
        return {**deleted, "status": CANCELLED}

    async def _list(self, scope: Scope, receive: Receive, answer: Answer, client: bytes) -> None:
        if not self._keys:
            raise Refusal(
                403, "this server does not list jobs, because it has no API keys to tell clients apart; keep their ids"
            )
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        state = await look(self._queue)
        answer.rewrite = lambda status, listed: self._jobs.listing(listed, client, query, state)
        await self._app({**scope, "query_string": b""}, receive, answer)


def _deleted(job: str) -> dict[str, Any]:
    return {"id": job, "deleted": True, "object": "video.deleted"}


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
