"""A chatbot over your documents as a web page, on this machine only.

    python examples/chatbots/web_chatbot.py                            the bundled demo texts; add documents on the page
    python examples/chatbots/web_chatbot.py --docs ~/notes             your own text and Markdown files
    python examples/chatbots/web_chatbot.py --model ollama:llama3.2    any chat model; also openai:NAME, or
                                                                       NAME --base-url URL

Beside each answer stand the passages it rests on: dense, sparse and final score, and the words that question and passage share.
Documents added on a page are searched from that page only, and forgotten when it is closed. The server listens on 127.0.0.1,
and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import html
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import chromadb
from chromadb.config import Settings

from conversation import (
    CITE,
    CONDENSE,
    INSTRUCTION,
    REMEMBERED_MESSAGES,
    Endpoint,
    Passage,
    load_encoder,
    model_errors,
    numbered,
    parser,
    passages_of,
    quote,
    read_passages,
    standalone,
)
from gte_rag import GTEEncoder, Hit, HybridCollection, HybridRetriever
from gte_rag.explanation import explain_hit, marked_html

try:
    import gradio as gr
except ImportError:
    sys.exit("the web page needs more packages: pip install 'gte-rag[examples]'")

EVERYONE = "everyone"  # marks the passages that were there from the start
CSS = """
.passage { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .7rem .9rem; margin-bottom: .7rem }
.passage h4 { margin: 0 0 .35rem; font-size: .95rem; overflow-wrap: anywhere }
.passage p { margin: .45rem 0 0; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext }
.passage span { font-size: .8rem; padding: .1rem .5rem; border-radius: 1rem; margin-right: .3rem; white-space: nowrap;
  background: var(--background-fill-secondary); font-variant-numeric: tabular-nums; display: inline-block }
.passage span.final { background: var(--color-accent); color: white; font-weight: 600 }
.passage mark { border-radius: .2em; padding: 0 .1em }
.searched { opacity: .7; font-size: .9rem; margin-bottom: .6rem }
"""


class ChatModel:
    """A chat model behind OpenAI's API."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Prepare the client; nothing is sent yet."""
        try:
            from openai import OpenAI
        except ImportError:
            sys.exit("--model needs more packages: pip install 'gte-rag[examples]'")
        self._model = endpoint.model
        self._client = OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=1, timeout=120)

    def standalone(self, history: Sequence[dict[str, str]], question: str) -> str:
        """Return a follow-up question as one that can be understood alone."""
        if not history:
            return question
        messages: Any = [{"role": "system", "content": CONDENSE}, *history, {"role": "user", "content": question}]
        reply = self._client.chat.completions.create(model=self._model, messages=messages)
        return (reply.choices[0].message.content or "").strip() or question

    def answer(self, history: Sequence[dict[str, str]], question: str, texts: Sequence[str]) -> Iterator[str]:
        """Yield the answer as far as it has come."""
        messages: Any = [
            {"role": "system", "content": f"{INSTRUCTION} {CITE}"},
            *history,
            {"role": "user", "content": f"Passages:\n{numbered(texts)}\n\nQuestion: {question}"},
        ]
        text = ""
        stream: Any = self._client.chat.completions.create(model=self._model, messages=messages, stream=True)
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                text += chunk.choices[0].delta.content
                yield text


class Chatbot:
    """Answers questions from one collection; pages share it and have documents of their own in it."""

    def __init__(self, encoder: GTEEncoder, passages: Sequence[Passage], model: ChatModel | None) -> None:
        """Index the passages that everyone may find."""
        self.encoder = encoder
        self.model = model
        client = chromadb.EphemeralClient(Settings(anonymized_telemetry=False))
        self._collection = HybridCollection(client, f"chatbot-{uuid4().hex}", encoder=encoder)
        self._retriever = HybridRetriever(self._collection, k=4)
        self._put(passages, EVERYONE)

    def add(self, files: Sequence[Path], page: str) -> str:
        """Add documents for one page, and say what was added."""
        passages = list(read_passages(files, self.encoder))
        self._put(passages, page)
        names = {passage.id.rpartition("#")[0] for passage in passages}
        unread = [file.name for file in files if str(file.parent.resolve() / file.name) not in names]
        said = f"{len(passages)} passages of {len(names)} documents added."
        return said + (f" Not readable as UTF-8 text, or empty: {', '.join(unread)}." if unread else "")

    def forget(self, page: str) -> None:
        """Remove the documents of a page."""
        ids = self._collection.matching_ids({"page": page}, None)
        if ids:
            self._collection.delete(ids)

    def search(self, query: str, page: str, k: int = 4) -> list[Hit]:
        """Return the best passages for a page."""
        return self._retriever.search(query, k=k, where={"page": {"$in": [EVERYONE, page]}})

    def answer(self, question: str, history: Sequence[dict[str, str]], page: str) -> Iterator[tuple[str, str]]:
        """Yield answer and passages, both as they are shown, as far as they have come."""
        recent = history[-REMEMBERED_MESSAGES:]
        try:
            if self.model is not None:
                query = self.model.standalone(recent, question)
            else:
                asked = [message["content"] for message in history if message["role"] == "user"]
                query = standalone(
                    [*asked, question], lambda text: {hit.id: hit.score for hit in self.search(text, page, k=50)}
                )
            hits = self.search(query, page)
            panel = self._panel(question, query, hits)
            texts = [hit.text for hit in hits]
            if self.model is None:
                yield quote(self.encoder, query, texts), panel
                return
            yield "…", panel
            for text in self.model.answer(recent, question, texts):
                yield text, panel
        except model_errors() as error:
            raise gr.Error(f"The chat model gave no answer: {error}") from error

    def _put(self, passages: Sequence[Passage], page: str) -> None:
        self._collection.upsert(
            [f"{page}:{passage.id}" for passage in passages],
            [passage.text for passage in passages],
            metadatas=[{"source": passage.source, "page": page} for passage in passages],
        )

    def _panel(self, question: str, query: str, hits: Sequence[Hit]) -> str:
        """Return the passages as HTML; whatever comes from documents or the user is escaped."""
        searched = f'<div class="searched">Searched: {html.escape(query)}</div>' if query != question else ""
        return searched + "".join(
            f'<div class="passage"><h4>[{number}] {html.escape(str(hit.metadata["source"]))}</h4>'
            f'<span class="final">score {hit.score:.3f}</span><span>dense {hit.dense_score:.3f}</span>'
            f"<span>sparse {hit.sparse_score:.3f}</span>"
            f"<p>{marked_html(hit.text, explain_hit(self.encoder, query, hit).text_marks)}</p></div>"
            for number, hit in enumerate(hits, start=1)
        )


def plain(history: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return Gradio's messages as role and text; a message there is a list of parts."""
    return [
        {
            "role": message["role"],
            "content": content
            if isinstance(content := message["content"], str)
            else "".join(part.get("text", "") for part in content),
        }
        for message in history
    ]


def page(bot: Chatbot) -> gr.Blocks:
    """Return the page."""

    def respond(message: str, history: list[dict[str, Any]], request: gr.Request) -> Iterator[tuple[str, str]]:
        yield from bot.answer(message, plain(history), str(request.session_hash))

    def add(files: list[str] | None, request: gr.Request) -> str:
        return bot.add([Path(file) for file in files or []], str(request.session_hash))

    def forget(request: gr.Request) -> None:
        bot.forget(str(request.session_hash))

    with gr.Blocks(
        title="gte-rag chatbot", fill_height=True, analytics_enabled=False, delete_cache=(600, 600)
    ) as blocks:
        gr.Markdown(
            "### Ask your documents\n"
            + (
                "Answers are quoted; no chat model is set."
                if bot.model is None
                else "Answers are written by a chat model."
            )
        )
        passages = gr.HTML("<div class='searched'>Ask a question to see what it is answered from.</div>", render=False)
        with gr.Row():
            with gr.Column(scale=5):
                gr.ChatInterface(
                    respond,
                    chatbot=gr.Chatbot(
                        height=400, show_label=False, render_markdown=False, elem_id="chat", buttons=["copy"]
                    ),
                    textbox=gr.Textbox(
                        placeholder="Ask a question, in any language", show_label=False, elem_id="question"
                    ),
                    additional_outputs=[passages],
                    api_visibility="private",
                    analytics_enabled=False,
                    flagging_mode="never",
                )
                upload = gr.File(
                    label="Add documents: UTF-8 text or Markdown",
                    file_count="multiple",
                    file_types=[".txt", ".md", ".markdown", ".text", ".rst"],
                    height=150,
                    elem_id="upload",
                )
                added = gr.Markdown(elem_id="added")
            with gr.Column(scale=5):
                gr.Markdown("#### Passages")
                passages.render()  # type: ignore[no-untyped-call]
        upload.upload(add, upload, added, api_visibility="private")
        blocks.unload(forget)
    built: gr.Blocks = blocks
    return built


def launch(bot: Chatbot, *, port: int | None = None) -> str:
    """Serve the page on 127.0.0.1 from a thread and return its address."""
    fonts = ["system-ui", "sans-serif"]  # of the reader's machine: no web fonts
    _, url, _ = (
        page(bot)
        .queue()
        .launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            enable_monitoring=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size="20mb",
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"], primary_hue="amber"),
            css=CSS,
        )
    )
    return str(url)


def main() -> None:
    """Index the passages and serve the page until interrupted."""
    options = parser("A chatbot over your documents, as a web page.")
    options.add_argument("--port", type=int, help="port on 127.0.0.1; default: the first free one from 7860")
    arguments = options.parse_args()
    try:
        model = ChatModel(Endpoint.named(arguments.model, arguments.base_url)) if arguments.model else None
    except ValueError as error:
        sys.exit(str(error))
    encoder = load_encoder(arguments.embedding_model)
    bot = Chatbot(encoder, passages_of(arguments.docs, encoder), model)
    print("Open the address below in a browser; Ctrl+C ends the chatbot.", flush=True)
    print(launch(bot, port=arguments.port), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")


if __name__ == "__main__":
    main()
