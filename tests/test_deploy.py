"""deploy/: what the images and manifests call exists, takes the options it is given, and fits together."""

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from obsdiff.cli import app
from obsdiff.runtime import triton
from obsdiff.runtime.ray_serve import Options
from obsdiff.runtime.server.service import GRACE

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCUMENTS = {
    document["kind"]: document
    for path in MANIFESTS
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
}
CLI = typer.main.get_command(app)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parse(arguments: list[str]) -> dict[str, Any]:
    """The options that a call of obsdiff sets; click raises for what it does not know."""
    assert isinstance(CLI, click.Group) or hasattr(CLI, "commands")
    command = CLI.commands[arguments[0]]  # type: ignore[attr-defined]
    return command.make_context(arguments[0], list(arguments[1:])).params


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines if line.strip()]


def containers(value: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every (pod, container) in a manifest."""
    if isinstance(value, dict):
        for container in value.get("containers", []):
            yield value, container
        for entry in value.values():
            yield from containers(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from containers(entry)


def test_everything_is_looked_at() -> None:
    assert [path.name for path in DOCKERFILES] == [
        "Dockerfile", "Dockerfile.cuda", "Dockerfile.ray", "Dockerfile.triton",
    ]  # fmt: skip
    assert set(DOCUMENTS) == {"Deployment", "Service", "ServingRuntime", "InferenceService", "RayService"}
    assert len(commands((DEPLOY / "README.md").read_text())) == 10


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_and_installs_extras_that_exist(path: Path) -> None:
    known = {"FROM", "ARG", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    found = instructions(path)
    assert {word for word, _ in found} <= known
    for word, rest in found:
        if word == "COPY" and "--from" not in rest:
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            assert sources
            assert all((ROOT / source).exists() for source in sources)
    commands = " ".join(rest for word, rest in found if word == "RUN")
    extras = {extra for group in re.findall(r"src\[([a-z,-]+)\]", commands) for extra in group.split(",")}
    assert "serve" in extras
    assert extras <= set(PROJECT["optional-dependencies"])
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name, version in re.findall(r"\b([a-z]+)==([0-9.]+)", commands):
        assert pinned[name] == version
    assert any((word, rest) == ("USER", "1000") for word, rest in found) or path.name == "Dockerfile.ray"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_starts_the_server(name: str) -> None:
    words = dict(instructions(DEPLOY / name))
    assert json.loads(words["ENTRYPOINT"])[0] in PROJECT["scripts"]
    options = parse(json.loads(words["CMD"]))
    assert options["bundles"] == ["/bundle"]
    assert options["host"] == "0.0.0.0"  # noqa: S104  a container's network is its own
    assert str(options["port"]) == words["EXPOSE"]
    assert options["device"] == ("cuda" if name.endswith("cuda") else None)
    check = json.loads(words["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[2], name, "exec")
    assert f"127.0.0.1:{options['port']}/health/ready" in check[2]


@pytest.mark.parametrize("kind", sorted(DOCUMENTS))
def test_a_container_mounts_volumes_that_its_pod_has(kind: str) -> None:
    for pod, container in containers(DOCUMENTS[kind]):
        volumes = [volume["name"] for volume in pod.get("volumes", [])]
        mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
        assert sorted(mounts) == sorted(volumes)
        image = container["image"]
        built = re.findall(r"-t (\S+)", " ".join(path.read_text() for path in DOCKERFILES))
        assert image.removesuffix(":latest") in built


def test_the_deployment_serves_with_options_that_exist() -> None:
    deployment, service = DOCUMENTS["Deployment"]["spec"], DOCUMENTS["Service"]["spec"]
    ((pod, container),) = containers(deployment)
    options = parse(container["args"])
    assert options["bundles"] == ["default=/bundles/bundle"]
    assert options["host"] == "0.0.0.0"  # noqa: S104
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": options["port"]}
    assert service["ports"][0]["targetPort"] in ports
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(options["api_key_file"].parent) in mounts
    assert str(Path(options["bundles"][0].partition("=")[2]).parent) in mounts
    assert pod["terminationGracePeriodSeconds"] > options["deadline"] + GRACE


def test_the_probes_ask_routes_that_the_server_has() -> None:
    from obsdiff.runtime.server.app import create_app
    from obsdiff.runtime.server.messages import Settings
    from obsdiff.runtime.server.service import Service

    routes = set(create_app(Service({}, Settings(""))).openapi()["paths"])
    ((_, container),) = containers(DOCUMENTS["Deployment"])
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    annotations = DOCUMENTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert {"/health/live", "/health/ready", annotations["prometheus.io/path"]} <= routes
    assert int(annotations["prometheus.io/port"]) == container["ports"][0]["containerPort"]


def test_kserve_finds_the_runtime_its_port_and_its_format() -> None:
    runtime, service = DOCUMENTS["ServingRuntime"], DOCUMENTS["InferenceService"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in [entry["name"] for entry in runtime["spec"]["supportedModelFormats"]]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    ((_, container),) = containers(runtime)
    options = dict(argument.removeprefix("--").split("=") for argument in container["args"][1:])
    assert (container["name"], container["args"][0]) == ("kserve-container", "tritonserver")
    assert options["model-repository"] == "/mnt/models", "where KServe puts what storageUri names"
    assert int(options["http-port"]) == container["ports"][0]["containerPort"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": int(options["http-port"])}
    assert options["metrics-port"] == runtime["spec"]["annotations"]["prometheus.kserve.io/port"]


def test_the_ray_service_gives_the_application_arguments_that_it_takes() -> None:
    spec = DOCUMENTS["RayService"]["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    (application,) = config["applications"]
    assert application["import_path"] == "obsdiff.runtime.ray_serve:app"
    options = Options.model_validate(application["args"])
    assert options.max_replicas >= options.min_replicas
    assert config["http_options"]["request_timeout_s"] > options.deadline
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    ((pod, container),) = containers(workers)
    assert pod["terminationGracePeriodSeconds"] > options.deadline + GRACE
    assert workers["maxReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"]) >= (
        options.max_replicas * options.gpus
    )
    assert str(Path(options.bundle).parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    version = spec["rayClusterConfig"]["rayVersion"]
    assert f"ARG RAY={version}-" in (DEPLOY / "Dockerfile.ray").read_text()


def commands(text: str) -> list[list[str]]:
    """What a user is told to type, by line, without comments and variables."""
    lines = re.findall(r"^(?:#   )?((?:obsdiff|serve|kubectl|docker) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("path", [DEPLOY / "README.md", *DOCKERFILES, *MANIFESTS], ids=lambda path: path.name)
def test_what_a_reader_is_told_to_type_is_right(path: Path) -> None:
    for program, *arguments in commands(path.read_text(encoding="utf-8")):
        if program == "obsdiff":
            assert parse(arguments)
        elif program == "serve":
            assert arguments[:2] == ["run", "obsdiff.runtime.ray_serve:app"]
            assert Options.model_validate(dict(argument.split("=") for argument in arguments[2:]))
        for option, name in itertools.pairwise(arguments):
            if program in ("docker", "kubectl") and option == "-f":
                assert (ROOT / name).is_file()


def test_the_table_of_inputs_is_tritons() -> None:
    table = [line for line in (DEPLOY / "README.md").read_text().splitlines() if line.startswith("| ")]
    names = [name for line in table[1:-1] for name in line.split(" | ")[0].strip("| ").split(", ")]
    assert names == list(triton.INPUTS)
    assert f"up to {triton.DELAY // 1000} ms" in (DEPLOY / "README.md").read_text()
    assert f"more than {triton.QUEUE} that wait" in (DEPLOY / "README.md").read_text()
