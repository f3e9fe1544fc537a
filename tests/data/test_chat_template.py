import copy
import datetime
import gc
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nemo_minitron.data import chat_template, chat_template_process
from nemo_minitron.data.chat_template import ChatTemplate
from nemo_minitron.data.document_types import draw_of
from nemo_minitron.data.documents import documents
from nemo_minitron.data.tokenisation import tokenised
from nemo_minitron.models.causal_lm import load_tokenizer
from tests.support import forked_trials
from tests.support.text_samples import found

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] | string + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | string | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
TOOLS = """{%- if tools is not none %}tools {{ tools | tojson }}{% endif %}{% if documents %}documents{% endif %}
{%- for m in messages %}
    {{- m.role }}: {{ m.content if m.content is defined else 'nothing' }}
    {%- if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function | tojson(indent=2) }}{% endfor %}{% endif %}
    {%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
    {%- for key, value in m.items() %} {{ key }}={{ value }}{% endfor %}
    {%- generation %}{{ eos_token }}{% endgeneration %}
{% endfor %}"""
NAMESPACE = """{%- set ns = namespace(seen=0) -%}{%- for m in messages if m.role != 'system' -%}
  {%- set ns.seen = ns.seen + 1 -%} [{{ ns.seen }}/{{ loop.length }}{{ '' if loop.last else ',' }}] {{ loop.cycle('a', 'b') }}
  {{ m.content }}{% if ns.seen > 3 %}{% break %}{% endif %}
{%- endfor -%}"""
TIME = "{{ bos_token }}{{ strftime_now('%d %b %Y %H') }}{{ messages | tojson }}"
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA_3,
    "tools": TOOLS,
    "namespace": NAMESPACE,
    "time": TIME,
}

TALK = [{"role": "user", "content": "the model"}, {"role": "assistant", "content": "reads a file"}]
LONG = [
    {"role": "system", "content": "  be brief \n"},
    *(
        {"role": role, "content": f"{role} says {i} \n "}
        for i in range(3)
        for role in ("user", "assistant")
    ),
]
ODD = [
    {"role": "user", "content": "Grüße, 世界 \U0001f600 \ud83d \u2028 \x00 <b>'\"</b>", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, True, None]}}}]},
    {"role": "tool", "content": float("nan")},
    {"role": "assistant", "content": datetime.datetime(2020, 1, 1), "reasoning": "because", "big": 2**70},
]  # fmt: skip
CONVERSATIONS = [TALK, LONG, ODD]


@pytest.fixture
def speaking(tokenizer_folder, tmp_path):
    """Makes a tokenizer with a template, as it is loaded from a folder of its own."""

    def make(template):
        tokenizer = load_tokenizer(tokenizer_folder, 300)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        return load_tokenizer(tmp_path / "model", 300)

    return make


@pytest.fixture
def in_forks(monkeypatch):
    """Processes are forked from one that has imported transformers, as in other tests: these are about texts."""
    monkeypatch.setattr(chat_template_process, "subprocess", forked_trials)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process, no zombie, no pipe outlives its test, but the process that others are forked from."""
    forked_trials.start()
    before = psutil.Process().num_fds()
    OTHERS.clear()
    OTHERS.update(workers())
    yield
    gc.collect()
    assert not workers()
    assert psutil.Process().num_fds() <= before


OTHERS: set[psutil.Process] = set()
"""Of tests before, such as one that failed and whose process is still held."""


def workers(owner=None):
    """The processes of chat templates, those that have ended and are not waited for included."""
    found = psutil.Process(owner).children()
    return [
        p
        for p in found
        if p not in OTHERS
        and (p.status() == psutil.STATUS_ZOMBIE or "chat_template_worker" in " ".join(p.cmdline()))
    ]


def eventually(condition, seconds=60):
    """Waits for something to be there."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)
    return found


def rendering(owner=None):
    """The process that is at a conversation just now: its memory is limited."""
    for worker in workers(owner):
        with_limit = worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
        if with_limit and worker.rlimit(psutil.RLIMIT_AS)[0] != psutil.RLIM_INFINITY:
            return worker
    return None


def rendered(tokenizer, conversations, answers=False):
    template = ChatTemplate(tokenizer, "data.train")
    try:
        return list(template.render(conversations, answers))
    finally:
        template.close()


def answers_of(tokenizer, messages, **options):
    """Where the assistant speaks, by transformers alone."""
    return [
        (
            len(
                tokenizer.apply_chat_template(
                    messages[:i], tokenize=False, add_generation_prompt=True, **options
                )
            ),
            len(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False, **options)),
        )
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


@pytest.mark.usefixtures("in_forks")
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(speaking, monkeypatch, name):
    monkeypatch.setenv("TZ", "XYZ-7:30")
    time.tzset()
    try:
        tokenizer = speaking(TEMPLATES[name])
        expected = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in CONVERSATIONS]
        assert all(expected)
        marked = name in ("chatml", "llama")  # the others change what was said before
        answers = [answers_of(tokenizer, talk) if marked else [] for talk in CONVERSATIONS]
        assert rendered(tokenizer, CONVERSATIONS, marked) == list(
            zip(expected, answers, strict=True)
        )
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.usefixtures("in_forks")
def test_of_several_templates_the_default_one_speaks(speaking):
    named = {"default": "{{ messages | length }}", "tool_use": "tools"}
    tokenizer = speaking(named)
    assert tokenizer.chat_template == named
    assert rendered(tokenizer, [TALK]) == [("2", [])]
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(ValueError, match=r"the chat template fails: .*no default specified"):
        rendered(tokenizer, [TALK])


HANGS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
ENDLESS = f"does not end within 1 s; the conversation begins with {TALK[0]['content']!r}".replace(
    "'", '"'
)


@pytest.mark.usefixtures("in_forks")
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (HANGS, ENDLESS),
        ("{% set base = 10 %}{{ base ** (10 ** 8) }}", ENDLESS),
        ("{{ 3 ** (10 ** 8) }}", ENDLESS),
        ("{{ 'x' * 10 ** 8 }}", "takes more than 64 MiB of memory"),
        ("{% set f = '%9999999999d' %}{{ f | format(1) }}", "takes more than 64 MiB of memory"),
        ("{{ raise_exception('x' * 10 ** 10) }}", "takes more than 64 MiB of memory"),
        ("{{ 'x' * 20000 }}", r"writes more than 1\d\d00 characters for a conversation of 1\d\d;"),
        ("\n{{ raise_exception('roles\n\x1b[31m must alternate' + 'x' * 9999) }}",
         r"refuses it in line 2: roles \\x1b\[31m must alternatex{50,200} \.\.\. x{50,200};"),
        ("\n\n{% for %}", "is not valid in line 3: "),
        ("{{ nothing.at.all }}", "uses what is not defined in line 1: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "does what it may not in line 1: .*__class__"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails in line 1: RecursionError"),
    ],
)  # fmt: skip
def test_a_template_that_ends_badly_is_named(speaking, tmp_path, monkeypatch, template, message):
    if message == ENDLESS:
        monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    monkeypatch.setattr(chat_template, "MEMORY", 64 * 2**20)
    monkeypatch.setattr(chat_template, "OUTPUT", 1000)
    file = tmp_path / "model" / "chat_template.jinja"
    tokenizer = speaking(template)
    with pytest.raises(
        ValueError, match=f"^data.train: {file}: the chat template {message}"
    ) as error:
        list(tokenised(iter([TALK]), tokenizer, "data.train"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.usefixtures("in_forks")
def test_a_template_in_the_configuration_is_named_as_well(speaking, tmp_path):
    tokenizer = speaking("{{ nothing.at.all }}")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ nothing.at.all }}"}'
    )
    with pytest.raises(
        ValueError, match=r"^x: .*/model/tokenizer_config.json: the chat template uses"
    ):
        rendered_by = ChatTemplate(tokenizer, "x")
        list(rendered_by.render([TALK]))


def test_what_a_conversation_may_cost_grows_with_it(speaking, monkeypatch):
    monkeypatch.setattr(chat_template, "MEMORY", 16 * 2**20)
    monkeypatch.setattr(chat_template, "OUTPUT", 0)
    talk = [{"role": "user", "content": "世" * 8_000_000}]
    tokenizer = speaking("{% for i in range(2) %}{{ messages[0]['content'] }}{% endfor %}")
    assert rendered(tokenizer, [talk]) == [("世" * 16_000_000, [])]


def test_the_limit_is_for_one_rendering_not_for_all_of_a_conversation(speaking, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.5)  # a hundred times what one rendering takes
    slow = "{% for i in range(150) %}{% for j in range(2000) %}{% endfor %}{% endfor %}" + CHATML
    found = tokenised(iter([TALK, "x", TALK * 150]), speaking(slow), "x", answers_only=True)
    next(found), next(found)
    begins = time.monotonic()
    assert len(next(found).ids) > 150 and time.monotonic() > begins + 1.5


def test_one_that_hangs_while_nobody_waits_is_ended_as_well(speaking, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    talks = [TALK, [{"role": "user", "content": "hang"}]]
    template = ChatTemplate(
        speaking("{% if messages[0].content == 'hang' %}" + HANGS + "{% endif %}."), "x"
    )
    found = template.render(talks)
    assert next(found) == (".", [])
    (worker,) = workers()
    eventually(lambda: worker.status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(
        ValueError, match=r'does not end within 0.5 s; the conversation begins with "hang"'
    ):
        next(found)


def test_documents_of_all_kinds_keep_their_order(speaking):
    tokenizer = speaking(CHATML)
    talks = [[{"role": "user", "content": f"number {i}"}] for i in range(300)]
    found = list(
        itertools.chain.from_iterable((talk, *["text"] * (i % 3)) for i, talk in enumerate(talks))
    )
    found += talks
    end = [tokenizer.eos_token_id]

    def expected(document):
        if isinstance(document, str):
            return tokenizer(document)["input_ids"] + end
        text = tokenizer.apply_chat_template(document, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"] + end

    assert [ids.tolist() for ids, _ in tokenised(iter(found), tokenizer, "x")] == [
        expected(document) for document in found
    ]


def test_a_process_that_somebody_ends_is_started_again(speaking):
    tokenizer = speaking(CHATML)
    talks = [[{"role": "user", "content": f"{i} " * 5000}] for i in range(200)]
    template = ChatTemplate(tokenizer, "x")
    found = template.render(talks)
    texts = [next(found)[0]]
    (first,) = workers()
    first.kill()
    texts += [text for text, _ in found]
    (second,) = workers()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        second.send_signal(number)  # what a terminal or Slurm sends to all of a job
    texts += [text for text, _ in template.render(talks)]
    assert workers() == [second] != [first]
    template.close()
    assert texts == 2 * [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]


def test_a_process_that_ends_twice_is_given_up(speaking):
    ended = []

    def end_it():
        for _ in range(2):
            worker = eventually(
                lambda: next((w for w in [rendering()] if w and w not in ended), None)
            )
            ended.append(worker)
            worker.kill()

    killer = threading.Thread(target=end_it)
    killer.start()
    with pytest.raises(
        ValueError, match=r"ends the process it runs in, twice: Killed \(signal 9\)"
    ):
        rendered(speaking(HANGS), [TALK])
    killer.join()


def test_one_that_is_dropped_half_way_leaves_nothing(speaking):
    found = tokenised(itertools.repeat(TALK), speaking(CHATML), "x")
    next(found)
    (worker,) = workers()
    del found
    assert not worker.is_running() and not workers()


def test_the_process_gets_no_secrets_and_nothing_of_the_models(speaking, tmp_path, monkeypatch):
    tokenizer = speaking(CHATML)
    for name in ("jinja2", "json", "transformers", "sitecustomize"):
        (tmp_path / "model" / f"{name}.py").write_text("raise SystemExit('somebody else's code')")
    monkeypatch.syspath_prepend(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "model"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path / "model")
    found = tokenised(itertools.repeat(TALK), tokenizer, "x")
    next(found)
    (worker,) = workers()
    assert (
        worker.cwd() == "/"
        and "secret" not in str(worker.environ())
        and "HOME" not in worker.environ()
    )
    files = {file.path for file in worker.open_files()}
    assert not files and worker.num_fds() <= 5


def test_a_process_that_does_not_start_says_why(speaking, tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text("import sys\nsys.exit('no room on the moon')")
    monkeypatch.setattr(chat_template_process, "_WORKER", tmp_path / "wrong.py")
    with pytest.raises(RuntimeError, match="does not start: no room on the moon"):
        rendered(speaking(CHATML), [TALK])


def test_threads_have_processes_of_their_own_and_may_end_before_them(speaking):
    tokenizer = speaking(CHATML)
    talks = [[{"role": "user", "content": f"{i} " * 3000}] for i in range(40)]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    streams = [tokenised(iter(talks), copy.deepcopy(tokenizer), "x") for _ in range(2)]
    found = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: found[i].append(next(streams[i]))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids, stream in zip(found, streams, strict=True):
        assert [tokens.ids.tolist() for tokens in (*ids, *stream)] == expected


SCRIPT = """
import os, sys, time
from types import SimpleNamespace
from nemo_minitron.data.chat_template import ChatTemplate
tokenizer = SimpleNamespace(chat_template=sys.argv[1], special_tokens_map={}, name_or_path="")
talks = [[{"role": "user", "content": f"{i} " * 3000}] for i in range(100)]
found = ChatTemplate(tokenizer, "x").render(talks)
texts = [next(found)[0]]
"""
FORKS = (
    SCRIPT
    + """
child = os.fork()
texts += [text for text, _ in found]
right = texts == [talk[0]["content"] for talk in talks]
if child == 0:
    os._exit(0 if right else 3)
assert right and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both")
"""
)
DIES = (
    SCRIPT
    + """
if os.fork() == 0:
    time.sleep(600)  # a process that was forked from the owner, and lives on
print("ready", flush=True)
time.sleep(600)
"""
)


def start(script, template):
    return subprocess.Popen(
        [sys.executable, "-c", script, template],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_fork_goes_on_with_a_process_of_its_own():
    with start(FORKS, "{{ messages[0].content }}") as owner:
        assert owner.communicate(timeout=60)[0] == "both\n" and owner.returncode == 0


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", HANGS])
def test_the_process_ends_with_an_owner_that_is_killed(template):
    with start(DIES, template) as owner:
        if template is HANGS:
            worker = eventually(lambda: rendering(owner.pid))
        else:
            assert owner.stdout.readline() == "ready\n"
            (worker,) = workers(owner.pid)
        others = [p for p in psutil.Process(owner.pid).children(recursive=True) if p != worker]
        owner.kill()
        try:
            assert not psutil.wait_procs([worker], timeout=10)[1]
        finally:
            for process in others:
                process.kill()


def refused_rows(tokenizer, tmp_path, rows, answers=False):
    """What is said of conversations in a file, the first of which is good."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [TALK, *rows]))
    with pytest.raises(ValueError, match=rf"^data\.train: {path}, row 2: ") as error:
        list(tokenised(documents(found([path])), tokenizer, "data.train", answers))
    return str(error.value)


@pytest.mark.usefixtures("in_forks")
def test_a_message_without_content_is_never_the_word_none(speaking, tmp_path):
    tokenizer = speaking(
        "{% for m in messages %}{{ m['content'] if m['content'] is defined else none }}{% endfor %}"
    )
    call = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    said = refused_rows(tokenizer, tmp_path, [call])
    assert "writes the word None for a message whose content is null" in said
    tokenizer.chat_template = "{% for m in messages if m.content %}{{ m.content }}{% endfor %}"
    none = [{"role": "user", "content": "None"}, call[1]]
    assert rendered(tokenizer, [call, none]) == [("the model", []), ("None", [])]


@pytest.mark.usefixtures("in_forks")
def test_a_template_that_fails_names_file_and_row_and_what_is_missing(speaking, tmp_path):
    tokenizer = speaking("{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}")
    call = [TALK[0], {"role": "assistant", "content": None}]
    said = refused_rows(tokenizer, tmp_path, [call])
    assert "the chat template " in said and "(a message of it has no content)" in said
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    said = refused_rows(tokenizer, tmp_path, [[{"role": "system", "content": "be brief"}]])
    assert "refuses it in line 1: roles must alternate" in said and 'with "be brief"' in said


@pytest.mark.usefixtures("in_forks")
def test_parts_that_are_text_are_text(speaking, tmp_path):
    path = tmp_path / "parts.jsonl"
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "model"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    tokenizer = speaking("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ((ids, _),) = tokenised(documents(found([path])), tokenizer, "x")
    assert tokenizer.decode(ids[:-1]) == "the model"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a <place>",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = [
    {"role": "user", "content": "is it warm"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "no"},
]
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML


@pytest.mark.usefixtures("in_forks")
def test_the_tools_of_a_row_are_in_the_text_as_transformers_shows_them(speaking, tmp_path, capsys):
    tokenizer = speaking(WITH_TOOLS)
    path = tmp_path / "calls.jsonl"
    each = [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)], None, [], ""]
    lines = [json.dumps({"messages": CALL, "tools": tools}) for tools in each]
    path.write_text("\n".join([*lines, json.dumps({"messages": CALL})]))
    talks = list(documents(found([path])))
    expected = [
        (tokenizer.apply_chat_template(CALL, tools=tools, tokenize=False), answers)
        for tools in ([WEATHER], None)
        for answers in [answers_of(tokenizer, CALL, tools=tools)]
    ]
    assert "the weather of a" in expected[0][0]
    assert rendered(tokenizer, talks, True) == [expected[0]] * 3 + [expected[1]] * 4
    draws = [draw_of(talk) for talk in talks]
    assert draws == [draws[0]] * 3 + [draw_of(CALL)] * 4 and draws[0] != draws[3]
    assert "read tools" not in capsys.readouterr().err
    tokenizer.chat_template = {"default": CHATML, "tool_use": WITH_TOOLS}
    assert [text for text, _ in rendered(tokenizer, talks)] == [expected[0][0]] * 3 + [
        tokenizer.apply_chat_template(CALL, tokenize=False)
    ] * 4


@pytest.mark.usefixtures("in_forks")
def test_a_template_that_does_not_read_tools_is_named_once(speaking, tmp_path, capsys):
    tokenizer = speaking(CHATML)
    path = tmp_path / "calls.jsonl"
    path.write_text((json.dumps({"messages": CALL, "tools": [WEATHER]}) + "\n") * 3)
    for _ in range(2):
        list(tokenised(documents(found([path])), tokenizer, "data.train"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.train: {tmp_path}/model/") and "does not read tools" in line


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (["weather"], r"'tools': not valid JSON: Expecting value \(character 1 of the text\)"),
        ("[{}", r"'tools': not valid JSON: .* \(character 4 of the text\)"),
        ("[" * 200 + "]" * 200, "'tools': nested more than 100 deep"),
        (
            {"name": "f"},
            "expected a list of JSON schemas, or its JSON, under 'tools', found an object",
        ),
        ('{"name": "f"}', "under 'tools', found an object; leave that column out"),
        ([{}, 3], "under 'tools', found a number in the list"),
    ],
)
def test_tools_that_are_none_are_refused_by_row(tmp_path, tools, said):
    path = tmp_path / "calls.jsonl"
    rows = [{"messages": CALL}, {"messages": CALL, "tools": tools}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"calls\.jsonl, row 2: .*{said}"):
        list(documents(found([path])))


def test_one_whose_alarm_comes_before_the_owners_limit_does_not_end_in_time(speaking, monkeypatch):
    """A busy machine gives the owner the processor too late."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    template = ChatTemplate(speaking(HANGS), "x")
    settings = template._settings()
    monkeypatch.setattr(chat_template, "SECONDS", 30.0)
    monkeypatch.setattr(template, "_settings", lambda: settings)
    with pytest.raises(ValueError, match=r"the chat template does not end within 30 s"):
        next(template.render([TALK]))
