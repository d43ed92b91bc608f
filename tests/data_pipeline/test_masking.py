"""What is secret in a URL is found, and nothing else is taken for it."""

from __future__ import annotations

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.masking import masked, masked_in, masked_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ada:p%40ss@host:80/a", "http://***@host:80/a"),
        ("https://token0@host/a", "https://***@host/a"),
        ("HTTPS://ada:b@c@host/a", "HTTPS://***@host/a"),
        ("ftp://ada:pass@host/a", "ftp://ada:***@host/a"),
        ("simplecache::ftp://ada:pass@host", "simplecache::ftp://ada:***@host"),
        ("see http://a:b@c/d and s3://e:f@g/h", "see http://***@c/d and s3://e:***@g/h"),
        ("http://h/a?token=x&n=3#t", "http://h/a?token=***&n=3#t"),
        (
            "http://h/a?X-Amz-Signature=1f&X-Amz-Date=2",
            "http://h/a?X-Amz-Signature=***&X-Amz-Date=2",
        ),
        ("az://c/a?sig=abc%3D", "az://c/a?sig=***"),
        ("https://h/a?apiKey=1", "https://h/a?apiKey=***"),
        # signs that were not escaped
        ("ftp://ada:p/ss@host/a", "ftp://ada:***@host/a"),
        ("ftp://ada:p?ss@host/a", "ftp://ada:***@host/a"),
        ("ftp://ada:p#ss@host/a", "ftp://ada:***@host/a"),
        ("ftp://ada:p@s/s@host/a", "ftp://ada:***@host/a"),
        ("https://ada:p/s?k=1#y@z@host:80/a", "https://***@host:80/a"),
        ("https://to@ken@host/a", "https://***@host/a"),
        ("ftp://ada@corp.com:pass@host/a", "ftp://ada@corp.com:***@host/a"),
        ("http://a:b@c/d,s3://e:f@g/h", "http://***@c/d,s3://e:***@g/h"),
        # digits first: not a port, whose host would have a dot
        ("http://ada:12345/abc@host/a", "http://***@host/a"),
        ("ftp://ada:123;abc@host/a", "ftp://ada:***@host/a"),
        ("ftp://ada:12345@host/a", "ftp://ada:***@host/a"),
        # blanks
        ("http://ada:my pass@host/a", "http://***@host/a"),
        ("ftp://ada:my p@ss word@host/a", "ftp://ada:***@host/a"),
        ("see 'ftp://ada:p w@host/a', not 'b@c'", "see 'ftp://ada:***@host/a', not 'b@c'"),
        # as a path is spelt
        ("http:/ada:pass@host/a", "http:/***@host/a"),
        ("config ftp:/ada:p/ss@host/a: missing", "config ftp:/ada:***@host/a: missing"),
        ("http:/h/a?token=x", "http:/h/a?token=***"),
        # every sign that begins a parameter
        ("http://h/a;token=x;n=3", "http://h/a;token=***;n=3"),
        ("http://h/a#token=x&n=3", "http://h/a#token=***&n=3"),
        ("http://h/a?sig=1", "http://h/a?sig=***"),
        ("http://h/a?n=3&X-Amz-Signature=1f", "http://h/a?n=3&X-Amz-Signature=***"),
        ("http://h/a?token=x;y#z&n=3", "http://h/a?token=***&n=3"),
        ("http://h/a?url=ftp://g?KEY=x", "http://h/a?url=ftp://g?KEY=***"),
        (
            "http://h/a?AWSAccessKeyId=x&hftoken=y&client_secret=z&APIKey=0",
            "http://h/a?AWSAccessKeyId=***&hftoken=***&client_secret=***&APIKey=***",
        ),
        (
            "http://h/a?bearer=x&passcode=y&sas=z&session=0&sessionId=1&PHPSESSIONID=2&sid=3",
            "http://h/a?bearer=***&passcode=***&sas=***&session=***&sessionId=***"
            "&PHPSESSIONID=***&sid=***",
        ),
    ],
)
def test_a_secret_is_masked_and_stays_masked(text: str, shown: str) -> None:
    assert masked(text) == shown == masked(shown)


@pytest.mark.parametrize(
    "text",
    [
        "hdfs://ada@namenode:9000/a",
        "s3://bucket/a@b/c:d@e",
        "http://host:8080/a",
        "http://host/a?n=3",
        "/a/b@c?token=x",
        "mail ada:b@c",
        "hdfs://ada@namenode:9000/a@b",
        "http://host.lan:8080/a@b",
        "http://10.0.0.1:8080/a@b",
        "http://localhost:8080/a@b",
        "http://host:8080 is not there, ask a@b",
        "http://host:8080/a: refused, ask a@b",
        "s3://bucket: missing, ask a@b",
        "/a/bin:/b/c:d",
        "C:/a:b@c",
        "http://[::1]:8080/a@b",
        # words that only hold a secret's
        "http://h/a?token=&n=3",
        "http://h/a?author=x&monkey=y;keyboard=z#max_tokens=3&tokenizer=t&design=d&passage=p&side=x",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    ("url", "text", "shown"),
    [
        ("s3://me:hunter2@bucket/a", "Invalid bucket name me:hunter2@bucket", "name ***@bucket"),
        ("s3://b/a?token=hunter2", "GET /b/a?n=1 of hunter2", "of ***"),
        ("s3://b/a?n=3000", "3000 bytes", "3000 bytes"),
        ("s3://me:abc@bucket/a", "abc of alphabets", "abc of alphabets"),
    ],
)
def test_a_secret_is_masked_where_it_stands_without_its_url(
    url: str, text: str, shown: str
) -> None:
    assert masked_in(text, url).endswith(shown)
    assert masked_in(f"{url}: no", url) == masked(f"{url}: no")


def test_errors_and_plain_data_are_masked() -> None:
    url = "http://ada:secret@host/a"
    for kind in (InputError, DamagedDataError, StorageError):
        assert str(kind(f"{url}: missing")) == "http://***@host/a: missing"
    data = {"a": [url, {"b": (url, 1, None, True)}]}
    shown = "http://***@host/a"
    assert masked_values(data) == {"a": [shown, {"b": [shown, 1, None, True]}]}
    assert SourceConfig(url).label == shown and SourceConfig(url, name="en").label == "en"
