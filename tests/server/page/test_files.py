"""The page's files and the load that it shows, without a browser."""

import re

import pytest

from loraplex.server.api.routes.page import page_files
from loraplex.server.auth.keys import KeyFile
from tests.server.tiny_server import make_model, running, settings

TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
TYPES["txt"] = "text/plain; charset=utf-8"
VENDOR = "vendor/"  # others' files, as they are


def test_the_page_is_served_under_a_strict_policy(server):
    answer = server.http().get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TYPES["html"]
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}, "nothing inline, nothing from elsewhere"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", sorted(page_files()))
def test_every_file_of_the_page_is_served_with_its_type(server, name):
    answer = server.http().get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == page_files()[name].content
    assert answer.headers["content-type"] == TYPES.get(name.rsplit(".")[-1], "image/svg+xml")


def test_whatever_a_file_names_is_there_and_nothing_is_inline(server):
    for name, file in page_files().items():
        if name.startswith(VENDOR):
            continue
        text = file.content.decode()
        named = re.findall(r'(?:src|href)="/page/([^"]+)"|from "\./([^"]+)"', text)
        assert {first or second for first, second in named} <= set(page_files()), name
        assert not re.search(r"\sstyle=|\son\w+=\"|<style|<script>|innerHTML|insertAdjacentHTML|eval\(", text), name
        addresses = set(re.findall(r"https?://[^\s\"'<>]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, f"{name} names {addresses}"


def test_an_unchanged_file_is_not_sent_again(server):
    with server.http() as http:
        etag = http.get("/page/app.js").headers["etag"]
        again = http.get("/page/app.js", headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")


def test_files_of_others_come_with_their_licence(server):
    scripts = [name for name in page_files() if name.startswith(VENDOR) and name.endswith(".js")]
    assert scripts
    for name in scripts:
        licence = server.http().get(f"/page/{name.removesuffix('.js')}.LICENSE.txt")
        assert "Permission is hereby granted" in licence.text


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2Fapp.py", "%2Fetc%2Fpasswd", "../app.py"])
def test_only_the_pages_files_are_served(server, name):
    answer = server.http().get(f"/page/{name}")
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_stats_count_what_the_engine_did(server):
    with server.http() as http:
        before = http.get("/v1/stats").json()
        body = {"model": "a", "prompt": "The protein folds", "max_tokens": 7, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        after = http.get("/v1/stats").json()
    assert after["new_tokens"] - before["new_tokens"] == 7
    assert after["time_s"] > before["time_s"]
    assert after["cache_blocks"] > 0


def test_stats_need_a_key_that_manages(root, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    user, manager = file.create(note="user")[0], file.create(note="manager", manage=True)[0]
    with running(make_model(root), settings(keys=file)) as server:
        statuses = [server.http(key).get("/v1/stats").status_code for key in (None, user, manager)]
        assert statuses == [401, 403, 200]
        assert server.http().get("/").status_code == 200, "the page itself asks for the key"
