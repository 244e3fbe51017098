"""Which files on the server a deployment may log in with."""

import os
from pathlib import Path

import pytest
from tests.server.deploy.conftest import Site, generate

from fleetwire_server.deploy.errors import DeployError
from fleetwire_server.deploy.ssh_keys import read_private_key


def refusal(given: str | None, directory: Path) -> DeployError:
    with pytest.raises(DeployError) as caught:
        read_private_key(given, directory)
    assert caught.value.code == "invalid"
    assert caught.value.step == "key"
    return caught.value


def test_a_key_is_named_by_its_path_or_within_the_directory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = site.terms.key_directory
    monkeypatch.setenv("HOME", str(directory.parent))
    for given in ("id", str(directory / "id"), "~/keys/id", "../keys/id"):
        assert read_private_key(given, directory).get_fingerprint() == site.user_key.get_fingerprint()


def test_without_a_key_it_is_said_which_there_are(site: Site) -> None:
    directory = site.terms.key_directory
    (directory / "unpaired").write_text("x")
    for given in (None, "absent", "absent\x00", "~nobody-here/x"):
        error = refusal(given, directory)
        assert error.reason == "key_missing"
        assert "there are id" in error.message
        assert "unpaired" not in error.message
    assert "ssh_key_dir" in refusal("id", directory / "absent").message


def test_what_lies_outside_is_refused_also_behind_a_link(site: Site) -> None:
    directory = site.terms.key_directory
    outside = directory.parent / "outside"
    generate().write_private_key(str(outside))
    (directory / "link").symlink_to(outside)
    for given in (str(outside), "../outside", "link", "/etc/hostname"):
        error = refusal(given, directory)
        assert error.reason == "key_refused"
        assert "outside the key directory" in error.message


def test_what_is_no_key_is_refused_and_not_quoted(site: Site) -> None:
    directory = site.terms.key_directory
    os.mkfifo(directory / "fifo")
    (directory / "directory").mkdir()
    (directory / "text").write_text("a secret of another kind")
    (directory / "large").write_bytes(bytes(100_000))
    generate().write_private_key(str(directory / "locked"), "pkcs8-pem", passphrase="opens it")
    said = {
        name: refusal(name, directory).message for name in ("fifo", "directory", "text", "large", "locked", "id.pub")
    }
    assert "not a regular file" in said["fifo"]
    assert "not a regular file" in said["directory"]
    assert "not a private SSH key" in said["text"]
    assert "too large" in said["large"]
    assert "passphrase" in said["locked"]
    assert "not a private SSH key" in said["id.pub"]
    assert not any("secret" in message for message in said.values())
