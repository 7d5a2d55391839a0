"""Addresses of the page -> their answers."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast

import jinja2
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dianjing.check.codes import translated
from dianjing.config.load import shipped_recipes
from dianjing.errors import DataError, DianjingError
from dianjing.language import LANGUAGES
from dianjing.make.prompts import shipped_prompts
from dianjing.pictures.picture import load_image
from dianjing.serve.page import REPORT
from dianjing.studio import recipes
from dianjing.studio.review import OPS, Stale, Unusable
from dianjing.studio.session import FILTERS, ReviewSession
from dianjing.studio.studio import Studio
from dianjing.studio.words import chosen_language, words

Result = TypeVar("Result")

MAX_BYTES = 32 * 2**20
"""Of one request."""
SHOWN_SIDE = 1600
"""A larger picture is shown this large."""
LOSSLESS_PIXELS = 512 * 512
MAX_TURNS = 200


class Answer(JSONResponse):
    """JSON in ASCII, since the texts of the data may hold half a character (a lone surrogate)."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False).encode()


async def in_thread(function: Callable[..., Result], *given: Any) -> Result:
    """Return what a slow function returns; its thread does not keep the program from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.cancelled():
            set_it(value)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, function(*given))
        except BaseException as error:
            outcome = (future.set_exception, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def build_app(studio: Studio) -> Starlette:
    """Return the application; `PageGuard` stands before it."""
    routes = [
        Route("/", _page),
        Mount("/static", StaticFiles(directory=str(files("dianjing.studio") / "static"))),
        Route("/state", _state),
        Route("/next", _next),
        Route("/records/{index:int}", _record),
        Route("/records/{index:int}/change", _change, methods=["POST"]),
        Route("/records/{index:int}/proposal", _proposal, methods=["POST"]),
        Route("/records/{index:int}/pictures/{number:int}", _picture),
        Route("/records/{index:int}/seen", _seen),
        Route("/records/{index:int}/seen/{number:int}", _seen_picture),
        Route("/export", _export, methods=["POST"]),
        Route("/runs", _runs),
        Route("/run", _run),
        Route("/run/picture", _run_picture),
        Route("/page", _report),
        Route("/recipe/form", _form),
        Route("/recipe/plan", _plan, methods=["POST"]),
        Route("/recipe/write", _write, methods=["POST"]),
        Route("/runs/start", _start, methods=["POST"]),
        Route("/runs/stop", _stop, methods=["POST"]),
        Route("/pictures", _upload, methods=["POST"]),
        Route("/pictures/{name}", _uploaded),
        Route("/chat", _chat, methods=["POST"]),
    ]
    handlers: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        DianjingError: _said,
        Unusable: _said,
        OSError: _said,
        ClientDisconnect: _said,
    }
    app = Starlette(routes=routes, exception_handlers=cast(Any, handlers))
    app.state.studio = studio
    return app


def _studio(request: Request) -> Studio:
    return request.app.state.studio


def _session(request: Request) -> ReviewSession:
    session = _studio(request).session
    if session is None:
        raise DataError("no data is under review; name it on the command line (--data)")
    return session


async def _said(request: Request, error: Exception) -> Response:
    return Answer({"error": str(error)}, status_code=422)


async def _body(request: Request) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BYTES:
            raise Unusable(f"a request may have at most {MAX_BYTES >> 20} MiB")
    return bytes(content)


async def _json(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise Unusable("send the request as application/json")
    try:
        value = json.loads(await _body(request))
    except (ValueError, RecursionError) as error:
        raise Unusable(f"the request is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unusable("the request must be a JSON object")
    return cast(dict[str, Any], value)


def _given(body: Mapping[str, Any], name: str, kind: type[Result]) -> Result:
    value = body.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Unusable(f'"{name}" must be of type {kind.__name__}')
    return value


def _index(request: Request) -> int:
    index, number = request.path_params["index"], len(_session(request).records)
    if index >= number:
        raise DataError(f"no record {index}; there are {number} records")
    return index


def _png(image: Image.Image) -> Response:
    """Return a picture encoded again: no byte of the file itself is sent."""
    shown = image.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    small = shown.width * shown.height <= LOSSLESS_PIXELS
    shown.save(file, "PNG" if small else "JPEG", **({"compress_level": 1} if small else {"quality": 90}))
    return Response(file.getvalue(), media_type="image/png" if small else "image/jpeg")


async def _page(request: Request) -> Response:
    studio = _studio(request)
    given = request.query_params.get("lang", "")
    language = given if given in LANGUAGES else chosen_language(request.headers.get("accept-language", ""))
    text = (files("dianjing.studio") / "page.html.j2").read_text(encoding="utf-8")
    about = {
        "folder": studio.folder.name or str(studio.folder),
        "data": studio.session.data.name if studio.session else "",
        "journal": studio.session.journal.name if studio.session else "",
        "data_hash": studio.session.records.sha256[:16] if studio.session else "",
        "generate": studio.proposer is not None,
        "prompts": list(shipped_prompts()),
        "models": list(studio.named_models),
        "shipped": list(shipped_recipes()),
        "recipe": studio.recipe,
        "filters": FILTERS,
        "words": words(language),
        "codes": translated(language),
    }
    page = jinja2.Template(text, autoescape=True).render(t=words(language), language=language, about=about)
    return HTMLResponse(page)


async def _state(request: Request) -> Response:
    return Answer(_session(request).state())


async def _next(request: Request) -> Response:
    session, query = _session(request), request.query_params
    chosen = next((one for one in FILTERS if one == query.get("filter")), "all")
    start = query.get("from", "0")
    if not start.removeprefix("-").isascii() or not start.removeprefix("-").isdecimal():
        raise Unusable('"from" must be a number')
    step = -1 if query.get("step") == "-1" else 1
    return Answer(await in_thread(session.next, max(int(start[:12]), 0 if step > 0 else -1), step, chosen))


async def _record(request: Request) -> Response:
    return Answer(await in_thread(_session(request).record, _index(request)))


async def _change(request: Request) -> Response:
    session, index, body = _session(request), _index(request), await _json(request)
    op = next((one for one in OPS if one == body.get("op")), None)
    if op is None:
        raise Unusable(f'"op" must be one of {", ".join(OPS)}')
    version = _given(body, "version", int)
    try:
        await in_thread(session.change, index, version, op, body.get("conversations"))
    except Stale:
        return Answer({"error": "stale", "record": await in_thread(session.record, index)}, status_code=409)
    return Answer(await in_thread(session.record, index))


async def _proposal(request: Request) -> Response:
    studio, session, index, body = _studio(request), _session(request), _index(request), await _json(request)
    if studio.proposer is None:
        raise DataError("no endpoint is named; give --base-url and --model-name on the command line")
    prompt = _given(body, "prompt", str)
    if prompt not in shipped_prompts():
        raise Unusable("no such prompt")
    name = session.picture_name(index, 0)
    proposal = await in_thread(studio.proposer.propose, name, prompt)
    fields = ("conversations", "model", "calls", "dropped")
    return Answer({name: getattr(proposal, name) for name in fields})


async def _picture(request: Request) -> Response:
    number = request.path_params["number"]
    return _png(await in_thread(_session(request).picture, _index(request), number))


async def _seen(request: Request) -> Response:
    studio, session, index = _studio(request), _session(request), _index(request)
    recipe = studio.recipe_path(request.query_params.get("recipe", ""))
    fields = session.fields(index)
    if fields is None:
        raise DataError("this record is not a JSON object, so no model can see it")
    return Answer(await in_thread(studio.model_view.text, recipe, fields, session.place(index)))


async def _seen_picture(request: Request) -> Response:
    studio, session = _studio(request), _session(request)
    recipe = studio.recipe_path(request.query_params.get("recipe", ""))
    name = session.picture_name(_index(request), request.path_params["number"])
    return _png(await in_thread(studio.model_view.picture, recipe, session.root, name))


async def _export(request: Request) -> Response:
    await _json(request)
    return Answer(await in_thread(_session(request).export))


async def _runs(request: Request) -> Response:
    return Answer(await in_thread(_studio(request).runs.listing))


async def _run(request: Request) -> Response:
    step = request.query_params.get("step", "")[:12]
    at = int(step) if step.isascii() and step.isdecimal() else None
    return Answer(await in_thread(_studio(request).runs.run, request.query_params.get("name", ""), at))


async def _run_picture(request: Request) -> Response:
    query = request.query_params
    return _png(await in_thread(_studio(request).runs.picture, query.get("name", ""), query.get("record", "")))


async def _report(request: Request) -> Response:
    page = await in_thread(_studio(request).runs.page, request.query_params.get("name", ""))
    return HTMLResponse(page, headers=REPORT)


async def _form(request: Request) -> Response:
    name = request.query_params.get("from", "")
    start = name if name in shipped_recipes() else _studio(request).runs.recipe(name) if name else ""
    return Answer({"fields": await in_thread(recipes.form, start)})


async def _plan(request: Request) -> Response:
    recipe = recipes.read_form(_given(await _json(request), "values", dict))
    return Answer(await in_thread(recipes.plan, recipe))


async def _write(request: Request) -> Response:
    body = await _json(request)
    recipe = recipes.read_form(_given(body, "values", dict))
    name = await in_thread(recipes.write, _studio(request).runs.folder, _given(body, "name", str), recipe)
    return Answer({"name": name})


async def _start(request: Request) -> Response:
    body, runs = await _json(request), _studio(request).runs
    name, resume = _given(body, "recipe", str), _given(body, "resume", bool)
    return Answer({"name": await in_thread(lambda: runs.start(name, resume=resume))})


async def _stop(request: Request) -> Response:
    body = await _json(request)
    await in_thread(_studio(request).runs.stop, _given(body, "name", str))
    return Answer({})


async def _upload(request: Request) -> Response:
    """Keep a picture in memory, opened as carefully as one of a data set."""
    if not request.headers.get("content-type", "").startswith("image/"):
        raise Unusable("send a picture")
    studio, content = _studio(request), await _body(request)
    name = sha256(content).hexdigest()[:32]
    studio.keep(name, await in_thread(_opened, content))
    return Answer({"name": name})


def _opened(content: bytes) -> Image.Image:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "picture").write_bytes(content)
        return load_image(folder, "picture")


async def _uploaded(request: Request) -> Response:
    return _png(_studio(request).upload(request.path_params["name"]))


async def _chat(request: Request) -> Response:
    """Answer a question as lines of JSON: {"notice"}, then {"text"} in pieces, or {"error"}."""
    studio, body = _studio(request), await _json(request)
    question = _given(body, "question", str)
    if not question.strip():
        raise Unusable("ask something")
    path = studio.model_path(_given(body, "model", str))
    history = [_turn(turn) for turn in _given(body, "history", list)[:MAX_TURNS]]
    image = _chat_picture(studio, body)
    answer = studio.models.answer(path, image, history, question)
    notice = await in_thread(lambda: next(answer))
    return StreamingResponse(_lines(notice, answer), media_type="application/x-ndjson")


def _turn(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise Unusable('"history" must be a list of [question, answer]')
    return value[0], value[1]


def _chat_picture(studio: Studio, body: Mapping[str, Any]) -> Image.Image | None:
    """Return the picture that was uploaded, or that of a record."""
    if body.get("picture") is not None:
        return studio.upload(_given(body, "picture", str))
    if body.get("record") is not None and studio.session:
        index = _given(body, "record", int)
        if 0 <= index < len(studio.session.records):
            return studio.session.picture(index, 0)
    return None


async def _lines(notice: str, answer: Iterator[str]) -> AsyncIterator[str]:
    yield json.dumps({"notice": notice}) + "\n"
    try:
        while (piece := await in_thread(next, answer, None)) is not None:
            yield json.dumps({"text": piece}) + "\n"
    except DianjingError as error:
        yield json.dumps({"error": str(error)}) + "\n"
