"""The chatbots of examples/chatbots: quotations, follow-ups, models behind OpenAI's API, and the page in a browser."""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gte_rag import GTEEncoder

pytestmark = pytest.mark.usefixtures("bundled_once")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "chatbots"
TERMINAL = ("langchain_chatbot", "langgraph_chatbot", "llama_index_chatbot")
FIRST, FOLLOW_UP, OTHER = (
    "How often does a sourdough starter need feeding?",
    "And in the fridge?",
    "Was bedeutet ECONNREFUSED?",
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody at the terminal, nothing in a pipe


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server with OpenAI's chat API on loopback: its address, and the requests it gets."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            system = str(body["messages"][0]["content"])
            rewriting = "Rewrite" in system or "rephrase" in json.dumps(body).lower()
            text = "How often is a sourdough starter fed in the fridge?" if rewriting else "Once a week [1]."
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            message = {"role": "assistant", "content": text}
            whole = {"id": "1", "created": 1, "model": "m", "object": "chat.completion"}
            if body.get("stream"):
                chunk = {**whole, "object": "chat.completion.chunk", "choices": [{**choice, "delta": message}]}
                data, kind = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode(), "text/event-stream"
            else:
                data = json.dumps({**whole, "choices": [{**choice, "message": message}]}).encode()
                kind = "application/json"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", requests
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.mark.parametrize("name", TERMINAL)
def test_terminal_chatbot_quotes_says_so_and_understands_a_follow_up(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    first, follow_up, other = capsys.readouterr().out.split("\n> ")[1:]
    for answer, held in ((first, "sourdough"), (follow_up, "fridge"), (other, "ECONNREFUSED")):
        assert "quoted, not generated" in answer
        assert held in answer.split("quoted, not generated", 1)[1]
    assert f"searched: {FIRST} {FOLLOW_UP}" in follow_up
    assert "searched:" not in other


def test_terminal_chatbot_answers_the_questions_of_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["langchain_chatbot"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nWas bedeutet ECONNREFUSED?\n"))
    runpy.run_path(str(FOLDER / "langchain_chatbot.py"), run_name="__main__")
    (answer,) = capsys.readouterr().out.split("\n> ")[1:]
    assert answer.startswith("Was bedeutet ECONNREFUSED?")
    assert "quoted, not generated" in answer


@pytest.mark.parametrize("name", [*TERMINAL, "web_chatbot"])
@pytest.mark.parametrize("option", ["--docs", "--embedding-model"])
def test_chatbots_say_what_is_not_there(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, option, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert str(tmp_path / "nowhere") in said
    assert option in said


@pytest.mark.parametrize("name", TERMINAL)
def test_terminal_chatbot_asks_a_model_and_has_it_rewrite_a_follow_up(
    name: str,
    server: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, requests = server
    monkeypatch.setattr("sys.argv", [name, "--model", "any-model", "--base-url", address])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert output.count("Once a week [1].") == 3
    assert "searched: How often is a sourdough starter fed in the fridge?" in output
    assert len(requests) == 5  # three answers, two questions rewritten
    assert FIRST in json.dumps(requests[-1], ensure_ascii=False)  # the conversation is remembered


def searcher(scores: Mapping[str, Mapping[str, float]]) -> Callable[[str], Mapping[str, float]]:
    return scores.__getitem__


def test_a_question_is_a_follow_up_if_one_passage_answers_it_and_what_went_before() -> None:
    conversation = importlib.import_module("conversation")
    both = {"p": {"a": 1.0, "b": 0.1}, "q": {"a": 0.7, "b": 1.0}, "p q": {"a": 1.5, "b": 1.0}}
    assert conversation.standalone(["p", "q"], searcher(both)) == "p q"
    changed = {**both, "q": {"a": 0.2, "b": 1.0}}
    assert conversation.standalone(["p", "q"], searcher(changed)) == "q"
    unrelated = {**both, "p": {"a": 0.2, "c": 1.0}}
    assert conversation.standalone(["p", "q"], searcher(unrelated)) == "q"
    assert conversation.standalone(["p", "q"], lambda query: {}) == "q"


def test_model_names_say_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = importlib.import_module("conversation").Endpoint
    assert endpoint.named("ollama:qwen2.5:7b").model == "qwen2.5:7b"
    assert endpoint.named("ollama:x").base_url == "http://127.0.0.1:11434/v1"
    assert endpoint.named("x:7b", "http://127.0.0.1:1/v1").model == "x:7b"
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        endpoint.named("openai:x")
    with pytest.raises(ValueError, match="'x'; give ollama:NAME"):
        endpoint.named("x")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    assert "secret-key" not in repr(endpoint.named("openai:x"))
    assert endpoint.named("ollama:x").api_key != "secret-key"


def test_documents_of_a_page_are_found_there_only_until_it_is_closed(encoder: GTEEncoder, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    web = importlib.import_module("web_chatbot")
    conversation = importlib.import_module("conversation")
    bot = web.Chatbot(encoder, [conversation.Passage("d", "Bread rises.", "demo")], None)
    (tmp_path / "boiler.md").write_text("# Boiler\n\nThe boiler shows XK77 <b>when</b> cold.", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\x00")
    said = bot.add([tmp_path / "boiler.md", tmp_path / "bad.txt"], "one")
    assert "1 passages of 1 documents" in said and "bad.txt" in said  # noqa: PT018
    (text, panel), *_ = bot.answer("XK77", [], "one")
    assert "XK77" in text
    assert "<b>" not in panel and "&lt;b&gt;" in panel and "<mark" in panel  # noqa: PT018
    assert "XK77" not in "".join(hit.text for hit in bot.search("XK77", "two"))
    bot.forget("one")
    assert "XK77" not in "".join(hit.text for hit in bot.search("XK77", "one"))


def test_web_chatbot_streams_a_models_answer_from_passages(
    encoder: GTEEncoder, server: tuple[str, list[dict[str, Any]]]
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    address, requests = server
    web = importlib.import_module("web_chatbot")
    conversation = importlib.import_module("conversation")
    model = web.ChatModel(conversation.Endpoint.named("any", address))
    bot = web.Chatbot(encoder, [conversation.Passage("d", "Sourdough starter is fed.", "demo")], model)
    history = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": "Daily."}]
    *_, (text, panel) = bot.answer(FOLLOW_UP, history, "one")
    assert text == "Once a week [1]."
    assert "Searched: How often is a sourdough starter fed in the fridge?" in panel
    assert "Sourdough starter is fed." in json.dumps(requests[-1]["messages"])


def test_web_chatbot_says_that_the_model_cannot_be_reached(encoder: GTEEncoder) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    web = importlib.import_module("web_chatbot")
    conversation = importlib.import_module("conversation")
    with socket.socket() as probe:  # nothing will listen on its port
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        model = web.ChatModel(conversation.Endpoint.named("any", address))
        bot = web.Chatbot(encoder, [conversation.Passage("d", "Sourdough starter is fed.", "demo")], model)
        with pytest.raises(gradio.Error, match="chat model gave no answer"):
            list(bot.answer(FIRST, [], "one"))


def test_page_in_a_browser_answers_shows_scores_and_takes_documents(encoder: GTEEncoder, tmp_path: Path) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium: install Debian's package, or set CHROMIUM to a binary")
    web = importlib.import_module("web_chatbot")
    conversation = importlib.import_module("conversation")
    address = web.launch(web.Chatbot(encoder, conversation.passages_of(None, encoder), None))
    (tmp_path / "boiler.md").write_text("The boiler shows XK77Q when its <i>pump</i> is stuck.", encoding="utf-8")
    try:
        assert address.startswith("http://127.0.0.1:")
        with playwright.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
            page = browser.new_page(viewport={"width": 1200, "height": 860})
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)

            def ask(question: str, held: str) -> str:
                page.fill("#question textarea", question)
                page.press("#question textarea", "Enter")
                page.locator(".passage mark", has_text=held).first.wait_for()
                return str(page.locator(".passage").first.inner_text())

            first = ask(FIRST, "sourdough")
            for score in ("score", "dense", "sparse"):
                assert score in first
            page.locator("#chat").get_by_text("quoted, not generated").first.wait_for()
            ask(FOLLOW_UP, "fridge")
            assert page.locator(".searched").inner_text() == f"Searched: {FIRST} {FOLLOW_UP}"
            if screenshot := os.environ.get("GTE_RAG_SCREENSHOT"):
                page.locator("#chat").get_by_text("quoted, not generated").nth(1).wait_for()
                page.screenshot(path=screenshot)
            page.set_input_files("#upload input[type=file]", tmp_path / "boiler.md")
            page.locator("#added", has_text="1 documents added").wait_for()
            assert "<i>pump</i>" in ask("XK77Q", "XK77Q")
            assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
            browser.close()
    finally:
        gradio.close_all()
