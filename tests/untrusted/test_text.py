"""No terminal escape and no credential gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrusted.secrets import (
    is_secret_name,
    redact,
    redact_arguments,
    redact_message,
    redact_value,
    redact_values,
    redact_variables,
    remember,
)
from untrusted.text import printable, printable_lines, without_controls


@given(st.text())
def test_controls_are_spelled_out(text: str) -> None:
    assert not any(
        ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2028" for c in printable(text)
    )
    assert printable_lines(text).count("\n") == text.count("\n")


def test_escapes_stay_readable() -> None:
    assert printable("a\x1b[31mb\n\u202e é") == "a\\x1b[31mb\\n\\u202e é"
    assert printable_lines("a\tb\n\x07") == "a\tb\n\\x07"


def test_text_in_any_language_keeps_its_formats() -> None:
    assert without_controls("a\r\x1b[31m\x9b\u202e\tb\n") == "a\\r\\x1b[31m\\x9b\\u202e\tb\n"
    for text in ("می\u200cخواهم", "👩\u200d💻", "naïve\u00ad"):
        assert without_controls(text) == text


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://user:hunter2@host/a?b=1", "https://***@host/a?b=1"),
        ("s3://hunter2@bucket/x", "s3://***@bucket/x"),
        ("https://u:hunter2@x@host/", "https://***@host/"),
        ("http://h/x?X-Amz-Signature=hunter2&y=1", "http://h/x?X-Amz-Signature=***&y=1"),
        ("http://h/x?y=1&sig=hunter2#f", "http://h/x?y=1&sig=***#f"),
        ("http://h/x?access_key=hunter2 and more", "http://h/x?access_key=*** and more"),
        ("a file http://h/x@y/z", "a file http://h/x@y/z"),
        ("http://h:8080/x and y", "http://h:8080/x and y"),
        ("s3://AKIA:7/hunter2@bucket/x", "s3://***@bucket/x"),  # no port
        ("https://u:8080?hunter2@h/x", "https://***@h/x"),
        ("http://h/x?code=hunter2&access=hunter2", "http://h/x?code=***&access=***"),
        ("http://h/x?encoded=1", "http://h/x?encoded=1"),
        ("s3://AKIA:hunter/2+@bucket/x", "s3://***@bucket/x"),
        ("s3:/AKIA:hunter2@bucket/x", "s3:/***@bucket/x"),
        ("sftp://u:hunter2?#@h:22/x and ftp://a:hunter2@b", "sftp://***@h:22/x and ftp://***@b"),
        ("simplecache::s3://k:hunter2@b", "simplecache::s3://***@b"),
        (
            "http://h/?my_secret_key_2=hunter2;AWSAccessKeyId=hunter2",
            "http://h/?my_secret_key_2=***",
        ),
    ],
)
def test_credentials_in_urls_are_hidden(text: str, hidden: str) -> None:
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "secret", ["hunter2", 'h"unter2', "h unter2", "7/hunter2", "h\nunter2", "h\u2028unter2"]
)
def test_a_field_ends_where_its_text_does(secret: str) -> None:
    url, hidden = f"s3://AKIA:{secret}@bucket/x y", "s3://***@bucket/x y"
    assert redact_value(url) == hidden
    assert redact_values({"data": [{"train": url}], "n": 1}) == {
        "data": [{"train": hidden}],
        "n": 1,
    }
    assert redact_arguments([url, f"--data.train={url}"]) == [hidden, f"--data.train={hidden}"]
    assert redact_variables({"URL": url}) == {"URL": hidden}
    remember(url, is_value=True)
    assert secret not in redact_message(f"no answer for AKIA with {secret}.")


def test_credentials_alone_are_hidden_from_messages() -> None:
    message = "sftp://me:open%2Fsesame@host/x: no answer from me:open/sesame@host, port 22"
    assert redact_message(message) == "sftp://***@host/x: no answer from me:***@host, port 22"
    assert redact_message("GET /x?y=1&sig=sesame22") == "GET /x?y=1&sig=***"
    assert redact_message("https://me@host/x: me and host") == "https://***@host/x: me and host"


def test_secret_names() -> None:
    secret = [
        "SLURM_JWT",
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "--data.password",
        "aws_access_key_id",
        "MY_KEY",
        "X-Amz-Security-Token",
        "Authorization",
        "token2",
    ]
    public = [
        "--tokenizer",
        "max_tokens",
        "eod_token_id",
        "--text-key",
        "SLURM_JOB_ID",
        "author",
        "key",
        "tokens",
        "signal",
    ]
    assert [n for n in secret if not is_secret_name(n)] == []
    assert [n for n in public if is_secret_name(n)] == []


def test_command_lines_and_variables() -> None:
    words = [
        "x",
        "--a.api_key",
        "hunter2",
        "--token=hunter2",
        "https://u:hunter2@h",
        "--tokenizer",
        "t",
        "AWS_SECRET_ACCESS_KEY=hunter2",
    ]
    assert redact_arguments(words) == [
        "x", "--a.api_key", "***", "--token=***", "https://***@h", "--tokenizer", "t",
        "AWS_SECRET_ACCESS_KEY=***",
    ]  # fmt: skip
    assert redact_variables({"SLURM_JWT": "hunter2", "A": "b"}) == {"SLURM_JWT": "***", "A": "b"}


def test_a_token_in_place_of_a_user_is_hidden_alone_too() -> None:
    token = "ghp_0123456789abcdef"
    assert redact_message(f"cannot read https://{token}@host/x") == "cannot read https://***@host/x"
    assert redact_message(f"{token} is no user") == "*** is no user"
    assert (
        redact_message("https://someone@host/x, someone said") == "https://***@host/x, someone said"
    )
