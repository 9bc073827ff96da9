"""Options that do not fit together are refused before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.common.errors import UserError
from compress.serve.settings import Limits, RuntimeOptions, ServeOptions, is_loopback, named_models, whole_numbers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_a_public_address_needs_a_key_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(UserError, match="reachable from other machines"):
        ServeOptions(host=host).check()
    ServeOptions(host=host, key_variable="KEY").check()
    ServeOptions(host=host, without_key=True).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    ServeOptions(host=host).check()


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVE_KEY", raising=False)
    with pytest.raises(UserError, match="'SERVE_KEY' is not set"):
        ServeOptions(key_variable="SERVE_KEY").key()
    monkeypatch.setenv("SERVE_KEY", "secret\n")
    assert ServeOptions(key_variable="SERVE_KEY").key() == "secret"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ServeOptions(opened=RuntimeOptions(instances=0)), "--instances: must be at least 1"),
        (ServeOptions(limits=Limits(items=0)), "--max-items: must be at least 1"),
        (ServeOptions(limits=Limits(wait_seconds=float("nan"))), "--max-wait: must be above 0"),
        (ServeOptions(template="Find: "), "does not contain {instruction}"),
    ],
)
def test_values_out_of_range(options: ServeOptions, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        options.check()


def test_models_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    words = ["nano", "small=nano", str(folder), "random:nano,num_layers=2", f"it={folder}"]
    names = [(None, "nano"), ("small", "nano"), (None, str(folder)), (None, words[3]), ("it", str(folder))]
    assert named_models(words) == names


def test_numbers_of_a_list() -> None:
    assert whole_numbers("64, 128", "--dimensions") == (64, 128)
    assert whole_numbers("", "--dimensions") == ()
    with pytest.raises(UserError, match="'0' is no positive"):
        whole_numbers("64,0", "--dimensions")
