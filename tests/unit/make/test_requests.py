"""Keys and bodies of requests."""

from __future__ import annotations

from dataclasses import replace

from dianjing.make.pictures import Picture
from dianjing.make.prompts import Prompt
from dianjing.make.replies import SCHEMA
from dianjing.make.requests import Dialect, Parameters, Request, blind_request, body, plan

PICTURE = Picture(name="a.png", sha256="11", dhash=0, size=(10, 10))
PROMPT = Prompt(name="p", kind="k", language="en", reply="pairs", texts=("Ask.",), sha256="22")
PARAMETERS = Parameters(model="m")


def only(picture: Picture = PICTURE, prompt: Prompt = PROMPT, parameters: Parameters = PARAMETERS) -> Request:
    (request,) = plan([picture], [prompt], parameters)
    return request


def test_the_key_is_of_all_that_decides_the_answer_and_of_nothing_else() -> None:
    same = [
        only(replace(PICTURE, name="b.png")),
        only(prompt=replace(PROMPT, name="q", kind="other", sha256="33")),
    ]
    other = [
        only(replace(PICTURE, sha256="12")),
        only(prompt=replace(PROMPT, texts=("Ask!",))),
        only(prompt=replace(PROMPT, reply="text")),
        only(parameters=replace(PARAMETERS, model="n")),
        only(parameters=replace(PARAMETERS, temperature=0.0)),
        only(parameters=replace(PARAMETERS, max_tokens=7)),
        only(parameters=replace(PARAMETERS, long_edge=99)),
        blind_request("Ask.", "en", PARAMETERS),
        blind_request("Ask.", "zh", PARAMETERS),
    ]
    assert {one.key for one in same} == {only().key}
    assert len({one.key for one in [*other, only()]}) == len(other) + 1


def test_bodies_of_the_three_ways_to_ask_for_json() -> None:
    strict = body(only(), "data:x", PARAMETERS, Dialect())
    assert strict == {
        "model": "m",
        "max_tokens": 1024,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:x"}},
                    {"type": "text", "text": "Ask."},
                ],
            }
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "question_answer_pairs", "strict": True, "schema": SCHEMA},
        },
    }
    loose = body(only(), "data:x", PARAMETERS, Dialect(rung="json_object"))
    assert loose["response_format"] == {"type": "json_object"}
    plain = body(only(), "data:x", PARAMETERS, Dialect(rung="text", token_limit="max_completion_tokens"))
    assert plain.keys() == {"model", "messages", "max_completion_tokens"}
    text = only(prompt=replace(PROMPT, reply="text"), parameters=replace(PARAMETERS, temperature=0.0))
    assert "response_format" not in body(text, None, PARAMETERS, Dialect())
    assert body(text, None, replace(PARAMETERS, temperature=0.0), Dialect())["temperature"] == 0.0


def test_a_rejected_reply_is_shown_with_its_fault() -> None:
    messages = body(only(), "data:x", PARAMETERS, Dialect(), ("{oops", "not JSON"))["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "{oops"
    assert "not JSON" in messages[2]["content"]
    assert len(body(only(), "data:x", PARAMETERS, Dialect(), ("", "the reply is empty"))["messages"]) == 1


def walk(schema: dict) -> list[dict]:
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return [schema, *(part for one in inner for part in walk(one))]


def test_the_schema_is_of_the_subset_that_all_servers_know() -> None:
    for part in walk(SCHEMA):
        assert part.keys() <= {"type", "properties", "required", "additionalProperties", "items"}
        if part["type"] == "object":
            assert part["required"] == list(part["properties"])
            assert part["additionalProperties"] is False
