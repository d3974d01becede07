"""A model directory that somebody else made: only ordinary files inside it are read and copied."""

import os
import socket

import pytest

from hark.models.directory import LARGEST_FILE, check_directory, files_to_copy
from hark.models.policy import PolicyError


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "hark.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        (directory / name).write_text("{}")
    return directory


def test_an_export_copies_the_files_of_a_model_directory_that_hold_no_weights_and_no_digests_of_them(model):
    (model / "subdirectory").mkdir()
    assert [file.name for file in files_to_copy(model)] == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "/etc"])
def test_a_link_that_leaves_a_model_directory_is_refused_before_anything_is_copied(model, target):
    (model.parent / "secret").write_text("the user's own")
    (model / "LICENSE").symlink_to(target)
    with pytest.raises(PolicyError, match="LICENSE: a link that leaves the model directory"):
        files_to_copy(model)


def test_links_within_a_model_directory_and_of_the_hubs_cache_are_followed(tmp_path):
    repository = tmp_path / "models--someone--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "4f2a").write_text("{}")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/4f2a")
    (snapshot / "again.json").symlink_to("config.json")
    assert {file.name for file in files_to_copy(snapshot)} == {"config.json", "again.json"}
    (snapshot / "other.json").symlink_to("../../refs")
    with pytest.raises(PolicyError, match="other.json: a link that leaves"):
        check_directory(snapshot)


def test_a_directory_that_merely_lies_in_one_called_snapshots_has_no_blobs(tmp_path):
    model = tmp_path / "mine" / "snapshots" / "a"
    model.mkdir(parents=True)
    (tmp_path / "mine" / "blobs").mkdir()
    (tmp_path / "mine" / "blobs" / "x").write_text("")
    (model / "config.json").symlink_to("../../blobs/x")
    with pytest.raises(PolicyError, match="leaves the model directory"):
        check_directory(model)


def test_a_pipe_and_a_socket_are_refused_without_being_opened(model):
    os.mkfifo(model / "merges.txt")
    with pytest.raises(PolicyError, match="merges.txt: a pipe, a socket or a device"):
        check_directory(model)
    (model / "merges.txt").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(model / "s"))
        with pytest.raises(PolicyError, match="a pipe, a socket or a device"):
            check_directory(model)


def test_a_circle_of_links_and_a_link_to_nothing_are_errors_of_one_line(model):
    for name, target in (("a", "b"), ("b", "a")):
        (model / name).symlink_to(target)
    with pytest.raises(PolicyError, match=r"/[ab]: cannot be read"):
        check_directory(model)
    (model / "a").unlink()
    with pytest.raises(PolicyError, match="/b: cannot be read"):
        check_directory(model)


def test_a_file_of_absurd_size_is_refused_and_weights_may_have_any_size(model):
    for name in ("model.safetensors", "vocab.json"):
        with (model / name).open("wb") as file:
            file.truncate(LARGEST_FILE + 1)  # a hole, which takes no space
    with pytest.raises(PolicyError, match="vocab.json: has 256 MB; expected at most 256 MB"):
        check_directory(model)


def test_the_templates_beside_a_tokenizer_are_checked_too(model):
    (model / "additional_chat_templates").mkdir()
    os.mkfifo(model / "additional_chat_templates" / "tool.jinja")
    with pytest.raises(PolicyError, match="tool.jinja: a pipe"):
        check_directory(model)
