"""The page of `gim-jax web`: what its functions make, and the page itself in a real browser."""

import json
import re
import shutil
import socket
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from gim_jax import api, cli
from gim_jax.data import records
from gim_jax.data.tfrecord import write_tfrecord
from gim_jax.image import encode_jpeg
from gim_jax.web import labels, pair

VIDEO = "0123456789abcdef"


def textured(seed: int = 0) -> np.ndarray:
    """Random blocks in colour: [300, 400, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8).repeat(10, 0).repeat(10, 1)


def svg_of(text: str) -> tuple[ET.Element, dict]:
    """Parse the picture of `pair.draw`: the element and what the script reads."""
    svg = ET.fromstring(re.search(r"<svg.*</svg>", text, re.S).group())
    return svg, json.loads(svg.get("data-pair"))


def test_lines_end_where_the_points_are():
    image0, image1 = np.zeros((270, 400, 3), np.uint8), np.zeros((540, 300, 3), np.uint8)
    kpts0, kpts1 = np.array([[-0.5, -0.5], [399.5, 269.5]]), np.array([[0.0, 0.0], [299.5, 539.5]])
    svg, about = svg_of(pair.draw(image0, image1, kpts0, kpts1, np.ones(2)))
    lines = [[float(e.get(name)) for name in ("x1", "y1", "x2", "y2")] for e in svg if e.get("class") == "match"]
    # image 0 is drawn twice as large (540 high, 800 wide), image 1 as it is, from 808 on
    np.testing.assert_allclose(lines, [[0, 0, 808.5, 0.5], [800, 540, 1108, 540]])
    assert svg.get("viewBox") == "0 0 1108 540" and about["views"][1]["left"] == 808 and about["F"] is None


def test_pair_of_an_image_and_its_shift_has_the_shift_as_homography():
    from gim_jax.web import page

    image = textured()
    text, table, pictures = page.look(api.load_matcher("rootsift"), image[:240, :320], image[20:260, 30:350], 1.0)
    _, about = svg_of(text)
    np.testing.assert_allclose(about["H"], [[1, 0, -30], [0, 1, -20], [0, 0, 1]], atol=0.05)
    shift = np.array(about["points"])[:, :2] - np.array(about["points"])[:, 2:]
    np.testing.assert_allclose(np.median(shift, 0), [30, 20], atol=0.05)
    assert "agree with one homography" in table and len(pictures) == 2
    panorama = pictures[0][0]  # both images in the frame of the second; the homography is right to 0.05 px
    assert abs(panorama.shape[0] - 260) <= 1 and abs(panorama.shape[1] - 350) <= 1


def test_nothing_in_common_is_a_result_with_a_reason():
    from gim_jax.web import page

    blank = np.zeros((64, 64, 3), np.uint8)
    text, table, pictures = page.look(api.load_matcher("rootsift"), blank, blank, 1.0)
    _, about = svg_of(text)
    assert about["points"] == [] and about["F"] is None and about["H"] is None and pictures == []
    assert "0 matches" in table


@pytest.fixture(scope="module")
def label_folder(tmp_path_factory):
    """A labelling folder of one video: a direct pair and a chained one, and a stretch that was refused."""
    folder = tmp_path_factory.mktemp("labels")
    picture = encode_jpeg(textured()[:120, :160], 90)
    spans = ((0, 20, 1), (20, 100, 3))
    payloads = []
    for frame0, frame1, hops in spans:
        xy = np.random.default_rng(frame0).uniform(0, 100, (12, 4)).astype(np.float32)
        fields = {"image0": picture, "image1": picture, "size0": (160, 120), "size1": (160, 120), "correspondences": xy}
        fields |= {"confidence": np.ones(12, np.float32), "teacher": np.zeros(12, np.int32), "teachers": ("rootsift",)}
        fields |= {"hops": np.r_[np.ones(4), np.full(8, hops)].astype(np.int32), "F": np.eye(3), "frame0": frame0}
        fields |= {"frame1": frame1, "time0_s": frame0 / 10, "time1_s": frame1 / 10, "interval": frame1 - frame0}
        fields |= {"video": "<b>.mp4", "video_sha256": VIDEO * 4, "licence": "CC0", "label_config_hash": "0" * 16}
        payloads.append(records.encode(records.PairRecord(**fields)))
    write_tfrecord(folder / f"{VIDEO}.tfrecord", payloads)
    stage = {"step": 1, "pairs": 3, "correspondences": 24, "median": 12}
    row = {"name": "<b>.mp4", "duration_s": 12.0, "fps": 10.0, "size": [160, 120], "sampled_frames": 6, "pairs": 2}
    row |= {"every_frames": 20, "every_seconds": 0.0, "correspondences": 24, "licence": "CC0", "notes": []}
    row |= {"stages": [stage | {"stage": "direct", "fitted": 2}], "saved_by_step": {"1": 1, "4": 1}}
    row |= {
        "lost": [{"from_s": 4.0, "to_s": 8.0, "frames": 3, "reason": "9 of 41 matches agree, which chance explains"}]
    }
    (folder / f"{VIDEO}.json").write_text(json.dumps(row))
    (folder / "failed.json").write_text(json.dumps(["gone.mp4: no such file"]))
    return folder


def test_label_set_shows_videos_pairs_chains_and_reasons(label_folder):
    found = labels.LabelSet(label_folder)
    assert "&lt;b&gt;.mp4" in found.overview() and "<b>" not in found.overview()  # names are text, never markup
    assert "gone.mp4: no such file" in found.overview() and "50 %" in found.overview()  # 3 of 6 frames without a pair
    assert [text for text, _ in found.choices(VIDEO)] == [
        "frames 0 and 20, 20 apart: 12 correspondences, direct",
        "frames 20 and 100, 80 apart: 12 correspondences, chains of up to 3",
    ]
    line = ET.fromstring(re.search(r"<svg.*?</svg>", found.time_line(VIDEO, 1), re.S).group())
    arcs = [e for e in line if e.get("class") == "arc"]
    ends = [[float(v) for v in re.findall(r"[\d.]+", arc.get("d"))[::4]] for arc in arcs]
    # 12 s on 1180 units from 10: second 0, 2 and 10
    np.testing.assert_allclose([ends[0][0], ends[1][0]], [10, 10 + 1180 * 2 / 12], atol=0.06)
    bar = next(e for e in line if e.get("class") == "lost")
    np.testing.assert_allclose(float(bar.get("x")), 10 + 1180 * 3 / 12, atol=0.06)  # half a step before second 4
    assert bar[0].text == "9 of 41 matches agree, which chance explains" and bar[0].text in found.tables(VIDEO)
    shown = found.pair(VIDEO, 1)
    assert "chained over 3 pairs</td><td>8</td>" in shown and "matched directly</td><td>4</td>" in shown
    assert svg_of(shown)[1]["F"] == np.eye(3).tolist()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--labels", "/none"], "no labelling results in it"),
        (["--weights", "gim_dkm"], "expected MODEL=FILE"),
        (["--weights", "nope=x"], "found 'nope'"),
        (["--weights", "gim_dkm=/none.safetensors"], "no such file"),
        (["--port", "0"], "--port: found 0"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert cli.main(["web", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.main(["web", "--port", str(other.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "cannot listen at 127.0.0.1" in error and "in use" in error and error.count("\n") == 1


def test_page_in_a_browser(label_folder, tmp_path):
    """Match two files, move over a point: the line drawn is its epipolar line; nothing is asked of the internet.

    The camera of image 1 moved to the right: the upper 160 rows, a plane, shift by 30 px, the rest, farther, by 10. A
    picture of the webcam arrives as it is, not as in a mirror: black on the left, white on the right.
    """
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'gim-jax[web]'")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver_path:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from gim_jax.web import page

    image = textured()
    moved = np.concatenate([image[:160, 30:350], image[160:240, 10:330]])
    for side, part in enumerate((image[:240, :320], moved)):
        (tmp_path / f"{side}.png").write_bytes(_png(part))
    luma, gray = bytes(320) + bytes([235]) * 320, bytes([128]) * (320 * 240 * 2)
    (tmp_path / "cam.y4m").write_bytes(b"YUV4MPEG2 W640 H480 F10:1 C420\n" + b"FRAME\n" + luma * 480 + gray)
    served = page.build({"rootsift": api.load_matcher("rootsift")}, labels.LabelSet(label_folder))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page.serve(served, "127.0.0.1", port)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    for flag in (
        "headless",
        "no-sandbox",
        *quiet.split(),
        "window-size=1300,1500",
        f"user-data-dir={tmp_path}/profile",
        "use-fake-ui-for-media-stream",
        "use-fake-device-for-media-stream",
        f"use-file-for-fake-video-capture={tmp_path}/cam.y4m",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        driver.get(served.local_url)
        wait = WebDriverWait(driver, 20)
        files = wait.until(lambda d: (f := d.find_elements(By.CSS_SELECTOR, "input[type=file]")) and len(f) >= 2 and f)
        for side in (0, 1):
            files[side].send_keys(str(tmp_path / f"{side}.png"))
        wait.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, "#image0 img, #image1 img")) >= 2)
        driver.find_element(By.ID, "run").click()
        svg = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#picture svg.gim-pair"))
        about = json.loads(svg.get_attribute("data-pair"))
        box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", svg)
        place = pair.to_picture(np.array([160.0, 100.0]), about["views"][0]) * box["height"] / pair.HEIGHT
        event = "new PointerEvent('pointermove', {bubbles: true, clientX: arguments[1], clientY: arguments[2]})"
        driver.execute_script(f"arguments[0].dispatchEvent({event})", svg, box["x"] + place[0], box["y"] + place[1])
        mapped = svg.find_element(By.CSS_SELECTOR, ".mapped").get_attribute("transform")
        shown = [float(v) for v in re.findall(r"[-\d.]+", mapped)]
        np.testing.assert_allclose(shown, pair.to_picture(np.array([130.0, 100.0]), about["views"][1]), atol=1)
        line = svg.find_element(By.CSS_SELECTOR, ".epipolar")
        ends = np.array([[line.get_attribute(axis + end) for axis in "xy"] for end in "12"], float)
        wanted = pair.to_picture(
            np.array([[-0.5, 100.0], [319.5, 100.0]]), about["views"][1]
        )  # the row, border to border
        np.testing.assert_allclose(ends, wanted, atol=1.5)
        assert "nearest match" in driver.find_element(By.CSS_SELECTOR, "#picture .gim-read").text
        log = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = {e["params"]["request"]["url"] for e in log if e["method"] == "Network.requestWillBeSent"}
        assert [u for u in urls if not u.startswith((served.local_url, "data:", "blob:", "chrome"))] == []
        note = tmp_path / "note.png"
        note.write_bytes(b"not a picture")
        driver.find_element(By.CSS_SELECTOR, "#image0 [title='Remove Image']").click()
        wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#image0 input[type=file]")).send_keys(str(note))
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#image0 img[src]"))
        driver.find_element(By.ID, "run").click()
        wait.until(lambda d: any("note.png: " in e.text for e in d.find_elements(By.CSS_SELECTOR, ".toast-body")))
        steps = "[title='Remove Image']", "[aria-label='Capture from camera']", "[title='grant webcam access'] button"
        for step in steps:
            wait.until(lambda d, step=step: d.find_element(By.CSS_SELECTOR, f"#image0 {step}")).click()
        wait.until(lambda d: d.execute_script("return document.querySelector('#image0 video')?.videoWidth") == 640)
        driver.find_element(By.CSS_SELECTOR, "#image0 [aria-label='capture photo']").click()
        shot = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#image0 .image-frame img"))
        wait.until(lambda d: d.execute_script("return arguments[0].naturalWidth", shot) == 640)
        left, right = driver.execute_script(
            "const pen = new OffscreenCanvas(640, 480).getContext('2d'); pen.drawImage(arguments[0], 0, 0);"
            "return [160, 480].map((x) => pen.getImageData(x, 240, 1, 1).data[0])",
            shot,
        )
        assert left < 40 and right > 215
        next(tab for tab in driver.find_elements(By.CSS_SELECTOR, "button[role=tab]") if tab.text == "Labels").click()
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#line svg.gim-time .arc"))
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#shown svg.gim-pair"))
    finally:
        driver.quit()
        served.close()


def _png(rgb: np.ndarray) -> bytes:
    from gim_jax.viz import encode_png

    return encode_png(rgb)
