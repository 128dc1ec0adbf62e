"""Decoding: frames in order with their times, upright, and one clear line about what is not a video."""

import struct
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from data_prep import video
from gim_jax.cli.reconstruct import _extract_frames


def write_video(path, frames, fps=25, codec="libx264", pts=None, options=None):
    """Write RGB frames; `pts` are presentation times in 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbered(count: int, size=(64, 48)):
    """Flat gray frames whose level tells their number."""
    return [np.full((size[1], size[0], 3), 10 + 4 * k, np.uint8) for k in range(count)]


def number_of(frame) -> int:
    return round((float(frame.rgb.mean()) - 10) / 4)


@pytest.mark.parametrize(
    "codec, suffix",
    [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4"), ("libx265", "mp4"), ("mpeg4", "avi")],
)
def test_every_nth_frame_with_its_number_and_time(tmp_path, codec, suffix):
    path = tmp_path / f"v.{suffix}"
    write_video(path, numbered(50), codec=codec, options={"qscale": "1"} if codec == "mpeg4" else {})
    frames = list(video.sample_frames(path, every_frames=20))
    assert [f.index for f in frames] == [0, 20, 40]
    assert [number_of(f) for f in frames] == [0, 20, 40]
    np.testing.assert_allclose([f.time_s - frames[0].time_s for f in frames], [0, 0.8, 1.6], atol=2e-3)


def test_step_in_seconds_follows_presentation_time_not_frame_numbers(tmp_path):
    """Ten frames in the first second, then one a second: a step of one second takes frames 0, 10, 11, 12."""
    pts = [100 * k for k in range(10)] + [1000, 2000, 3000]
    write_video(tmp_path / "vfr.mp4", numbered(13), pts=pts)
    frames = list(video.sample_frames(tmp_path / "vfr.mp4", every_seconds=1.0))
    assert [number_of(f) for f in frames] == [0, 10, 11, 12]


@pytest.mark.parametrize("degrees, matrix", [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_rotation_metadata_turns_the_frames(tmp_path, degrees, matrix):
    """A clip whose header says "turn by so many degrees clockwise": its bright top-left corner moves accordingly."""
    image = np.full((48, 64, 3), 20, np.uint8)
    image[:16, :16] = 235
    path = tmp_path / "r.mp4"
    write_video(path, [image] * 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the 3x3 display matrix begins 40 bytes into the box
    a, b, c, d = (v * 65536 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    upright = next(video.sample_frames(path)).rgb
    np.testing.assert_allclose(upright.astype(int), np.rot90(image, -degrees // 90), atol=40)


def test_odd_sizes_keep_their_size(tmp_path):
    path = tmp_path / "odd.avi"
    rng = np.random.default_rng(0)
    frames = [np.repeat(np.repeat(rng.integers(0, 255, (7, 9, 3), np.uint8), 9, 0), 9, 1)[:61, :75] for _ in range(2)]
    write_video(path, frames, codec="ffv1" if "ffv1" in av.codecs_available else "mjpeg")
    assert next(video.sample_frames(path)).rgb.shape == (61, 75, 3)


def test_truncated_file_gives_its_good_frames_and_a_note(tmp_path):
    write_video(tmp_path / "whole.mkv", numbered(60), options={"crf": "10", "g": "10"})
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    notes: list[str] = []
    frames = list(video.sample_frames(tmp_path / "cut.mkv", every_frames=5, notes=notes))
    assert 1 <= len(frames) < 12
    assert [number_of(f) for f in frames] == [5 * k for k in range(len(frames))]


def test_index_of_an_mp4_tells_how_many_frames_are_missing(tmp_path):
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "g": "10"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(60):
            noise = rng.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    notes: list[str] = []
    frames = list(video.sample_frames(path, every_frames=5, notes=notes))
    assert frames and len(frames) < 12
    assert len(notes) == 1 and ("of 60 frames" in notes[0] or "damaged" in notes[0])


@pytest.mark.parametrize("name, stated", [("v.mp4", 30), ("v.h264", 0)])
def test_a_reconstruction_takes_at_most_the_frames_asked_for(tmp_path, name, stated):
    """Of 30 frames at most 16, so every second one; a raw stream states no length."""
    write_video(tmp_path / name, numbered(30), options={"crf": "10", "bf": "0"})
    assert video.probe(tmp_path / name).num_frames == stated
    folder = _extract_frames(tmp_path / name, tmp_path / "out", 16)
    assert [p.name for p in sorted(folder.iterdir())] == [f"frame_{k:06d}.jpg" for k in range(0, 30, 2)]


def test_where_time_goes_back_the_video_ends(tmp_path):
    """Two recordings of 30 frames joined as `cat 0.ts 1.ts`: the second one begins at the first one's time."""
    write_video(tmp_path / "0.ts", numbered(30), options={"crf": "10", "bf": "0"})
    one = (tmp_path / "0.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(one + one)
    notes: list[str] = []
    frames = list(video.sample_frames(tmp_path / "both.ts", every_frames=10, notes=notes))
    assert [number_of(f) for f in frames] == [0, 10, 20]
    assert len(notes) == 1 and "time goes back" in notes[0]
    assert len(list(video.sample_frames(tmp_path / "both.ts", every_seconds=0.4))) == 3, "of 1.2 s"


NAMES = ["with blanks.mp4", "quote's \".mp4", "-dash.mp4", "new\nline.mp4", "http:x.mp4", "ünï.mp4", "a%03d.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_only_names(tmp_path, name):
    write_video(tmp_path / name, numbered(3))
    assert video.probe(tmp_path / name).num_frames == 3
    assert len(list(video.sample_frames(tmp_path / name, every_frames=1))) == 3


def make_audio(path):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))


BAD = {
    "missing.mp4": (lambda p: None, "no such file"),
    "folder.mp4": (lambda p: p.mkdir(), "a folder"),
    "empty.mp4": (lambda p: p.write_bytes(b""), "empty"),
    "text.mp4": (lambda p: p.write_text("not a video\n" * 100), "not a video"),
    "sound.wav": (make_audio, "no video stream"),
    "list.m3u8": (
        lambda p: p.write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"),
        "not a video",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_named_in_one_line(tmp_path, name):
    make, text = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=text) as caught:
        video.probe(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_probe_tells_hash_rate_and_length(tmp_path):
    import hashlib

    write_video(tmp_path / "v.mp4", numbered(50), fps=25)
    info = video.probe(tmp_path / "v.mp4")
    assert (info.codec, info.fps, info.num_frames) == ("h264", 25.0, 50)
    assert info.sha256 == hashlib.sha256((tmp_path / "v.mp4").read_bytes()).hexdigest()
    assert info.duration_s == pytest.approx(2.0, abs=0.05)
