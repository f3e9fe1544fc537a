"""Runs chat templates in a separate process, with limits of time, memory and output.

A template comes with a stranger's checkpoint. Transformers' sandbox keeps it from doing harm, but
not from going on for ever or from taking all memory, also inside a single C function
(``10**10**8``), where nothing in the same process can stop it.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat_template_process import Lost, Silent, Worker
from nemo_minitron.data.compressed_files import note
from nemo_minitron.data.document_types import tools_of
from nemo_minitron.security.plain_text import plain

SECONDS = 20.0
"""How long a template may take for one rendering of a conversation."""
MEMORY, MEMORY_PER_BYTE = 512 * 2**20, 16
"""Bytes that it may take, and those for each byte of the conversation, which is there as JSON, as objects, as
text and as JSON again."""
OUTPUT, OUTPUT_PER_CHARACTER = 1_000_000, 100
"""Characters that it may write, and those for each character of the conversation."""
_CODING = ("utf-8", "surrogatepass")
"""Of the lines; texts may hold halves of surrogate pairs."""
_TOOLS = re.compile(r"\btools\b")
_UNREAD = "holds a chat template that does not read tools: those of the data are not in the text"


class ChatTemplate:
    """A tokenizer's chat template.

    Its process starts with the first conversation; ``close`` ends it. Where somebody else ends it,
    another one gets the same conversation once more.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        """Stores the settings; the process starts with the first text.

        Args:
            tokenizer: a Hugging Face tokenizer that has a template.
            where: which data the conversations are from, for messages.
        """
        self._tokenizer, self._where = tokenizer, where
        self._worker: Worker | None = None

    def render(
        self, conversations: Sequence[list[dict[str, Any]]], answers: bool = False
    ) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """The texts of conversations, as ``tokenizer.apply_chat_template`` makes them.

        The process gets all conversations at once and renders while the caller uses a text.

        Args:
            conversations: messages, and their tools where they are of ``Conversation``.
            answers: whether to find out where the assistant speaks.

        Yields:
            The text, and with ``answers`` where in it each answer begins and ends.

        Raises:
            ValueError: the template takes too long or too much memory, writes too much, refuses a
                conversation, or is wrong.
            RuntimeError: the process does not start.
        """
        sent = [_request(messages, answers) for messages in conversations]
        if any(map(tools_of, conversations)) and not _reads_tools(self._tokenizer.chat_template):
            note(Path(_source(self._tokenizer)), self._where, _UNREAD)
        done = False
        try:
            if self._worker is not None and self._worker.process is not None:
                self._worker.send(sent)
            for number, messages in enumerate(conversations):
                reply = self._reply(sent[number:])
                if "failure" in reply:
                    raise ValueError(self._complaint(reply, sent[number], messages))
                yield reply["text"], [(begin, end) for begin, end in reply["answers"]]
            done = True
        finally:
            if (
                not done
            ):  # answers that are still to come would be taken for those to the next conversations
                self.close()

    def _settings(self) -> dict[str, Any]:
        return {
            "template": self._tokenizer.chat_template,
            "special_tokens": self._tokenizer.special_tokens_map,
            "path": _import_path(self._tokenizer),
            "seconds": 1.25 * SECONDS,  # the owner's limit comes first, unless it is gone or busy
            "memory": MEMORY,
            "memory_per_byte": MEMORY_PER_BYTE,
            "output": OUTPUT,
            "output_per_character": OUTPUT_PER_CHARACTER,
        }

    def _complaint(self, reply: dict[str, Any], line: bytes, messages: list[dict[str, Any]]) -> str:
        first = plain(messages[0].get("content") or "", 60) if messages else ""
        missing = any(message.get("content") is None for message in messages)
        hint = " (a message of it has no content)" if missing and reply["failure"] != "null" else ""
        place = getattr(messages, "origin", "") or self._where
        return (
            f"{place}: {_source(self._tokenizer)}: the chat template {_said(reply, line)}; "
            f'the conversation begins with "{first}"{hint}'
        )

    def close(self) -> None:
        """Ends the process, if there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _reply(self, waiting: list[bytes]) -> dict[str, Any]:
        """The reply to the oldest conversation without one."""
        reply: dict[str, Any] = {}
        for _try in range(2):
            try:
                if self._worker is None or self._worker.process is None:
                    self._worker = Worker(self._settings())
                    self._worker.send(waiting)
                reply = json.loads(self._worker.line(SECONDS).decode(*_CODING))
                break
            except Lost as error:
                # its alarm may come first, where this process is not given the processor in time
                failure = {"failure": "lost", "message": str(error)}
                reply = {"failure": "silent"} if error.alarmed else failure
                self.close()
            except Silent:
                reply = {"failure": "silent"}
                break
        return reply


def _request(messages: list[dict[str, Any]], answers: bool) -> bytes:
    request: dict[str, Any] = {"messages": messages, "answers": answers}
    if tools := list(tools_of(messages)):
        request["tools"] = tools
    # what is no JSON (a time, an image) a template sees as transformers shows it: by the name of
    # its type
    text = json.dumps(
        request, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>"
    )
    return text.encode(*_CODING) + b"\n"


def _reads_tools(template: str | dict[str, str]) -> bool:
    """Whether a template, or one of several, names the variable; transformers is silent where none does."""
    texts = template.values() if isinstance(template, dict) else [template]
    return any(_TOOLS.search(text) for text in texts)


def _import_path(tokenizer: Any) -> list[str]:
    """Where this process imports from, without the working folder and the tokenizer's."""
    folder = Path(tokenizer.name_or_path).resolve()
    return [
        path for path in sys.path if Path(path).is_absolute() and Path(path).resolve() != folder
    ]


def _source(tokenizer: Any) -> str:
    """The file that the template comes from."""
    if not tokenizer.name_or_path:
        return "the tokenizer"
    folder = Path(tokenizer.name_or_path)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and (path.suffix == ".jinja" or b'"chat_template"' in path.read_bytes()):
            return str(path)
    return str(folder)


def _said(reply: dict[str, Any], line: bytes) -> str:
    """Says in words what the template did wrong, from its reply."""
    kind, message = reply["failure"], plain(reply.get("message", ""), 300)
    place = f" in line {reply['line']}" if reply.get("line") else ""
    characters = len(line.decode(*_CODING)) - 1
    most = OUTPUT + OUTPUT_PER_CHARACTER * characters
    messages = {
        "silent": f"does not end within {SECONDS:g} s",
        "memory": f"takes more than {(MEMORY + MEMORY_PER_BYTE * len(line)) // 2**20} MiB of memory",
        "long": f"writes more than {most} characters for a conversation of {characters}",
        "lost": f"ends the process it runs in, twice: {message}",
        "rewrites": "rewrites what was said before, so that the assistant's words cannot be told apart; "
        "use data.train.learn_from=all",
        "begins": "cannot tell the answer from the rest, for the conversation begins with the assistant; use "
        "data.train.learn_from=all, or leave such rows out",
        "null": "writes the word None for a message whose content is null; use a template that writes tool "
        "calls, or leave such rows out",
        "refusal": f"refuses it{place}: {message}",
        "syntax": f"is not valid{place}: {message}",
        "undefined": f"uses what is not defined{place}: {message}",
        "forbidden": f"does what it may not{place}: {message}",
    }
    return messages.get(kind, f"fails{place}: {kind}: {message}")
