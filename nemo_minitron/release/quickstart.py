"""The quickstart that every card shows, and the trial of an export by exactly that code.

The code is a constant: no text that comes from a model, a card or a workspace is ever run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

QUICKSTART = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
inputs = tokenizer("The", return_tensors="pt")
outputs = model.generate(**inputs, max_length=50)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))"""

MULTIMODAL_QUICKSTART = QUICKSTART.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""The same with the class of a model that reads images, too."""

_START = """import gc
gc.set_threshold(700, 10, 1_000)  # to look for garbage among all that is imported takes a fifth of the time

"""
_COMPARE = """
import json
import sys
from transformers import AutoModelForCausalLM
left_out = tuple(json.load(sys.stdin))  # prediction layers
assert outputs.shape[1] > inputs["input_ids"].shape[1], "generate produced no token"
dtype = getattr(torch, sys.argv[3])
tokens = torch.arange(32)[None] % model.config.get_text_config().vocab_size
logits = []
kinds = (Auto, AutoModelForCausalLM)  # of the export, and of the student
for kind, folder in zip(kinds, sys.argv[1:3]):
    loaded, info = kind.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(left_out)]
    assert not any((info["missing_keys"], unexpected, info["mismatched_keys"])), info
    with torch.inference_mode():
        logits.append(loaded.eval()(tokens).logits)
assert torch.equal(*logits), f"logits differ from the student's by {(logits[0] - logits[1]).abs().max()}"
assert not [name for name in sys.modules if name.startswith(("nemo", "lightning", "prefect"))]
"""


def check_in_clean_process(
    folder: Path,
    student: Path,
    dtype: str,
    multimodal: bool = False,
    left_out: Sequence[str] = (),
) -> None:
    """Runs the quickstart and compares logits, in a process that knows only torch and transformers.

    Args:
        folder: the export.
        student: the model that it was made from.
        dtype: what both are loaded in, as torch names it.
        multimodal: whether the export has parts for images around the text model.
        left_out: beginnings of names of tensors that plain transformers may leave out.

    Raises:
        RuntimeError: it fails; the message is the process' last words.
    """
    shown = MULTIMODAL_QUICKSTART if multimodal else QUICKSTART
    kind = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    command = [
        sys.executable,
        "-c",
        f"{_START}{shown}\n\nAuto = {kind}{_COMPARE}",
        str(folder.resolve()),
        str(student.resolve()),
        dtype,
    ]
    # not isolated (-I): torch may have come by PYTHONPATH, or lie in the user's own site-packages
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # but nothing from the export itself is imported
        "PYTHONUTF8": "1",  # and whatever the terminal shows, the model's text can be printed
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, input=json.dumps(list(left_out)), capture_output=True,
        encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the export does not work with plain transformers: {last}")
