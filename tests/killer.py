"""Label a video and die on the way: `python -m tests.killer VIDEO OUT N` kills itself before the N-th file is named.

Also a mask provider that kills its worker on a black frame, and a worker that takes its time.
"""

import os
import signal
import sys
import time

import numpy as np


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def black_frames(rgb: np.ndarray) -> np.ndarray:
    if rgb.mean() < 2:
        die()
    return np.ones((1, 1), bool)


def linger(sender, job, config, out) -> None:
    """A worker in the place of `fleet._work`: "short" is done at once, another video after some seconds."""
    if job.video != "short":
        time.sleep(4)
        (out / "ended").touch()
    sender.send("done")


if __name__ == "__main__":
    from data_prep.label import label_video
    from tests.test_fleet import make_config

    video, out, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
    count, replace = 0, os.replace

    def counted(*args):
        global count
        count += 1
        if count == last:
            die()
        replace(*args)

    os.replace = counted
    label_video(video, make_config(), out)
