"""Who gets in, and to whom the page speaks: passwords, and a public address that nobody asks for unless told to."""

import socket

import pytest
from typer.testing import CliRunner

from qgen.cli import app
from qgen.web.app import Settings

httpx = pytest.importorskip("httpx")
gradio = pytest.importorskip("gradio")
pytest.importorskip("diffusers", reason="the shipped model is a diffusers pipeline: install qgen-diffusion[diffusers]")


@pytest.fixture
def tunnels(monkeypatch):
    """Calls of what asks Gradio's servers for a public address, which here answers by itself."""
    calls = []

    def setup_tunnel(**where):
        calls.append(where)
        return "https://stub.example"

    monkeypatch.setattr("gradio.networking.setup_tunnel", setup_tunnel)
    return calls


@pytest.fixture
def away(monkeypatch):
    """Connections that anything in this process opened to another computer."""
    found, connect = [], socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            found.append(address)
            raise OSError("no network in tests")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return found


def test_a_password_keeps_every_door(serve_page, tmp_path):
    settings = Settings(tmp_path / "work", (tmp_path,), prepare=False)
    with serve_page(settings, auth=[("ada", "s3cret"), ("bob", "0ther")]) as (desk, address, _):
        address = address.rstrip("/")
        job = desk.jobs.submit("heavy", "x", {}, lambda job: None)
        picture = job.folder / "picture.png"
        picture.write_bytes(b"x")
        doors = (
            ("GET", "/config", {}),
            ("POST", "/gradio_api/call/generate", {"json": {"data": []}}),
            ("POST", "/gradio_api/call/job", {"json": {"data": [job.id]}}),
            ("POST", "/gradio_api/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "x"}}),
            ("GET", f"/gradio_api/file={picture}", {}),
            ("GET", "/gradio_api/info", {}),
        )
        for method, path, body in doors:
            assert httpx.request(method, address + path, **body).status_code == 401, path
        assert httpx.post(f"{address}/login", data={"username": "ada", "password": "wrong"}).status_code == 400
        with httpx.Client() as ada:
            assert ada.post(f"{address}/login", data={"username": "ada", "password": "s3cret"}).status_code == 200
            assert ada.get(f"{address}/config").status_code == 200
            assert ada.get(f"{address}/gradio_api/file={picture}").content == b"x"
        client = pytest.importorskip("gradio_client").Client(address, auth=("bob", "0ther"), verbose=False)
        assert client.predict(job.id, api_name="/job")["id"] == job.id


def test_nobody_is_asked_for_a_public_address_unless_told_to(serve_page, tmp_path, tunnels, away):
    with serve_page(Settings(tmp_path / "work", prepare=False)) as (_, address, _script):
        assert httpx.get(address).status_code == 200
    assert tunnels == [] == away


def test_share_asks_for_one_and_names_it(serve_page, tmp_path, tunnels, away):
    with serve_page(Settings(tmp_path / "work", prepare=False), share=True) as (desk, address, _script):
        assert len(tunnels) == 1 and str(tunnels[0]["local_port"]) in address
        assert desk.page.share_url == "https://stub.example"
    assert away == []


class Served(Exception):
    """Stands for a server that runs."""


@pytest.fixture
def asked(monkeypatch):
    """A function: (settings, options) with which `qgen web ARGS` would serve."""
    seen = []

    def serve(settings, **options):
        seen.append((settings, options))
        raise Served

    monkeypatch.setattr("qgen.web.app.serve", serve)

    def run(*args, env=None):
        seen.clear()
        done = CliRunner().invoke(app, ["web", *map(str, args)], env=env)
        return seen[0] if seen else done

    return run


def test_what_is_off_unless_asked(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, options = asked("--work", tmp_path)
    assert (options["host"], options["share"], options["auth"]) == ("127.0.0.1", False, None)
    assert settings.roots == (tmp_path,) and settings.hub
    for words in (["--listen"], ["--share"], ["--host", "0.0.0.0"]):
        settings, options = asked("--work", tmp_path, *words)
        assert settings.roots == () and not settings.hub, "strangers reach no folder and no hub that nobody named"
        assert options["share"] == ("--share" in words)
        assert options["host"] == ("127.0.0.1" if "--share" in words else "0.0.0.0")
    settings, options = asked(
        "--work", tmp_path, "--share", "--root", tmp_path, "--hub", "--auth", "a:b:c", "--auth", "d:e"
    )
    assert settings.roots == (tmp_path,) and settings.hub and options["auth"] == [("a", "b:c"), ("d", "e")]
    assert asked(env={"QGEN_WEB_AUTH": "eve:pass"})[1]["auth"] == [("eve", "pass")]


@pytest.mark.parametrize("word", ["nocolon", ":password", "user:"])
def test_a_password_that_is_none_is_not_repeated(asked, word):
    done = asked("--auth", word)
    assert (
        done.exit_code == 2 and "user:password" in done.stderr and word not in done.stderr.replace("user:password", "")
    )
