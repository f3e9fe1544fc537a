"""What is a credential, what is none, and that masking neither fails nor takes long."""

import io
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.security import masking
from nemo_minitron.security.masking import MASK, Masking, mask_in, masked, masked_values, remember

SECRET = "s3cretS3cret"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SAFE = (
    st.sampled_from([LETTERS + DIGITS + ".!~", DIGITS, DIGITS + "."])
    .flatmap(lambda signs: st.text(signs, min_size=12, max_size=40))
    .filter(lambda text: text.strip("!.,~") == text and len(set(text)) > 5)
)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test lets be remembered is not the next one's."""
    monkeypatch.setattr(masking, "_remembered", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_abcdefgh12", "hf_***"),
        ("http://user:PW@host/x?a=b", "http://***@host/x?a=b"),
        ("https://PW@host/x", "https://***@host/x"),
        ("['http://a:PW@h1','http://b:PW@h2']", "['http://***@h1','http://***@h2']"),
        ("http://user:a/PW#c@host/x", "http://***@host/x"),
        ("http://user:a@PW@host/x", "http://***@host/x"),
        ("file http:/user:PW@host is missing", "file http:/***@host is missing"),
        ("postgresql+psycopg://me:PW@db:5432/mlflow", "postgresql+psycopg://***@db:5432/mlflow"),
        ("http://h/x?token=PW&a=b#f", "http://h/x?token=***&a=b#f"),
        ("https://s3/x?X-Amz-Credential=PW&X-Amz-Signature=PW&a=1", "https://s3/x?X-Amz-Credential=***&X-Amz-Signature=***&a=1"),
        ("https://blob/x?sv=1&sig=PW", "https://blob/x?sv=1&sig=***"),
        ("export WANDB_API_KEY=PW", "export WANDB_API_KEY=***"),
        ("launch.slurm.setup=['export HF_TOKEN=PW','module load x']", "launch.slurm.setup=['export HF_TOKEN=***','module load x']"),
        ("AWS_SECRET_ACCESS_KEY=PW aws s3 ls", "AWS_SECRET_ACCESS_KEY=*** aws s3 ls"),
        ("PGPASSWORD=PW psql", "PGPASSWORD=*** psql"),
        ("PASSWORD='PW and more' x", "PASSWORD='***' x"),
        ("""PASSWORD='"'"'PW and more'"'"' x""", """PASSWORD='"'"'***'"'"' x"""),
        ("password=it's-PW x", "password=*** x"),
        ("--password=PW x", "--password=*** x"),
        ("--api-key PW x", "--api-key *** x"),
        ("password: PW", "password: ***"),
        ('{"password": "PW more", "user": "x"}', '{"password": "***", "user": "x"}'),
        ("{'token': 'PW'}", "{'token': '***'}"),
        ("Authorization: Bearer PW", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic PW'}", "{'authorization': 'Basic ***'}"),
        ("a curl -H 'Bearer PWPWPWPW'", "a curl -H 'Bearer ***'"),
        ("ghp_abcdefghijklmnopqrstuvwxyz", "***"),
        ("A_TOKEN=000000012345 x", "A_TOKEN=*** x"),
        ("at http://u:000000012345/1@h", "at http://***@h"),
        ("unexpected token: x password=PW", "unexpected token: x password=***"),
    ],
)  # fmt: skip
def test_credentials_are_masked_and_their_surroundings_stay(text, shown):
    assert masked(text.replace("PW", SECRET)) == shown
    assert masked(shown) == shown
    assert mask_in({"at": [shown]}) == ("at[0]", shown)


@pytest.mark.parametrize(
    "text",
    [
        "training.max_tokens=100", "evaluate.written_tokens=3", "data.train.text_key=text", "eos_token='</s>'",
        "token=4096", "seconds_token: 0.0123", "plan.budget.measure=kv_bytes_per_token",
        "kv_bytes_per_token: 4096", "nats per token: 2.3",
        "unexpected token: foo", "pip install hf_transfer", "hf://owner/name@rev", "http://host:8080/x@y",
        "http://host/x?mail=a@b", "me@example.org", "git@github.com:owner/name", "password=", "token=None",
        "export HF_TOKEN=$HF_TOKEN", "export HF_TOKEN=${oc.env:HF_TOKEN}", "HF_TOKEN=$(cat /run/token)",
        "track.mlflow=http://me:${oc.env:PW}@host", "track.mlflow=http://${oc.env:ME}:${oc.env:PW}@host",
        "2026-01-01 12:00:00 step 3: loss 2.3", "C:\\text\\a.txt", "s3://bucket/key", "sqlite:///mlflow.db",
        "data/**/*.txt", "key=value", "--secret-file x", "a" * 40, "/runs/hf/tokens/12ab",
    ],
)  # fmt: skip
def test_what_is_no_credential_stays(text):
    assert masked(text) == text
    assert mask_in(text) is None


def test_the_keys_of_the_configuration_and_the_commands_of_the_documentation_stay():
    from nemo_minitron.config.compose import OPEN
    from nemo_minitron.config.config import Config
    from nemo_minitron.config.option import describe

    names = [name for name, _, _ in describe(Config)] + list(OPEN)
    for name in names:
        for value in ("word", "3", "[a,b]", "'quoted'", "0.5"):
            assert masked(f"minitron run {name}={value}") == f"minitron run {name}={value}"
            assert masked(f"{name}: expected {value}") == f"{name}: expected {value}"
        leaf = name.rsplit(".", 1)[-1]
        assert masked_values({leaf: "word", name: ["word"]}) == {leaf: "word", name: ["word"]}


@given(SAFE, SAFE)
def test_whatever_the_password_it_is_gone_and_masking_twice_is_masking_once(password, other):
    for form in (
        "http://{a}:{b}@host/x", "https://{b}@host", "A_TOKEN={b}", "--token={b}", "--token {b}", "x?sig={b}&a=1",
        "PASSWORD='{b} {b}'", '{{"api_key": "{b}"}}', "Authorization: Bearer {b}", "mlflow at http://u:{b}/{b}@h",
    ):  # fmt: skip
        text = form.format(a=other, b=password)
        shown = masked(f"before {text} after")
        assert password not in shown.replace(other, "") or password in other, shown
        assert masked(shown) == shown
        assert shown.startswith("before ") and shown.endswith(" after")


PIECES = ["://", ":/", "@", ":", "=", "'", '"', "\\", " ", "/", "?", "&sig=", "***", "hf_", "abcdefgh1", "$", "{", "}", ",",
          "password", "token", "--", "Bearer ", "Authorization", "API_KEY", "http", "1", ")", "Basic "]  # fmt: skip


@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_no_text_is_too_odd(text):
    shown = masked(text)
    assert masked(shown) == shown


def test_a_variable_with_such_a_name_is_masked_wherever_its_value_stands(monkeypatch):
    for name in ("MY_TOKEN", "WANDB_API_KEY", "A_SECRET", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PREFECT_API_AUTH_STRING"):  # fmt: skip
        monkeypatch.setenv(name, f"value {name}/x")
        assert masked(f"the value {name}/x is") == f"the {MASK} is"
        assert masked(f"http://h/value%20{name}%2Fx") == f"http://h/{MASK}"
        monkeypatch.delenv(name)
        assert masked(f"the value {name}/x is") == f"the value {name}/x is"
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij-more")
    assert masked("hf_abcdefghij-more") == f"hf_{MASK}"
    monkeypatch.setenv("SHORT_TOKEN", "loss")  # which may be a word
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel-value")
    assert masked("loss parallel-value") == "loss parallel-value"


def test_what_was_remembered_is_masked_without_its_address():
    remember(
        {
            "track": {"mlflow": f"http://me:{SECRET}%21@h"},
            "x": [f"A_TOKEN=other{SECRET}"],
            "api_key": "whole-key",
        }
    )
    assert (
        masked(f"cannot resolve 'me:{SECRET}%21', {SECRET}!")
        == f"cannot resolve 'me:{MASK}', {MASK}"
    )
    assert masked(f"other{SECRET} whole-key") == f"{MASK} {MASK}"
    assert masked("me") == "me"


def test_values_in_all_depths():
    given = {
        "a": [f"http://u:{SECRET}@h", (f"A_TOKEN={SECRET}", 1, None, 2.5)], "password": SECRET, "eos_token": "</s>",
        "deep": {"HF_TOKEN": [SECRET], "api_key": "${oc.env:KEY}", "secret": ""}, f"A_TOKEN={SECRET}": True, 3: "x",
    }  # fmt: skip
    assert masked_values(given) == {
        "a": [f"http://{MASK}@h", (f"A_TOKEN={MASK}", 1, None, 2.5)], "password": MASK, "eos_token": "</s>",
        "deep": {"HF_TOKEN": [MASK], "api_key": "${oc.env:KEY}", "secret": ""}, f"A_TOKEN={MASK}": True, 3: "x",
    }  # fmt: skip
    assert mask_in(masked_values(given)) == ("a[0]", f"http://{MASK}@h") and mask_in(given) is None


def test_a_stream_masks_what_goes_through_it():
    inner = io.StringIO()
    stream = Masking(inner)
    print(f"A_TOKEN={SECRET}", file=stream, flush=True)
    stream.writelines([f"http://u:{SECRET}@h\n", "plain\n"])
    assert inner.getvalue() == f"A_TOKEN={MASK}\nhttp://{MASK}@h\nplain\n"
    assert not stream.isatty() and stream.getvalue() == inner.getvalue()


@pytest.mark.parametrize(
    "piece", ["a-", "token", "x=token:", "://a", "://a:b", "password='", ":/a:b", "-", "token=None,", "'\"", "Bearer ", "&sig="]
)  # fmt: skip
def test_no_line_takes_long(piece):
    started = time.process_time()
    masked(piece * (65536 // len(piece)) + " @")
    assert time.process_time() - started < 2


def test_a_line_of_a_log_takes_microseconds():
    line = "2026-01-01 00:00:00 distill: step 100 of 1000, loss 2.345, 12.3 samples/s, http://host:80/a"
    started = time.process_time()
    for _ in range(1000):
        masked(line)
    assert time.process_time() - started < 1 + len(os.environ) / 100


@pytest.mark.parametrize(
    "text",
    [
        'token="' + "\\" * 200_000,
        "password=" + "\"'" * 100_000,
        "password='" * 50_000,
        "://" + "a:" * 100_000,
    ],
    ids=["backslashes", "quotes", "open", "colons"],
)
def test_no_text_takes_longer_than_its_length_asks_for(text):
    """Compared with a text of the same length in which there is nothing: a power of it would be thousands of times."""
    begun = time.process_time()
    masked("x y " * (len(text) // 4))
    plain_text = time.process_time() - begun
    begun = time.process_time()
    masked(text)
    assert time.process_time() - begun < 300 * plain_text + 1


@pytest.mark.parametrize(
    "secret",
    ["sk-ant-api03-abcdefghijklmnop-qrst", "AIza" + "a1_-" * 8 + "abc", "npm_" + "a1" * 18],
)
def test_tokens_of_other_houses_are_known_by_their_shape(secret):
    assert masked(f"failed with {secret} there") == "failed with *** there"
