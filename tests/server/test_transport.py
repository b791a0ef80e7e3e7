"""TLS, certificates of clients, and pages of other origins."""

import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from loraplex.errors import ConfigError
from loraplex.server.keys import KeyFile
from loraplex.server.settings import NetworkSettings
from tests.parts import require
from tests.server.tiny_server import TIMEOUT_S, Running, make_model, running, settings

ORIGIN, OTHER = "https://page.example", "https://elsewhere.example"
BODY = {"model": "a", "prompt": "abc", "max_tokens": 3, "temperature": 0}


def certificate(folder: Path, name: str, *extensions: str) -> tuple[str, str]:
    """A certificate that has signed itself, and its key."""
    files = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for extension in extensions:
        command += ["-addext", extension]
    command += ["-days", "2", "-subj", f"/CN={name}", "-out", files[0], "-keyout", files[1]]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return files


@pytest.fixture(scope="module")
def server_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    require("openssl")
    return certificate(tmp_path_factory.mktemp("tls"), "server", "subjectAltName=IP:127.0.0.1")


def network(**options) -> NetworkSettings:
    return NetworkSettings(port=0, drain_s=10, **options)


def secure(server: Running, trusted: str, *client: str) -> httpx.Client:
    """A client that trusts one certificate, and shows its own if it has one."""
    context = ssl.create_default_context(cafile=trusted)
    if client:
        context.load_cert_chain(*client)
    return httpx.Client(base_url=https(server), verify=context, timeout=TIMEOUT_S)


def https(server: Running) -> str:
    return f"https://127.0.0.1:{server.server.port}"


def test_tls(root, server_files):
    files = dict(zip(("tls_certificate", "tls_key"), server_files, strict=True))
    with running(make_model(root), replace(settings(), network=network(**files))) as server:
        with secure(server, server_files[0]) as http:
            assert http.get("/health").status_code == 200
            expected = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
        own = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=server_files[0]))
        with openai.OpenAI(base_url=f"{https(server)}/v1", api_key="none", http_client=own, max_retries=0) as client:
            pieces = [chunk.choices[0].text for chunk in client.completions.create(**BODY, stream=True)]
            assert "".join(pieces) == expected
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"{https(server)}/health", timeout=TIMEOUT_S)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", timeout=TIMEOUT_S)


def test_clients_need_a_certificate_of_the_authority(root, server_files, tmp_path):
    known = certificate(tmp_path, "known", "basicConstraints=critical,CA:TRUE")
    stranger = certificate(tmp_path, "stranger")
    files = dict(zip(("tls_certificate", "tls_key"), server_files, strict=True)) | {"tls_client_ca": known[0]}
    with running(make_model(root), replace(settings(), network=network(**files))) as server:
        with secure(server, server_files[0], *known) as http:
            assert http.post("/v1/completions", json=BODY).status_code == 200
        for shown in ((), stranger):
            with secure(server, server_files[0], *shown) as http, pytest.raises(httpx.TransportError):
                http.get("/health")


def test_a_key_needs_its_certificate(server_files):
    with pytest.raises(ConfigError, match="tls_certificate, tls_key: give both"):
        network(tls_certificate=server_files[0])
    with pytest.raises(ConfigError, match="tls_key is '/no/such', which is no file"):
        network(tls_certificate=server_files[0], tls_key="/no/such")


@pytest.fixture(scope="module")
def called_from_pages(root, tmp_path_factory):
    """A server with keys whose API one other origin may call, and a key."""
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    key, _ = keys.create()
    with running(make_model(root), replace(settings(keys=keys), network=network(cors_origins=(ORIGIN,)))) as server:
        yield server, key


def preflight(server: Running, origin: str) -> httpx.Response:
    """What a browser asks before it sends JSON with a key."""
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    return server.http().options("/v1/chat/completions", headers=headers)


def test_preflight_of_an_allowed_origin(called_from_pages):
    answer = preflight(called_from_pages[0], ORIGIN)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(answer.headers["access-control-allow-headers"].split(", "))
    assert "access-control-allow-credentials" not in answer.headers


def test_preflight_of_another_origin_is_refused(called_from_pages):
    answer = preflight(called_from_pages[0], OTHER)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("origin", "allowed"), [(ORIGIN, ORIGIN), (OTHER, None), (None, None)])
@pytest.mark.parametrize("stream", [False, True])
def test_answers_can_be_read_by_the_allowed_origin_alone(called_from_pages, origin, allowed, stream):
    server, key = called_from_pages
    headers = {} if origin is None else {"origin": origin}
    answer = server.http(key).post("/v1/completions", json=BODY | {"stream": stream}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers.get("access-control-allow-origin") == allowed
    refusal = server.http().post("/v1/completions", json=BODY, headers=headers)
    assert (refusal.status_code, refusal.headers.get("access-control-allow-origin")) == (401, allowed)
    if allowed:
        assert "x-request-id" in refusal.headers["access-control-expose-headers"]


def test_without_origins_no_page_elsewhere_may_call(server):
    assert preflight(server, ORIGIN).status_code == 405
    answer = server.http().post("/v1/completions", json=BODY, headers={"origin": ORIGIN})
    assert not any(name.startswith("access-control") for name in answer.headers)
