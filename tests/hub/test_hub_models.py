"""Models from the hub, as every user meets it first: the real client against a stand-in, in processes of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from hub_client import Client
from standin import StandIn, Token

OTHER = "f" * 40


def test_a_model_is_downloaded_once_with_what_it_needs_and_nothing_else(hub: StandIn, client: Client, tiny: Path) -> None:
    (tiny / "2_Dense").mkdir()
    (tiny / "2_Dense" / "config.json").write_text("{}")
    (tiny / "2_Dense" / "model.safetensors").write_bytes(b"")
    commit = hub.add("models", "owner/tiny", tiny)
    [(name, path)] = client.find("owner/tiny")
    assert name == "owner/tiny"
    there = {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file()}
    assert there >= {"config.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md"}
    assert not there & {"onnx/model.onnx", "modeling.py", "training_args.bin"}
    assert Path(path) == client.cache / "models--owner--tiny" / "snapshots" / commit
    assert (Path(path) / "config.json").is_symlink()
    hub.requests.clear()
    again = client.find("owner/tiny", path, str(client.cache / "models--owner--tiny"))
    assert again == 3 * [("owner/tiny", path)]  # a folder of the cache goes by the model's name, not by the commit's
    assert {request.path for request in hub.requests} == {"/api/models/owner/tiny/revision/main"}


def test_a_revision_is_a_tag_or_a_commit(hub: StandIn, client: Client, tiny: Path, tmp_path: Path) -> None:
    old = shutil.copytree(tiny, tmp_path / "old")
    (old / "README.md").write_text("old")
    hub.add("models", "owner/tiny", tiny)
    hub.add("models", "owner/tiny", old, commit=OTHER, ref="v1")
    *found, (message, hint) = client.find("owner/tiny@v1", f"owner/tiny@{OTHER}", "owner/tiny@v2")
    for name, path in found:
        assert name == "owner/tiny"
        assert (Path(path) / "README.md").read_text() == "old"
    assert message == "model 'owner/tiny@v2': the hub has no such revision"
    assert hint.endswith("/owner/tiny/commits/main")


def test_what_is_not_there_and_what_is_private_get_the_same_answer(hub: StandIn, client: Client, tiny: Path) -> None:
    hub.add("models", "owner/secret", tiny, private=True)
    hub.tokens = {"stranger": Token(), "friend": Token(frozenset({"owner/secret"}))}
    names = ("owner/secret", "owner/nothing")
    for name, (message, hint) in zip(names, client.find(*names), strict=True):
        assert message == f"model '{name}': no such folder here, and on the hub no such model, or a private one"
        assert hint == "a private model needs a token: `hf auth login`, or HF_TOKEN in the environment"
    for message, hint in client.find(*names, HF_TOKEN="stranger"):
        assert message.endswith("or a private one that the token may not read")
        assert "hf auth login" in hint
    [(message, _)] = client.find("owner/secret", HF_TOKEN="misspelt")
    assert message == "model 'owner/secret': the hub does not accept the token"
    (client.home / "token").write_text("friend")  # as `hf auth login` leaves it
    assert client.find("owner/secret")[0][0] == "owner/secret"


def test_a_gated_model_says_where_access_is_asked_for(hub: StandIn, client: Client, tiny: Path) -> None:
    hub.add("models", "owner/gated", tiny, gated=True)
    hub.tokens = {"stranger": Token(), "friend": Token(frozenset({"owner/gated"}))}
    [(message, hint)] = client.find("owner/gated")
    assert message == "model 'owner/gated': gated, and no token was sent"
    assert hint.startswith(f"ask for access on {hub.endpoint}/owner/gated, then give a token: `hf auth login`, or HF_TOKEN")
    [(message, hint)] = client.find("owner/gated", HF_TOKEN="stranger")
    assert message == "model 'owner/gated': gated, and the token has no access to it"
    assert hint == f"ask for access on {hub.endpoint}/owner/gated with the account of the token"
    assert client.find("owner/gated", HF_TOKEN="friend")[0][0] == "owner/gated"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: StandIn, client: Client, tiny: Path) -> None:
    whole = (tiny / "model.safetensors").read_bytes() + bytes(12_000_000)  # the client keeps parts of 10 MiB
    (tiny / "model.safetensors").write_bytes(whole)
    hub.add("models", "owner/tiny", tiny)
    hub.breaks["model.safetensors"] = 11_000_000
    [(_, path)] = client.find("owner/tiny")
    assert (Path(path) / "model.safetensors").read_bytes() == whole
    assert [request.range for request in hub.asked("GET", "/model.safetensors")] == [None, "bytes=10485760-"]


def test_a_download_that_was_killed_goes_on_with_what_is_missing(hub: StandIn, client: Client, tiny: Path) -> None:
    commit = hub.add("models", "owner/tiny", tiny)
    hub.stalls["model.safetensors"] = threading.Event()
    place = client.cache / "models--owner--tiny" / "snapshots" / commit
    others = ["config.json", "modules.json", "tokenizer.json", "1_Pooling/config.json", "README.md"]
    command = [sys.executable, "-c", "import sys; from compress.models.source import find; find(sys.argv[1])", "owner/tiny"]
    with subprocess.Popen(command, env=client.variables(), cwd=client.home) as process:
        assert hub.stalls["model.safetensors"].wait(60)
        give_up = time.monotonic() + 60
        while not all((place / name).exists() for name in others) and time.monotonic() < give_up:
            time.sleep(0.05)
        process.kill()
    del hub.stalls["model.safetensors"]
    hub.requests.clear()
    [(_, path)] = client.find("owner/tiny")
    assert (Path(path) / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert len(hub.asked("GET", "/model.safetensors")) == 1
    assert not any(hub.asked("GET", f"/{name}") for name in others)


def test_offline_the_cache_is_used_and_what_it_lacks_is_named(hub: StandIn, client: Client, tiny: Path) -> None:
    hub.add("models", "owner/tiny", tiny)
    [(message, hint)] = client.find("owner/tiny", HF_HUB_OFFLINE="1")
    assert message.startswith("model 'owner/tiny': HF_HUB_OFFLINE is set, and the hub's cache does not hold all of it")
    assert hint == "download it once with the network: HF_HUB_OFFLINE=0 hf download owner/tiny"
    assert hub.requests == []
    found = client.find("owner/tiny")
    hub.requests.clear()
    assert client.find("owner/tiny", HF_HUB_OFFLINE="1") == found
    assert hub.requests == []
    unreachable = Client("http://localhost:9", client.home)
    first, (message, _) = unreachable.find("owner/tiny", "owner/other")
    assert [first] == found
    assert message.startswith("model 'owner/other': no such folder here, and it cannot be downloaded from http://localhost:9 (")


def test_a_link_to_nothing_is_downloaded_again_or_refused_by_name(hub: StandIn, client: Client, tiny: Path) -> None:
    hub.add("models", "owner/tiny", tiny)
    [(_, path)] = client.find("owner/tiny")
    lost = Path(path) / "model.safetensors"
    lost.resolve().unlink()
    assert lost.is_symlink()
    (message, hint), (offline, _) = client.find(path, "owner/tiny", HF_HUB_OFFLINE="1")
    assert message.startswith(f"{lost}: a link to ../../blobs/")
    assert hint == "give owner/tiny instead of the folder: that downloads what is missing"
    assert "does not hold all of it" in offline
    assert client.find("owner/tiny") == [("owner/tiny", path)]
    assert lost.read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_pickled_weights_are_refused_and_never_downloaded(hub: StandIn, client: Client, tiny: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(tiny, tmp_path / "dense")
    (dense / "2_Dense").mkdir()
    entries = json.loads((dense / "modules.json").read_text())
    entries.append({"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (dense / "modules.json").write_text(json.dumps(entries))
    (tiny / "model.safetensors").unlink()
    files = {"owner/tiny": tiny / "pytorch_model.bin", "owner/dense": dense / "2_Dense" / "pytorch_model.bin"}
    for (name, file), folder in zip(files.items(), (tiny, dense), strict=True):
        file.write_bytes(b"a pickle")
        hub.add("models", name, folder)
    names = ("pytorch_model.bin", "2_Dense/pytorch_model.bin")
    for model, file, (message, hint) in zip(files, names, client.find(*files), strict=True):
        assert message == f"model '{model}': its weights are pickles ({file}), which can run code when opened"
        assert hint == f"write them as safetensors first: compress convert {model} --to FOLDER"
    assert hub.asked("GET", ".bin") == []
