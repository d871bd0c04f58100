"""Helpers for files: atomic writes whatever is in the way, and reads of regular files only."""

import itertools
import os
import signal

import pytest

from minzero.files import is_hub_name, nearest, open_regular, write_atomically


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "link to nowhere"])
@pytest.mark.parametrize("name", ["status.json", "status.json.tmp"])
def test_a_file_is_written_whatever_lies_under_its_names(tmp_path, name, kind):
    """Nothing that somebody has put there is lost, and no link is followed."""
    place, other = tmp_path / name, tmp_path / "other"
    other.write_text("of the user")
    if kind == "folder":
        place.mkdir()
        (place / "file").write_text("of the user")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("other" if kind == "link" else "nowhere")
    signal.alarm(30)  # a pipe would block
    for content in (b"first", b"second"):
        write_atomically(tmp_path / "status.json", content)
        assert (tmp_path / "status.json").read_bytes() == content
    signal.alarm(0)
    assert other.read_text() == "of the user" and not (tmp_path / "nowhere").exists()
    assert (tmp_path / "status.json").is_file() and not os.path.lexists(tmp_path / "status.json.tmp")
    if kind == "folder":
        assert (tmp_path / f"{name}.moved1" / "file").read_text() == "of the user"


def test_only_a_regular_file_is_opened(tmp_path):
    """A pipe is not waited at, and a link is followed only where that is asked for."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, links in (("file", True), ("file", False), ("link", True)):
        file = open_regular(tmp_path / name, links=links)
        assert os.read(file, 100) == b"content"
        os.close(file)
    for name, links in itertools.product(("folder", "pipe", "/dev/null"), (True, False)):
        with pytest.raises(OSError, match="folder, pipe or device, not a regular file"):
            open_regular(tmp_path / name, links=links)
    with pytest.raises(OSError, match=r"found a link, .*not a regular file"):
        open_regular(tmp_path / "link", links=False)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("gpt2", True), ("openai-community/gpt2", True), ("Qwen/Qwen2.5-0.5B", True), ("out/tiny", True)),
        *(("/out/tiny", False), ("./out", False), ("../out", False), ("out/", False), ("a/b/c", False), ("", False)),
        *(("a b", False), ("a..b", False), ("a\0b", False), ("x" * 300, False)),
    ],
)
def test_names_that_can_be_on_the_hub(name, expected):
    assert is_hub_name(name) == expected


def test_the_nearest_existing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "file").write_text("x")
    expected = {
        "data/text/gone": "data/text",
        "data/gone/further": "data",
        "data/file/below": "data",
        "gone": ".",
        "gone/further": ".",
        "/gone/further": "/",
        "": ".",
        "data/a\0b": "data",
        "gone/": ".",
    }
    assert {path: nearest(path) for path in expected} == expected
    assert nearest(tmp_path / "data" / "text" / "gone") == str(tmp_path / "data" / "text")
