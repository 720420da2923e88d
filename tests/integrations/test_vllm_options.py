# SPDX-License-Identifier: Apache-2.0
"""Our options in vLLM's arguments: a bad one is named by its parser, a secret is in none of its texts."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.integrations.vllm import plugin

SECRET = "correct-horse-battery"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.register()


def parsed(text: str) -> Any:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", "m", "--kv-transfer-config", text])


def as_json(connector: str = "sage_kvt", **options: Any) -> str:
    given = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": options}
    return json.dumps(given)


def beside_another(**options: Any) -> str:
    return as_json(
        "MultiConnector", connectors=[json.loads(as_json(**options)), json.loads(as_json("Other"))]
    )


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("sage_kvt:backend=rdmaa", "--kv-transfer-config sage_kvt"),
        (as_json(backend="rdmaa"), "kv_connector_extra_config"),
        (as_json("SageKVConnector", backend="rdmaa"), "kv_connector_extra_config"),
        (beside_another(backend="rdmaa"), "kv_connector_extra_config"),
    ],
)
def test_a_bad_option_is_named_by_vllms_parser(
    capsys: pytest.CaptureFixture[str], text: str, origin: str
) -> None:
    with pytest.raises(SystemExit):
        parsed(text)
    said = capsys.readouterr().err
    assert f"sage_kvt: backend is 'rdmaa' (from {origin}); allowed: auto, " in said
    assert "invalid" not in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (as_json(secret=SECRET)[:-1], "--kv-transfer-config is not JSON: EOF while parsing"),
        (
            f"'{as_json(secret=SECRET)}'",
            "--kv-transfer-config is **********; allowed: sage_kvt, sage_kvt:KEY=VALUE",
        ),
        (f"sagekvt:secret={SECRET}", "--kv-transfer-config is **********; allowed: sage_kvt, "),
        ("sage_kvt,backend=tcp", "--kv-transfer-config is 'sage_kvt,backend=tcp'; allowed: sage_kvt, "),
        (
            as_json(secret=SECRET).replace("kv_both", "both"),
            "kv_role is 'both' (from --kv-transfer-config); allowed: kv_producer, kv_both, kv_consumer",
        ),
        (
            as_json(secret=SECRET).replace("kv_role", "kv_roles"),
            "option 'kv_roles' (from --kv-transfer-config) is unknown; did you mean kv_role?",
        ),
        (
            json.dumps({"kv_connector": "sage_kvt", "kv_connector_extra_config": f"secret={SECRET}"}),
            "kv_connector_extra_config is ********** (from --kv-transfer-config); allowed: an object",
        ),
        (
            as_json("sage-kvt", secret=SECRET),
            "kv_connector is 'sage-kvt'; allowed: sage_kvt, SageKVConnector",
        ),
    ],
)
def test_what_vllm_cant_read_is_named_without_the_secret(
    capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    with pytest.raises(SystemExit):
        parsed(text)
    said = capsys.readouterr().err
    assert f"sage_kvt: {says}" in said
    assert SECRET not in said and "pydantic" not in said


def test_options_of_others_are_theirs() -> None:
    given = parsed(as_json("NixlConnector", backend="UCX")).kv_transfer_config
    assert given.kv_connector_extra_config == {"backend": "UCX"}
    elsewhere = {"kv_connector": "sage-kvt", "kv_role": "kv_both", "kv_connector_module_path": "a.fork"}
    assert parsed(json.dumps(elsewhere)).kv_transfer_config.kv_connector == "sage-kvt"


def test_what_vllm_says_of_others_stays_vllms(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("nixl", as_json("NixlConnector").replace("kv_both", "both")):
        with pytest.raises(SystemExit):
            parsed(text)
        said = capsys.readouterr().err
        assert "validation error" in said and "sage_kvt" not in said


@pytest.mark.parametrize(
    "text", [f"sage_kvt:secret={SECRET}", as_json(secret=SECRET), beside_another(secret=SECRET)]
)
def test_a_secret_reaches_the_workers_and_no_log(text: str) -> None:
    arguments = parsed(text)
    assert SECRET not in repr(arguments)
    config = arguments.kv_transfer_config
    assert SECRET not in repr(config) and SECRET not in str(EngineArgs(model="m", kv_transfer_config=config))
    there = pickle.loads(pickle.dumps(config)).kv_connector_extra_config
    options = there["connectors"][0]["kv_connector_extra_config"] if "connectors" in there else there
    assert KVTransportConfig.load(options).resolved_secret() == SECRET.encode()


#: What `LLM(…)` does with its arguments, in a process whose first EngineArgs they are.
FIRST_ENGINE_ARGS = """
import json, sys
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.utils.api_utils import get_non_default_args

given = json.loads(sys.argv[1])
given = given if isinstance(given, str) else KVTransferConfig(**given)
args = EngineArgs(model="m", kv_transfer_config=given)
print("logged:", get_non_default_args(args))
secret = args.kv_transfer_config.kv_connector_extra_config["secret"]
print("has", getattr(secret, "get_secret_value", lambda: secret)()[::-1])
"""


@pytest.mark.parametrize("given", [json.dumps(f"sage_kvt:secret={SECRET}"), as_json(secret=SECRET)])
def test_a_secret_is_hidden_before_plugins_are_loaded(given: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_ENGINE_ARGS, given], capture_output=True, text=True, check=True
    )
    assert f"has {SECRET[::-1]}" in done.stdout
    assert "logged: " in done.stdout and SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_secret_given_in_python_is_hidden_too(as_dict: bool) -> None:
    given = json.loads(as_json(secret=SECRET))
    arguments = EngineArgs(model="m", kv_transfer_config=given if as_dict else KVTransferConfig(**given))
    assert SECRET not in repr(arguments)
    with pytest.raises(ValueError, match="option 'sekret' \\(from kv_connector_extra_config\\) is unknown"):
        EngineArgs(model="m", kv_transfer_config=KVTransferConfig(**json.loads(as_json(sekret=SECRET))))
