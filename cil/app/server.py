"""The web server of `cil teach`: the only file that imports Starlette and uvicorn.

It listens on this machine's own address alone, and answers only requests that name it (so that no other site's name
leads there) and changes that come from its own page (so that no other page in the same browser can teach). The page
consists of the files in ``page/``, and its browser is forbidden to load anything else. An uploaded file above 1 MB is
spooled to a temporary file without a name, which is gone when the request or the process ends.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from threading import Thread
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cil.app.teaching import Teacher, Upload
from cil.errors import CilError, DataError, RunError, clipped

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
"""What a browser may call the address."""
MB = 10**6
LIMITS = {"files": 500, "file_mb": 50, "all_mb": 500}
"""Number of files of one request, and the size of each and of all."""
PATIENCE = 5  # seconds that requests have to end when the server ends
TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def application(teacher: Teacher) -> Starlette:
    """The page, and what its script asks for: ``/state``, ``/predict``, ``/teach``, ``/undo``. Errors are JSON."""

    async def state(request: Request) -> Response:
        found = await run_in_threadpool(teacher.state)
        return JSONResponse({**found, "limits": LIMITS}, headers=HEADERS)

    async def predict(request: Request) -> Response:
        uploads, _ = await received(request)
        return JSONResponse(await run_in_threadpool(teacher.predict, uploads), headers=HEADERS)

    async def teach(request: Request) -> Response:
        uploads, fields = await received(request)
        return JSONResponse(await run_in_threadpool(teacher.teach, uploads, fields.get("name", "")), headers=HEADERS)

    async def undo(request: Request) -> Response:
        _, fields = await received(request)
        return JSONResponse(await run_in_threadpool(teacher.undo, fields.get("version", "")), headers=HEADERS)

    actions = {"/predict": predict, "/teach": teach, "/undo": undo}
    return Starlette(
        routes=[
            Route("/", _file("page.html")),
            *(Route(f"/{name}", _file(name)) for name in TYPES if name != "page.html"),
            Route("/state", state),
            *(Route(path, action, methods=["POST"]) for path, action in actions.items()),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)],
        exception_handlers={CilError: _refused, ClientDisconnect: _gone},
    )


async def received(request: Request) -> tuple[list[Upload], dict[str, str]]:
    """The files of a request, and its fields by name.

    Raises:
        DataError: It does not come from the page, is larger than :data:`LIMITS` allow, or is no form with files.
    """
    if "x-cil" not in request.headers:  # which a browser sends to another origin only if that one agrees
        raise DataError("this request does not come from the page of cil teach")
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > LIMITS["all_mb"] * MB:
        size = f"{int(length) / MB:.0f} MB" if length.isdecimal() else "of unknown size"
        raise DataError(f"the files are {size} together; allowed: {LIMITS['all_mb']} MB at a time; choose fewer")
    # one more than allowed, so that it is this function that says so
    parser = MultiPartParser(request.headers, request.stream(), max_files=LIMITS["files"] + 1, max_fields=10)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # a KeyError: it has no content type, or one without a boundary
        raise DataError(_too_many() if "Too many files" in str(error) else f"no form: {error}") from None
    uploads, fields = [], {}
    try:
        for key, value in form.multi_items():
            if isinstance(value, str):
                fields[key] = value
            else:
                name = clipped((value.filename or "").replace("\\", "/").rpartition("/")[2]) or "a file without a name"
                if (value.size or 0) > LIMITS["file_mb"] * MB:
                    raise DataError(
                        f"{name}: {(value.size or 0) / MB:.0f} MB; allowed: {LIMITS['file_mb']} MB per file; make it "
                        "smaller"
                    )
                uploads.append(Upload(name, await value.read()))
    finally:
        await form.close()
    if len(uploads) > LIMITS["files"]:
        raise DataError(_too_many())
    return uploads, fields


def serve(teacher: Teacher, port: int, started: Callable[[str], None], waiting: Callable[[], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; a lesson that is being learned is finished first.

    A second signal ends the process at once; the model is then the one before the lesson or the one after.

    Args:
        teacher: What the page shows.
        port: The port; 0: any free one.
        started: Called with the page's address as soon as a browser can open it.
        waiting: Called when a signal has come.

    Raises:
        RunError: The port is taken or not allowed.
    """
    with listening(port) as here:
        server = Server(application(teacher), waiting)
        started(f"http://{ADDRESS}:{here.getsockname()[1]}/")
        server.run(sockets=[here])


@contextmanager
def serving(teacher: Teacher, port: int = 0) -> Iterator[int]:
    """The port at which a thread of this process serves the page until the block ends; see :func:`serve`."""
    with listening(port) as here:
        server = Server(application(teacher), lambda: None)
        thread = Thread(target=server.run, kwargs={"sockets": [here]})
        thread.start()
        try:
            yield here.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def listening(port: int) -> socket.socket:
    """A socket at which connections wait until they are served.

    Raises:
        RunError: The port is taken or not allowed.
    """
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        raise RunError(
            f"port {port}: {error.strerror}; give another one, or --port 0, which takes any free one"
        ) from None


class Server(uvicorn.Server):
    """Ends when a signal comes, and at once when a second one comes."""

    def __init__(self, application: Starlette, waiting: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=PATIENCE,
            )
        )
        self._waiting = waiting

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._waiting()
        super().handle_exit(sig, frame)


def _too_many() -> str:
    return f"more than {LIMITS['files']} files; choose fewer, or teach a folder with `cil learn`"


def _file(name: str) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        return Response((files("cil.app") / "page" / name).read_bytes(), media_type=TYPES[name], headers=HEADERS)

    return answer


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": clipped(str(error), 500)}, status_code=400, headers=HEADERS)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it
