"""A local server that speaks OpenAI's completions, with a real tiny model behind it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Served:
    """A model that is served.

    Attributes:
        address: of the server, with /v1.
        requests: the bodies of all requests.
    """

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.requests: list[dict[str, Any]] = []
        self.address = ""

    def scored(self, prompt: list[int]) -> dict[str, Any]:
        """Log-probabilities of a prompt's tokens, and of one that is written behind them."""
        with torch.inference_mode():
            scores = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        ids = [*prompt[1:], int(scores[-1].argmax())]
        own = [float(scores[place, token]) for place, token in enumerate(ids)]
        tops = [{"best": float(row.max())} for row in scores]
        return {
            "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *tops]},
            "text": "",
        }

    def written(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """What the model writes behind a prompt, up to the first of its stops."""
        torch.manual_seed(body["seed"])
        read = torch.tensor([prompt])
        drawn = {"do_sample": True, "temperature": body["temperature"]}
        with torch.inference_mode():
            # transformers takes the pad token, which may begin a prompt, for padding where no mask is given
            ids = self.model.generate(
                read, attention_mask=torch.ones_like(read), max_new_tokens=body["max_tokens"], pad_token_id=0,
                **(drawn if body["temperature"] else {"do_sample": False}),
            )  # fmt: skip
        text = self.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        for stop in filter(None, body["stop"]):
            text = text.split(stop)[0]
        return {"text": text}


@contextmanager
def serving(folder: Path, *ids: str) -> Iterator[Served]:
    """Serves the model of a folder, which is listed by these ids."""
    served = Served(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": each} for each in ids]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(body)
            choices = [
                {
                    "index": number,
                    **(served.scored(ids) if body.get("echo") else served.written(ids, body)),
                }
                for number, ids in enumerate(body["prompt"])
            ]
            self.answer({"choices": choices})

        def answer(self, value: dict[str, Any]) -> None:
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
