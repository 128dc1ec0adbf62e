"""Intake of videos: only free ones, each once, by names of our own."""

import csv
import functools
import hashlib
import http.server
import sys
import threading
import types

import cv2
import pytest

from data_prep import intake
from gim_jax import cli
from tests.test_label import pan
from tests.test_video import write_video


def write_list(path, rows, columns=("video", "licence")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_usable_videos_are_listed_and_the_others_refused_with_a_reason(tmp_path, capsys):
    frames = pan(40, 3, 1)
    write_video(tmp_path / "a.mp4", frames)
    write_video(tmp_path / "other.mp4", pan(40, 3, 2))
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    small = [cv2.resize(f, (100, 76), interpolation=cv2.INTER_AREA) for f in frames]
    write_video(tmp_path / "again.webm", small, codec="libvpx-vp9", options={})
    (tmp_path / "text.mp4").write_text("nothing")
    rows = [
        ("a.mp4", "CC-BY-4.0"),
        ("other.mp4", "cc0-1.0"),
        ("copy.mp4", "CC-BY-4.0"),
        ("again.webm", "CC-BY-4.0"),
        ("text.mp4", "CC-BY-4.0"),
        ("missing.mp4", "CC-BY-4.0"),
        ("a.mp4", "Standard YouTube License"),
        ("file:///etc/passwd", "CC0-1.0"),
        ("ftp://host/v.mp4", "CC0-1.0"),
    ]
    write_list(tmp_path / "list.csv", rows)
    assert cli.main(["videos", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 0
    assert "2 videos" in capsys.readouterr().out
    listed = list(csv.DictReader(open(tmp_path / "out" / "videos.csv")))
    assert [row["source"] for row in listed] == ["a.mp4", "other.mp4"]
    assert listed[0]["licence"] == "CC-BY-4.0" and listed[0]["codec"] == "h264" and float(listed[0]["fps"]) == 25.0
    reasons = [row["reason"] for row in csv.DictReader(open(tmp_path / "out" / "refused.csv"))]
    texts = ["same file as a.mp4", "same video as a.mp4", "not a video", "no such file", "licence", "'file'", "'ftp'"]
    assert len(reasons) == len(texts) and all(text in reason for text, reason in zip(texts, reasons))


@pytest.mark.parametrize(
    "columns, row, text",
    [(("video",), ("a",), "expected video,licence"), (("video", "licence"), ("a.mp4", " "), "line 2: licence")],
)
def test_a_list_without_licences_is_refused(tmp_path, columns, row, text):
    with pytest.raises(ValueError, match=text):
        intake.read_list(write_list(tmp_path / "l.csv", [row], columns))


@pytest.mark.parametrize(
    "text, words",
    [("video,licence\n", "no video below"), ('video,licence\n"a.mp4,CC0\n' + "b.mp4,CC0\n" * 14_000, "line 2: ")],
)
def test_an_empty_list_and_an_open_quote_are_one_line(tmp_path, capsys, text, words):
    (tmp_path / "l.csv").write_text(text)
    for command in ("videos", "label"):
        assert cli.main([command, str(tmp_path / "l.csv"), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "l.csv: " in error and words in error and error.count("\n") == 1


class FakeDownloader:
    """yt-dlp as far as intake needs it: "fetches" one local file and remembers what it was told."""

    asked, licence, source = [], None, None

    def __init__(self, options):
        self.options = options

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def extract_info(self, address, download):
        self.asked.append((address, self.options))
        return {"id": "../../evil; rm -rf ~", "title": "$(reboot)", "license": self.licence}

    def process_ie_result(self, info, download):
        name = (self.options["outtmpl"]["default"] % {"ext": "mp4"}).replace("%%", "%")
        with open(name, "wb") as file:
            file.write(self.source.read_bytes())


@pytest.fixture
def downloader(monkeypatch, tmp_path):
    write_video(tmp_path / "source.mp4", pan(10, 3, 1))
    module = types.ModuleType("yt_dlp")
    module.YoutubeDL = FakeDownloader
    module.utils = types.SimpleNamespace(YoutubeDLError=RuntimeError)
    monkeypatch.setitem(sys.modules, "yt_dlp", module)
    FakeDownloader.asked, FakeDownloader.licence, FakeDownloader.source = [], None, tmp_path / "source.mp4"
    return FakeDownloader


ADDRESS = "https://host.example/watch?v=`touch x`;../..&$(id)"


def test_what_is_fetched_is_named_by_its_hash_and_fetched_once(downloader, tmp_path):
    folder = tmp_path / "100% files"
    folder.mkdir()
    key = hashlib.sha256(ADDRESS.encode()).hexdigest()[:16]
    left = [folder / f"{key}.{ending}" for ending in ("mp4.part", "mp4.part-Frag7", "mp4.ytdl", "temp.mp4")]
    for path in left:  # of a run that was stopped
        path.touch()
    first = intake.fetch(ADDRESS, folder, intake.FREE)
    assert first.parent == folder and first.suffix == ".mp4" and first.stem.isalnum() and len(first.stem) == 16
    assert intake.fetch(ADDRESS, folder, intake.FREE) == first and len(downloader.asked) == 1
    assert {*folder.iterdir()} == {first, *left} and first not in left


def test_what_the_site_says_of_the_licence_decides(downloader, tmp_path):
    downloader.licence = "Standard YouTube License"
    with pytest.raises(ValueError, match="Standard YouTube License"):
        intake.fetch(ADDRESS, tmp_path / "files", intake.FREE)
    assert not list((tmp_path / "files").iterdir())
    downloader.licence = "Creative Commons Attribution license (reuse allowed)"
    assert intake.fetch(ADDRESS, tmp_path / "files", intake.FREE).is_file()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_video_is_fetched_from_a_real_server(tmp_path):
    pytest.importorskip("yt_dlp", reason="the extra [videos] is not installed")
    (tmp_path / "site").mkdir()
    write_video(tmp_path / "site" / "v.mp4", pan(10, 3, 1))
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v.mp4"
        found = intake.fetch(address, tmp_path / "files", intake.FREE)
        with pytest.raises(ValueError, match="cannot be fetched"):
            intake.fetch(address + "x", tmp_path / "files", intake.FREE)
        server.shutdown()
    assert found.read_bytes() == (tmp_path / "site" / "v.mp4").read_bytes()
