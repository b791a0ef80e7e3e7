"""TLS, certificates of clients, and pages of other origins."""

import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from loraplex.errors import ConfigError
from loraplex.server.api.api_errors import ApiError
from loraplex.server.auth.access import OriginCheck
from loraplex.server.auth.keys import KeyFile
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
    assert answer.status_code == 403
    assert not any(name.startswith("access-control") for name in answer.headers)
    own = server.http().post("/v1/completions", json=BODY, headers={"origin": server.url})
    assert own.status_code == 200


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_page_may_send_unasked_is_no_request(server, media):
    headers = {} if media is None else {"content-type": media}
    content = b'{"lora_name": "a"}'
    answer = server.http().post("/v1/unload_lora_adapter", content=content, headers=headers)
    assert answer.status_code == 415
    assert "a" in server.model.names()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", "localhost.x"]
)
def test_names_that_were_bound_to_this_machine_are_refused(server, host):
    headers = {"host": host.format(port=server.server.port)}
    for method, path in (
        ("DELETE", "/v1/adapters/a"),
        ("GET", "/v1/models"),
        ("GET", "/"),
        ("POST", "/v1/completions"),
    ):
        answer = server.http().request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert "a" in server.model.names()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:80", "[::1]:8000", "localhost."])
def test_own_names_are_taken(server, host):
    assert server.http().get("/v1/models", headers={"host": host}).status_code == 200


def test_hosts_can_be_allowed():
    def is_allowed(called: str, **options) -> bool:
        check = OriginCheck(NetworkSettings(**options))
        try:
            check.check("POST", [(b"host", called.encode())])
        except ApiError:
            return False
        return True

    assert is_allowed("lab.example:8000", allowed_hosts=("Lab.example",))
    assert not is_allowed("other.example", allowed_hosts=("lab.example",))
    assert is_allowed("other.example", allowed_hosts=("*",))
    assert is_allowed("192.168.0.5", host="0.0.0.0")
    assert is_allowed("[fe80::1]:80", host="::")
    assert not is_allowed("evil.example", host="0.0.0.0")
    with pytest.raises(ApiError):
        OriginCheck(NetworkSettings()).check("GET", [(b"host", b"localhost"), (b"host", b"evil.example")])
    for origin in (b"null", b"http://evil.example", b"http://[", b""):
        with pytest.raises(ApiError, match="may not call"):
            OriginCheck(NetworkSettings()).check("POST", [(b"host", b"localhost"), (b"origin", origin)])


def test_with_keys_any_name_may_stand_in_host(called_from_pages):
    server, key = called_from_pages
    assert server.http(key).get("/v1/models", headers={"host": "api.example"}).status_code == 200
