# SPDX-License-Identifier: Apache-2.0
"""``deploy/kubernetes`` as kustomize makes it: valid by the API's schemas, and what our programs and vLLM's accept.

It is applied to no cluster here.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
import yaml

from sage_kv_connector.config import SECRET_ENV, KVTransportConfig

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make test-fleets installs it")

ROOT = Path(__file__).resolve().parent.parent
SERVING = ("deploy/kubernetes/base", "deploy/kubernetes/ascend", "deploy/kubernetes/rdma")
BUILDS = (*SERVING, "dashboards")
#: Of the API's schemas that are known here, an old one and the newest.
VERSIONS = ("1.28", "1.37")
SIDES = ("prefill", "decode")


class Built(NamedTuple):
    """What kustomize makes of one folder."""

    objects: list[dict[str, Any]]

    def one(self, kind: str, name: str) -> dict[str, Any]:
        """By the name in its file: kustomize puts a digest behind those of what it generates."""
        kinds = [o for o in self.objects if o["kind"] == kind]
        (found,) = (o for o in kinds if o["metadata"]["name"].startswith(name))
        return found

    def pod(self, side: str) -> dict[str, Any]:
        spec: dict[str, Any] = self.one("StatefulSet", side)["spec"]["template"]["spec"]
        return spec


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    folder = tmp_path_factory.mktemp("manifests")
    for name in ("deploy", "dashboards"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "deploy/kubernetes/base/kvt.secret").write_text("c2VjcmV0IG9mIGEgdGVzdA==\n")  # git has none
    made = {}
    for name in BUILDS:
        done = subprocess.run([kubectl, "kustomize", str(folder / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[name] = Built(list(yaml.safe_load_all(done.stdout)))
    return made


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BUILDS)
def test_every_object_is_valid(builds: dict[str, Built], name: str, version: str) -> None:
    objects = builds[name].objects
    assert objects
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)


def test_a_wrong_field_would_be_seen(builds: dict[str, Built]) -> None:
    wrong = builds[SERVING[0]].one("StatefulSet", "prefill") | {"spec": {"replicas": "two"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in pod["containers"] if one["name"] == name)
    return dict(found)


def environment(of: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in of["env"]}


def options(built: Built, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KVTransportConfig:
    """What ``--kv-transfer-config`` stands for in the pod. Raises as the server would."""
    (text,) = (
        arg.partition("=")[2]
        for arg in container(built.pod(side), "vllm")["args"]
        if arg.startswith("--kv-transfer-config=")
    )
    word, _, rest = text.partition(":")
    assert word == "sage_kvt"
    mounted = tmp_path / "kv_transport.yaml"
    mounted.write_text(built.one("ConfigMap", "kv-transport")["data"]["kv_transport.yaml"])
    rest = rest.replace("/etc/sage-kvt/kv_transport.yaml", str(mounted)).replace("$(POD_IP)", "10.42.0.17")
    monkeypatch.setenv(SECRET_ENV, "of a test")
    return KVTransportConfig.from_words(rest.split(","))


@pytest.mark.parametrize("name", SERVING)
def test_the_options_are_valid_and_their_ports_open(
    builds: dict[str, Built], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = builds[name]
    prefill, decode = (options(built, side, tmp_path, monkeypatch) for side in SIDES)
    assert (prefill.security, prefill.backend, prefill.integrity) == (
        decode.security,
        decode.backend,
        decode.integrity,
    )
    wanted = {prefill.port, prefill.bootstrap_port}
    declared = {port["containerPort"] for port in container(built.pod("prefill"), "vllm")["ports"]}
    served = {port["port"] for port in built.one("Service", "prefill")["spec"]["ports"]}
    to_decode: set[int] = set()
    for rule in built.one("NetworkPolicy", "prefill")["spec"]["ingress"]:
        source = rule["from"][0].get("podSelector", {}).get("matchLabels", {})
        if source.get("app.kubernetes.io/name") == "decode":
            for port in rule["ports"]:
                to_decode |= set(range(port["port"], port.get("endPort", port["port"]) + 1))
    assert wanted <= declared and wanted <= served and wanted <= to_decode
    assert decode.port == 0, "nobody dials decode"


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("side", SIDES)
def test_what_a_container_is_told_of_lies_where_it_is_mounted(
    builds: dict[str, Built], name: str, side: str
) -> None:
    pod = builds[name].pod(side)
    server, exporter = container(pod, "vllm"), container(pod, "exporter")
    folders = set()
    for one in (server, exporter):
        mounts = {mount["name"]: PurePosixPath(mount["mountPath"]) for mount in one["volumeMounts"]}
        told = environment(one)
        secret = PurePosixPath(told["SAGE_KVT_SECRET_FILE"])
        assert secret.parent == mounts["secret"]
        assert secret.name in builds[name].one("Secret", "kv-transport")["data"]
        folder = PurePosixPath(told["SAGE_KVT_TELEMETRY_DIR"])
        assert mounts["telemetry"] in folder.parents, "the mount itself is open to every user, and is refused"
        folders.add(folder)
    assert len(folders) == 1
    (mode,) = (v["secret"]["defaultMode"] for v in pod["volumes"] if v["name"] == "secret")
    assert mode & 0o077 == 0


@pytest.mark.parametrize("name", SERVING)
def test_the_router_asks_every_server(builds: dict[str, Built], name: str) -> None:
    from vllm_router.launch_router import parse_router_args

    built = builds[name]
    args = container(built.one("Deployment", "router")["spec"]["template"]["spec"], "router")["args"]
    asked = parse_router_args(args)
    for side, urls in zip(SIDES, ([url for url, *_ in asked.prefill_urls], asked.decode_urls), strict=True):
        server = container(built.pod(side), "vllm")
        (port,) = (p["containerPort"] for p in server["ports"] if p["name"] == "http")
        replicas = built.one("StatefulSet", side)["spec"]["replicas"]
        assert urls == [f"http://{side}-{n}.{side}:{port}" for n in range(replicas)]
        assert f"--port={port}" in server["args"]
    assert asked.vllm_pd_disaggregation


def test_the_server_takes_its_arguments(builds: dict[str, Built]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for side in SIDES:
        arguments = container(builds[SERVING[0]].pod(side), "vllm")["args"]
        assert parser.parse_args([a for a in arguments if not a.startswith("--kv-transfer-config")]).port
