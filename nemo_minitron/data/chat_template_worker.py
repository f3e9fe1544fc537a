"""A process that runs a tokenizer's chat template: conversations in, texts out, a line of JSON each.

``nemo_minitron.data.chat_template`` starts this file by its path. It imports nothing of this
package and no torch, so that it starts within a second. The first line it reads holds its settings;
it answers with an empty line once it is ready. An empty line later on says that it is alive.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1
_LONGEST_MESSAGE = 4000
_NO_MEMORY = b'{"failure": "memory"}\n'
"""A reply that is there already: there may be no room left to make one."""
_LEFT_TO_THE_OWNER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class TooLong(Exception):
    """The template's output exceeds its limit."""


def main() -> None:
    """Answers until its input ends; the input ends with the owner."""
    _guard()
    replies = os.dup(1)
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.buffer.readline())
    render = _renderer(settings)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for forbidden in (
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_NPROC,
    ):  # it writes no file, starts no process
        resource.setrlimit(forbidden, (0, 0))
    before = _address_space()
    os.write(replies, b"\n")
    for line in sys.stdin.buffer:
        most = settings["memory"] + settings["memory_per_byte"] * len(line)
        with _memory(None if before is None else before + most):
            reply = _reply(line, render, lambda: os.write(replies, b"\n"))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply)


def _guard() -> None:
    """Signals to the whole group are the owner's; the alarm ends this process even inside a C function."""
    for number in _LEFT_TO_THE_OWNER:
        signal.signal(number, signal.SIG_IGN)
    # both may be otherwise in the owner, and are inherited
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _renderer(settings: dict[str, Any]) -> Callable[..., str]:
    """A function that renders messages like the tokenizer's ``apply_chat_template``, within the limits."""
    sys.path[:] = settings["path"]
    gc.disable()  # a tenth of the start: an import leaves no garbage
    import transformers

    gc.freeze()
    gc.enable()

    class Speaker(transformers.PreTrainedTokenizerBase):
        """The part of a tokenizer that its chat template sees."""

        special_tokens_map = settings["special_tokens"]

        def __init__(self) -> None:
            self.chat_template = settings["template"]

    speaker = Speaker()

    def render(messages: list[dict[str, Any]], characters: int, **options: Any) -> str:
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        text = str(speaker.apply_chat_template(messages, tokenize=False, **options))
        if len(text) > settings["output"] + settings["output_per_character"] * characters:
            raise TooLong
        return text

    return render


def _address_space() -> int | None:
    """Bytes of address space in use, where the system tells and limits them."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def _memory(most: int | None) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if most is not None:
        limits = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reply(line: bytes, render: Callable[..., str], alive: Callable[[], object]) -> bytes:
    try:
        sent = line.decode("utf-8", "surrogatepass").removesuffix("\n")
        return _bytes(_rendered(json.loads(sent), len(sent), render, alive))
    except TooLong:
        return _bytes({"failure": "long"})
    except MemoryError:
        return _NO_MEMORY
    except Exception as error:
        try:  # its text may be of any length
            return _bytes(
                {"failure": _kind(error), "message": _message(error), "line": _line(error)}
            )
        except MemoryError:
            return _NO_MEMORY


def _rendered(
    request: dict[str, Any],
    characters: int,
    render: Callable[..., str],
    alive: Callable[[], object],
) -> dict[str, Any]:
    """The text of a conversation, and where in it the assistant speaks, the end-of-turn mark included.

    An answer begins where the conversation so far ends that asks for one, and ends where it is in.
    """
    messages = request["messages"]
    render = functools.partial(render, characters=characters, tools=request.get("tools"))
    text = render(messages)
    if "None" in text and any(message.get("content") is None for message in messages):
        silent = [m if m.get("content") is not None else m | {"content": ""} for m in messages]
        alive()
        if text.count("None") > render(silent).count("None"):
            return {"failure": "null"}
    spans = []
    for number, message in enumerate(messages if request["answers"] else []):
        if message["role"] != "assistant":
            continue
        alive()  # the limit is for one rendering, and a long conversation has many
        try:
            asked = render(messages[:number], add_generation_prompt=True)
        except (MemoryError, TooLong):
            raise
        except Exception:
            if number > 0:
                raise
            return {"failure": "begins"}
        alive()
        said = render(messages[: number + 1])
        if not text.startswith(asked) or not text.startswith(said) or not said.startswith(asked):
            return {"failure": "rewrites"}
        spans.append((len(asked), len(said)))
    return {"text": text, "answers": spans}


def _kind(error: Exception) -> str:
    from jinja2 import exceptions

    for kind, name in (
        (exceptions.TemplateSyntaxError, "syntax"),
        (exceptions.UndefinedError, "undefined"),
        (exceptions.SecurityError, "forbidden"),
    ):
        if isinstance(error, kind):
            return name
    return "refusal" if type(error) is exceptions.TemplateError else type(error).__name__


def _message(error: Exception) -> str:
    said = getattr(error, "message", None)  # of jinja's errors, without the source that they add
    return (said if isinstance(said, str) else str(error))[:_LONGEST_MESSAGE]


def _line(error: Exception) -> int | None:
    """Line of the template in which an error arose."""
    line = getattr(error, "lineno", None)
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def _bytes(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _write(file: int, reply: bytes) -> None:
    left = memoryview(reply)
    while left:
        left = left[os.write(file, left) :]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
