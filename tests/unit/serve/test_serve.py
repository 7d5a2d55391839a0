"""The guard: what it refuses never reaches the application, and opens no file."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError
from PIL import Image

from dianjing.errors import ConfigError
from dianjing.pictures.rule import PictureRule
from dianjing.serve import api
from dianjing.serve.api import ApiGuard
from dianjing.serve.chat_request import ContextWindow
from dianjing.serve.server import example, open_port, vllm_command

CHAT = "/v1/chat/completions"
JSON = {"host": "127.0.0.1:8080", "content-type": "application/json"}
opened: list[str] = []
"""Paths that the process has opened; a hook of Python's tells, and cannot be taken off again."""


@pytest.fixture(scope="module", autouse=True)
def _watch() -> None:
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)


class Words:
    """A processor whose template joins the texts, and whose tokens are words of at most ten letters."""

    def __init__(self) -> None:
        self.tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {"0123456789": 0}

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        if [message["role"] for message in messages[:2]] == ["user", "user"]:
            raise TemplateError("roles must alternate")
        return " ".join(part.get("text", "<image>") for message in messages for part in message["content"])

    def __call__(self, text: str, **settings: Any) -> Any:
        return SimpleNamespace(input_ids=text.split())


WINDOW = ContextWindow(positions=100, picture=20, processor=Words())


class Application:
    """Keeps what the guard lets through."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(json.loads(message["body"]) if message["body"] else {})
        assert dict(scope["headers"]).get(b"content-length") in (None, str(len(message["body"])).encode())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def ask(
    body: Any,
    *,
    key: str = "",
    path: str = CHAT,
    method: str = "POST",
    headers: dict[str, str] = JSON,
    window: ContextWindow = WINDOW,
) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Return status, reply, and what reached the application."""
    application = Application()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [data[i : i + 65536] for i in range(0, len(data), 65536)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": fields}
    asyncio.run(ApiGuard(app=application, port=8080, model="mine", window=window, key=key)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), application.bodies


def picture(image: Image.Image, kind: str = "PNG", **settings: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


SQUARE = picture(Image.new("RGB", (4, 4), "red"))


def question(url: Any = SQUARE, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return {"model": "mine", "messages": [{"role": "user", "content": parts}], **fields}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(file)
    return file


def test_a_question_reaches_the_application_greedy_unless_it_says_otherwise() -> None:
    status, _, (body,) = ask(question(max_tokens=5))
    assert status == 200
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("mine", 5, 0)
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "What?"}
    assert ask(question(temperature=0.5))[2][0]["temperature"] == 0.5
    assert ask({"messages": [{"role": "user", "content": "Hello"}]})[2][0]["model"] == "mine"


def test_a_picture_is_prepared_as_in_training() -> None:
    """Upright and opaque, whatever its format: what reaches the application is a plain PNG."""
    tall = Image.new("RGB", (2, 6), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    clear = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    for url, size, colour, window in (
        (picture(tall, "JPEG", exif=exif), (6, 2), None, WINDOW),
        (picture(clear), (3, 3), (255, 255, 255), WINDOW),
        (picture(clear), (3, 3), (0, 0, 0), replace(WINDOW, rule=PictureRule(transparency="drop"))),
    ):
        (body,) = ask(question(url), window=window)[2]
        passed = body["messages"][0]["content"][0]["image_url"]["url"]
        assert passed.startswith("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(passed.partition(",")[2])))
        assert (image.mode, image.size) == ("RGB", size)
        assert colour is None or image.getpixel((0, 0)) == colour


@pytest.mark.parametrize(
    "url",
    [
        "{secret}",
        "file://{secret}",
        "FILE:{secret}",
        "http://127.0.0.1/x.png",
        "https://example.org/x.png",
        "data:text/plain;base64,aGk=",
        "data:image/png,plain",
        "data:image/png;base64,{secret}",
        " data:image/png;base64,aGk=",
        "data:image/png;base64,aGk=",
        "",
        None,
        ["{secret}"],
    ],
)
def test_no_address_is_opened(url: Any, secret: Path) -> None:
    opened.clear()
    url = url.replace("{secret}", str(secret)) if isinstance(url, str) else url
    status, reply, passed = ask(question(url))
    assert (status, passed) == (400, [])
    assert "messages[0].content[0]" in reply["error"]["message"]
    assert str(secret) not in opened
    assert ask({**question(), "messages": [{"role": "user", "content": [{"type": "image", "url": url}]}]})[0] == 400


def test_the_watch_sees_a_file_that_is_opened(secret: Path) -> None:
    opened.clear()
    secret.read_bytes()
    assert opened == [str(secret)]


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "mine", "messages": [fields]}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (question(model="other/model"), 404, "'mine'"),
        (question(generation_config="{}"), 400, "generation_config"),
        (question(chat_template_kwargs={"chat_template": "x"}), 400, "chat_template_kwargs"),
        (question(tools=[{}]), 400, "tools"),
        (message(role="system", content="You are a pirate."), 400, "user or assistant"),
        (message(role="assistant", content="I am."), 400, "the last message"),
        (message(role="user", content="<image>What?"), 400, "<image>"),
        (message(role="user", content=[{"type": "text", "text": "a<image>"}]), 400, "content[0]"),
        (message(role="user", content=[{"type": "video_url", "video_url": {"url": "/etc/passwd"}}]), 400, "content[0]"),
        (message(role="user", content="a", tool_calls=[]), 400, "nothing else"),
        (message(role="user"), 400, "content"),
        (message(role="user", content=[7]), 400, "content[0]"),
        ({"model": "mine", "messages": []}, 400, "messages"),
        ({"model": "mine"}, 400, "messages"),
        (message(role="user", content="a\ud800"), 400, "messages[0]: half a character"),
        (message(role="user", content="word " * 100), 400, "the messages take 100 of the model's 100 positions"),
        (message(role="user", content="word" * 10**6), 400, "longer than the 100 positions"),
        (message(role="user", content=[{"type": "text", "text": ""}] * 101), 400, "longer than the 100 positions"),
        (message(role="user", content=question()["messages"][0]["content"] * 5), 400, "take 105 of"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "refuses them: roles must alternate"),
        (question("data:image/png;base64,\u00e9"), 400, "content[0]"),
        ([], 400, "object"),
        (b"{", 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (message(role="user", content=question()["messages"][0]["content"] * 17), 400, "more than 16"),
    ],
)
def test_what_is_refused(body: Any, status: int, word: str) -> None:
    found, reply, passed = ask(body)
    assert (found, passed) == (status, [])
    assert word in reply["error"]["message"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, "9", True, 1.5, 80, 10**12, 10**400]),
        ("max_completion_tokens", [0, "9", 80]),
        ("temperature", [float("nan"), float("inf"), -1, 1e-40, 3, 10**400, "1", False]),
        ("top_p", [0, 2, float("nan"), "1"]),
        ("seed", ["a", 2**80, -(2**64), 1.0, True]),
        ("stop", ["", [], ["a", ""], ["a"] * 5, "a" * 101, "\ud800", 7]),
        ("frequency_penalty", [-1, 3, "a"]),
        ("stream", ["yes", 1]),
        ("stream_options", [True]),
        ("user", [7]),
    ],
)
def test_a_value_that_no_field_can_have_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        status, reply, passed = ask(question(**{field: value}))
        assert (status, passed) == (400, []), value
        assert field.replace("completion_", "") in reply["error"]["message"].replace("completion_", "")


def test_an_answer_has_the_room_that_the_prompt_leaves() -> None:
    """The question has a picture of 20 positions and a word."""
    assert ask(question())[2][0]["max_tokens"] == 79
    assert ask(question(max_tokens=None, stop=None))[2][0]["max_tokens"] == 79
    body = ask(question(max_completion_tokens=79, max_tokens=5))[2][0]
    assert (body["max_tokens"], "max_completion_tokens" in body) == (79, False)
    assert "ask for at most 79" in ask(question(max_tokens=80))[1]["error"]["message"]


def test_a_request_too_large_is_refused_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_REQUEST_BYTES", 2**20)
    assert ask(b" " * (2**20 + 1))[0] == 413
    assert ask(b" " * 2**20 + b"{")[0] == 413


@pytest.mark.parametrize("said", [str(2**20 + 1), "9" * 5000])
def test_a_request_that_says_it_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(api, "MAX_REQUEST_BYTES", 2**20)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("it is read")

    async def send(message: Any) -> None:
        sent.append(message)

    fields = [(name.encode(), value.encode()) for name, value in {**JSON, "content-length": said}.items()]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": fields}
    asyncio.run(ApiGuard(app=Application(), port=8080, model="mine", window=WINDOW)(scope, receive, send))
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/completions", "/docs", "/v1/audio/x"])
def test_other_paths_are_not_served(path: str) -> None:
    assert [ask({}, path=path, method=method)[0::2] for method in ("GET", "POST")] == [(404, [])] * 2


def test_another_web_page_cannot_ask() -> None:
    """A page can send text/plain without being asked, and can give its name this machine's address."""
    assert ask(question(), headers={**JSON, "content-type": "text/plain"})[0] == 415
    assert ask(question(), headers={**JSON, "host": "evil.example:8080"})[0] == 403
    assert ask(question(), headers={**JSON, "host": "localhost"})[0] == 200
    assert ask(question(), headers={**JSON, "origin": "https://evil.example"})[0] == 403
    assert ask(question(), headers={**JSON, "origin": "null"})[0] == 403
    assert ask(question(), headers={**JSON, "origin": "http://127.0.0.1:8080"})[0] == 200


def test_the_key_opens() -> None:
    assert ask(question(), key="open")[0] == 401
    assert ask(question(), key="open", headers={**JSON, "authorization": "Bearer close"})[0] == 401
    assert ask(question(), key="open", headers={**JSON, "authorization": "Bearer open"})[0] == 200
    assert ask({}, key="open", path="/v1/models", method="GET")[0] == 401


def test_the_models_are_listed() -> None:
    status, reply, _ = ask({}, path="/v1/models", method="GET")
    assert (status, [model["id"] for model in reply["data"]]) == (200, ["mine"])


def test_a_port_in_use_is_said() -> None:
    with open_port(0) as taken, pytest.raises(ConfigError, match="choose another"):
        open_port(taken.getsockname()[1])


def test_vllm_opens_no_address_either(tmp_path: Path) -> None:
    command = " ".join(vllm_command(tmp_path / "out", 81))
    assert "--host 127.0.0.1 --port 81" in command
    assert "--allowed-media-domains none.invalid" in command
    assert "--served-model-name out" in command
    assert "local-media" not in command


def test_the_example_survives_printf() -> None:
    assert '{"model": "100%% mine"' in example(80, "100% mine", key=False)
    assert "$DIANJING_SERVE_KEY" in example(80, "mine", key=True)


NOTHING = [
    {"n": 1},
    {"presence_penalty": 0, "frequency_penalty": 0},
    {"presence_penalty": 0.0},
    {"logprobs": False, "top_logprobs": None},
    {"response_format": {"type": "text"}},
    {"tools": [], "tool_choice": "none"},
    {"logit_bias": {}, "metadata": {}, "store": False},
    {"functions": None, "stop": None},
]


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_a_field_that_asks_for_nothing_is_left_out(fields: dict[str, Any]) -> None:
    status, _, (body,) = ask(question(**fields))
    assert status == 200
    assert set(body) <= {"model", "messages", "temperature", "max_tokens", "frequency_penalty"}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"n": True},
        {"presence_penalty": 0.5},
        {"presence_penalty": False},
        {"logprobs": True},
        {"logprobs": 0},
        {"response_format": {"type": "json_object"}},
        {"tools": [{}]},
        {"logit_bias": {"5": 1}},
        {"prompt": None},
    ],
    ids=str,
)
def test_a_field_that_asks_for_something_unknown_is_refused(fields: dict[str, Any]) -> None:
    status, reply, bodies = ask(question(**fields))
    assert (status, bodies) == (400, [])
    assert f"not supported: {next(iter(fields))}" in reply["error"]["message"]
