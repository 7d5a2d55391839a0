"""An OpenAI-compatible endpoint of our own that answers by the picture's hash, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Hit:
    """One call as the endpoint got it."""

    picture: str
    """Hash of its data URI; "" without one."""
    text: str
    again: bool
    """The call repeats a request whose reply was rejected."""
    number: int
    """How often this picture and text were asked before, re-asks counted by themselves."""
    order: int
    """How many calls came before it."""
    response_format: str
    body: dict[str, Any]
    authorization: str


Behaviour = Callable[[Hit], str]
"""Hit -> what to do: "" to answer, or a fault of Endpoint.FAULTS."""


def good(hit: Hit) -> str:
    return ""


def pairs_about(picture: str, number: int = 3) -> str:
    """Return a reply that depends on the picture alone."""
    pairs = [
        {"question": f"What is number {i} here?", "answer": f"A thing called {picture[5 * i : 5 * i + 5]}."}
        for i in range(number)
    ]
    return json.dumps({"pairs": pairs})


class Endpoint:
    """Serves on a free port while entered; `hits` is what came, `served` how often each was answered in full."""

    def __init__(self, behaviour: Behaviour = good, delay_seconds: float = 0.0) -> None:
        self.behaviour, self.delay_seconds = behaviour, delay_seconds
        self.hits: list[Hit] = []
        self.times: list[float] = []
        self.served: Counter[tuple[str, str, bool]] = Counter()
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self.release = threading.Event()
        """Ends the hangs."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client_address: None  # a killed client is no news
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        hit = self._note(json.loads(handler.rfile.read(int(handler.headers["content-length"]))), handler)
        try:
            time.sleep(self.delay_seconds)
            fault = self.behaviour(hit)
            getattr(self, f"_{fault}" if fault else "_answer")(handler, hit)
        except OSError:
            handler.close_connection = True
        finally:
            with self._lock:
                self._at_once -= 1

    def _note(self, body: dict[str, Any], handler: BaseHTTPRequestHandler) -> Hit:
        content = body["messages"][0]["content"]
        picture = next((part["image_url"]["url"] for part in content if part["type"] == "image_url"), "")
        text = next(part["text"] for part in content if part["type"] == "text")
        digest = hashlib.sha256(picture.encode()).hexdigest() if picture else ""
        again = len(body["messages"]) > 1
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            number = sum((one.picture, one.text, one.again) == (digest, text, again) for one in self.hits)
            wanted = body.get("response_format", {}).get("type", "")
            hit = Hit(
                digest, text, again, number, len(self.hits), wanted, body, handler.headers.get("authorization", "")
            )
            self.hits.append(hit)
            self.times.append(time.monotonic())
        return hit

    def _send(self, handler: BaseHTTPRequestHandler, status: int, content: str, **headers: str) -> None:
        data = content.encode()
        handler.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _reply(self, handler: BaseHTTPRequestHandler, hit: Hit, text: str, finish: str = "stop", **extra: Any) -> None:
        message = {"role": "assistant", "content": text, **extra}
        value = {
            "id": "x",
            "object": "chat.completion",
            "model": "hostile-1",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        self._send(handler, 200, json.dumps(value))
        with self._lock:
            self.served[hit.picture, hit.text, hit.again] += 1

    def _answer(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        structured = '"pairs"' in hit.text
        text = pairs_about(hit.picture) if structured else f"There is a thing called {hit.picture[:6]} here."
        self._reply(handler, hit, text)

    def _prose(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        fenced = f"Sure, here you are:\n```json\n{pairs_about(hit.picture)[:-2]},]}}\n```\nAnything else?"
        self._reply(handler, hit, fenced)

    def _cut_json(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, pairs_about(hit.picture)[:-20], "length")

    def _cut_text(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "There is a thing cal", "length")

    def _small_talk(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "What a nice picture!")

    def _common_knowledge(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "Grass is green.")

    def _one_known(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        known = {"question": "What colour is grass?", "answer": "Grass is green."}
        seen = {"question": "What is here?", "answer": f"A thing called {hit.picture[:6]}."}
        self._reply(handler, hit, json.dumps({"pairs": [known, seen]}))

    def _no_usage(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        message = {"role": "assistant", "content": pairs_about(hit.picture)}
        self._send(handler, 200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))

    def _wrong_schema(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, '{"pairs": [{"q": "What?", "a": "This."}]}')

    def _refusal_text(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "I'm sorry, but I can't help with that.")

    def _refusal_field(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "", refusal="I will not.")

    def _echo_key(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        pairs = [{"question": "What is written?", "answer": f"It reads {hit.authorization} in red."}]
        self._reply(handler, hit, json.dumps({"pairs": pairs}))

    def _error_with_key(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, json.dumps({"error": {"message": f"bad \x1b[31m {hit.authorization}"}}))

    def _limited(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 429, '{"error": {"message": "slow down"}}', retry_after="0.4")

    def _limited_long(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 429, '{"error": {"message": "slow down"}}', retry_after="7200")

    def _no_quota(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 429, '{"error": {"message": "pay first", "code": "insufficient_quota"}}')

    def _error_500(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 500, "<html>oops</html>")

    def _error_400(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, '{"error": {"message": "I do not like this picture"}}')

    def _no_format(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, '{"error": {"message": "response_format is not supported"}}')

    def _no_max_tokens(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, '{"error": {"message": "use max_completion_tokens instead"}}')

    def _error_401(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 401, json.dumps({"error": {"message": f"bad key {hit.authorization}"}}))

    def _redirect(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 307, "", location="http://127.0.0.1:9/v1/chat/completions")

    def _hang(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self.release.wait(60)

    def _drip(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        """Send a byte now and then, so that no single read ever times out."""
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        while not self.release.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def _drop(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        handler.close_connection = True

    def _half_body(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True

    def _not_json(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 200, '{"choices": [{"mess')

    def _no_choices(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 200, '{"choices": null}')

    def _moderated_403(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        error = {
            "code": 403,
            "message": "Input was flagged",
            "metadata": {"flagged_input": ""},
        }
        self._send(handler, 403, json.dumps({"error": error}))

    def _moderated_400(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, '{"error": {"message": "The response was filtered", "code": "content_filter"}}')

    def _inspected(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, '{"error": {"message": "Input data may be wrong", "code": "data_inspection_failed"}}')

    def _error_403(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 403, '{"error": {"message": "not for you"}}')

    def _choice_error(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        choice = {"message": {"content": '{"pai'}, "finish_reason": "error", "error": {"message": "upstream is gone"}}
        self._send(handler, 200, json.dumps({"choices": [choice]}))

    def _no_money(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        error = {"message": "Your account is suspended", "type": "exceeded_current_quota_error"}
        self._send(handler, 429, json.dumps({"error": error}))

    def _gemini_limited(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        error = {"message": "You exceeded your current quota, see billing", "details": [{"retryDelay": "0.4s"}]}
        self._send(handler, 429, json.dumps([{"error": error}]))

    def _web_page(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 200, "<!doctype html><html>Welcome</html>")

    def _all_thought(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "", "length", reasoning_content="Let me see, " * 20)

    def _in_thoughts(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, "", reasoning_content=pairs_about(hit.picture))

    def _open_thought(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, f"Hm, a thing.</think>\n\nThere is a thing called {hit.picture[:6]} here.")

    def _more_keys(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._reply(handler, hit, pairs_about(hit.picture).replace('{"question"', '{"type": "x", "question"'))

    def _stream_only(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        self._send(handler, 400, '{"error": {"message": "This model only support stream mode"}}')

    def _streamed(self, handler: BaseHTTPRequestHandler, hit: Hit) -> None:
        text = pairs_about(hit.picture)
        deltas = [{"role": "assistant"}, {"reasoning_content": "Hm."}, {"content": text[:9]}, {"content": text[9:]}]
        chunks: list[Any] = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 20}})
        lines = [": keep alive", *(f"data: {json.dumps(chunk)}" for chunk in chunks), "data: [DONE]"]
        self._send(handler, 200, "\n\n".join(lines), content_type="text/event-stream")
        with self._lock:
            self.served[hit.picture, hit.text, hit.again] += 1
