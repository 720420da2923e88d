# SPDX-License-Identifier: Apache-2.0
"""A bad option says field, value, where it came from and what is allowed; a secret is never shown."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sage_kv_connector.backends import BACKENDS
from sage_kv_connector.config import CONFIG_FILE_ENV, KVTransportConfig, options_of_words
from sage_kv_connector.config import options as config_options

# A message ends with it; elsewhere tests want its first words, so that a new backend changes no test.
ALLOWED = ", ".join(["auto", *sorted(BACKENDS)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "rdmaa"}, f"backend is 'rdmaa' (from here); allowed: {ALLOWED}"),
        ({"integrity": "md5"}, "integrity is 'md5' (from here); allowed: auto, crc, generation"),
        ({"port": 70000}, "port is 70000 (from here); allowed: 0 to 65535"),
        ({"lease_s": -1}, "lease_s is -1 (from here); allowed: a number above 0, at most 604800"),
        (
            {"deadline_s": float("inf")},
            "deadline_s is inf (from here); allowed: a number above 0, at most 604800",
        ),
        ({"deadline_s": True}, "deadline_s is True (from here); allowed: a number above 0"),
        ({"advertise_port": True}, "advertise_port is True (from here); allowed: 1 to 65535"),
        ({"secret": ""}, "secret is ********** (from here); allowed: text that is not empty"),
        ({"host": ""}, "host is '' (from here); allowed: text that is not empty"),
        ({"zero_copy": "maybe"}, "zero_copy is 'maybe' (from here); allowed: true, false"),
        ({"target_dtype": "fp7"}, "target_dtype is 'fp7' (from here); allowed: auto, fp32, fp16"),
        ({"chunk_sise": 1}, "option 'chunk_sise' (from here) is unknown; did you mean chunk_size?"),
        ({"xyzzy": 1}, "option 'xyzzy' (from here) is unknown; allowed: advertise_host, "),
        ({"secret": [1]}, "secret is ********** (from here); allowed: text"),
        ({"backend": 1}, f"backend is 1 (from here); allowed: {ALLOWED}"),
        ({"target_dtype": [8]}, "target_dtype is [8] (from here); allowed: auto, fp32, fp16"),
        ({"preset": [1]}, "preset is [1] (from here); allowed: high-bw, low-cost, low-latency, wan"),
        ({"config_file": 5}, "config_file is 5 (from here); allowed: a path"),
        ({"secret_file": 5}, "secret_file is 5 (from here); allowed: a path"),
        (
            {"otlp_endpoint": "127.0.0.1:4318"},
            "otlp_endpoint is '127.0.0.1:4318' (from here); allowed: http://",
        ),
        (
            {"otlp_endpoint": "grpc://c:4317"},
            "otlp_endpoint is 'grpc://c:4317' (from here); allowed: http://",
        ),
        ({"otlp_endpoint": "http://"}, "otlp_endpoint is 'http://' (from here); allowed: http://"),
        (
            {"otlp_endpoint": "http://u:p@c:4318"},
            "otlp_endpoint is 'http://u:p@c:4318' (from here); allowed: ",
        ),
        ({"otlp_endpoint": "http://c:x"}, "otlp_endpoint is 'http://c:x' (from here); allowed: http://"),
        ({"otlp_endpoint": "http://c:4318?a"}, "otlp_endpoint is 'http://c:4318?a' (from here); allowed: "),
        ({"otlp_endpoint": 4318}, "otlp_endpoint is 4318 (from here); allowed: text"),
    ],
)
def test_one_sentence_a_bad_option(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        KVTransportConfig.load(options, "here")
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"])
@pytest.mark.parametrize("parent", [True, False])
def test_spans_without_the_sdk_are_refused_with_what_to_install(
    missing: str, parent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        if name == missing and parent:
            raise ModuleNotFoundError(name)
        return None if name == missing else name

    monkeypatch.setattr(config_options, "find_spec", find)
    with pytest.raises(
        ValueError, match=r"otlp_endpoint is 'http://c:4318'.*pip install sage_kv_connector\[otlp\]"
    ):
        KVTransportConfig.load({"otlp_endpoint": "http://c:4318"}, "here")
    assert KVTransportConfig.load({}).otlp_endpoint is None


def test_the_layer_is_named_and_every_bad_option_has_its_sentence(tmp_path: Path) -> None:
    path = tmp_path / "kv_transport.yaml"
    path.write_text("port: 70000\nlease_s: 5\n")
    with pytest.raises(ValueError) as refused:
        KVTransportConfig.load({"config_file": path, "lease_s": 0}, "the bare word")
    sentences = str(refused.value).split("; allowed")
    assert len(sentences) == 3
    assert f"port is 70000 (from {path})" in str(refused.value)
    assert "lease_s is 0 (from the bare word)" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "k.yaml",
            'port: 1\nsecret: "hunter2\n',
            "is not YAML: line 3, column 1: found unexpected end of stream",
        ),
        ("k.yaml", "secret: [hunter2\nport: 1\n", "is not YAML: line 2, column 5: expected"),
        ("config.yaml", "kv_transport: secret=hunter2\n", "kv_transport is str; it must be a mapping"),
        ("config.yaml", "kv_transport:\n- secret: hunter2\n", "kv_transport is list; it must be a mapping"),
        ("k.yaml", "- secret=hunter2\n", "holds list; it must be a mapping"),
        ("k.yaml", "secret: \udcff", "is not UTF-8 text"),
        ("k.yaml", "secret: [hunter2]\n", "secret is **********"),
        ("k.yaml", "preset: [fast]\n", "preset is ['fast'] (from "),
    ],
)
def test_a_file_that_cant_be_read_is_named_without_its_lines(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    try:
        KVTransportConfig.load({"config_file": path})
    except ValueError as error:
        assert says in str(error) and str(path) in str(error)
        assert "hunter2" not in traceback.format_exc()
    else:
        pytest.fail("it was read")


@pytest.mark.parametrize("word", ["secret:hunter2", "secret", "secrethunter2"])
def test_a_word_that_is_meant_as_a_secret_is_not_shown(word: str) -> None:
    with pytest.raises(ValueError, match=r"option '\*+' is not of the form key=value"):
        options_of_words([word])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "option 'nothing' is not of the form key=value (from --option)"),
        (["port=[1"], "port is '[1' (from --option); allowed: YAML"),
        (["secret=hunter", "port=[2"], "********** (from --option); allowed: YAML"),
    ],
)
def test_words_that_are_no_options_say_where_they_came_from(words: list[str], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        KVTransportConfig.from_words(words, "--option")
    assert str(refused.value).startswith(says)


def test_who_named_a_file_that_cant_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml' can't be read: .* \(named by --set\)"):
        KVTransportConfig.load({"config_file": path}, "--set")
    monkeypatch.setenv(CONFIG_FILE_ENV, path)
    with pytest.raises(
        ValueError, match=r"none\.yaml' can't be read: .* \(named by \$SAGE_KVT_CONFIG_FILE\)"
    ):
        KVTransportConfig.load({})


def test_options_of_another_kind_are_named() -> None:
    with pytest.raises(ValueError, match="options are list \\(from here\\); they must be a mapping"):
        KVTransportConfig.load([1], "here")  # type: ignore[arg-type]


SECRETS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12)


@given(SECRETS, st.sampled_from(["secret", "secrets", "sekret"]))
def test_no_part_of_a_secret_is_in_an_error(secret: str, name: str) -> None:
    for value in (secret, [secret], {"a": secret}):
        try:
            KVTransportConfig.load({name: value, "port": -1})
        except ValueError:
            assert secret not in traceback.format_exc()


@given(SECRETS, st.sampled_from([",", ",,", ", "]), SECRETS, st.sampled_from(["", "=", "=="]))
@example("correct0horse", ",", "000000ackend", "=")
def test_a_secret_with_a_comma_is_refused_and_not_shown(head: str, comma: str, tail: str, end: str) -> None:
    words = [word for word in f"secret={head}{comma}{tail}{end}".split(",") if word]
    with pytest.raises(ValueError) as refused:
        KVTransportConfig.from_words(words)
    assert head not in str(refused.value) and tail not in str(refused.value)


@given(SECRETS | st.sampled_from(["12345", "yes", "1e5", "null"]))
def test_a_secret_among_words_is_taken_as_it_is(secret: str) -> None:
    assert options_of_words([f"secret={secret}"]) == {"secret": secret}
    assert KVTransportConfig.from_words([f"secret={secret}"]).resolved_secret() == secret.encode()
