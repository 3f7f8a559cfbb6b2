"""The live figure where no script runs: `python docs/live.py` draws docs/_static/live.png, the picture of live.js under three settings of z."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

H, N = 72, 96                                                    # as in live.js


def picture() -> np.ndarray:
    "The landscape of live.js, numbers between 0 and 1."
    y, x = np.arange(H)[:, None] / H, np.arange(N)[None] / N
    shore, v = .66, np.broadcast_to(.92 - .45 * y, (H, N)).copy()
    v[(x - .72) ** 2 * 1.78 + (y - .24) ** 2 < .012] = 1
    hill, far = (np.minimum(shore, a + b * np.abs(x - c)) for a, b, c in ((.2, 1.35, .33), (.36, .9, .68)))
    v = np.where(y > far, .52 + .12 * x, v)
    v = np.where(y > hill, np.where(y < hill + .07 + .03 * np.sin(40 * x), .97, .3 + .16 * (x > .33)), v)
    water = .3 + .14 * np.sin(34 * y + 3 * np.sin(9 * x)) + np.where(np.abs(x - .72) < .05, .25, 0)
    return np.where(y > shore, water, v)


def turned(z: np.ndarray) -> np.ndarray:
    "The picture with voice i at z_i times its loudness."
    U, S, Vh = np.linalg.svd(picture(), full_matrices=False)
    return np.clip((U * (S * z)) @ Vh, 0, 1)


if __name__ == "__main__":
    i = np.arange(H)
    panels = [("z = 1: the picture", i >= 0), ("the first three voices alone", i < 3), ("without the first voice", i > 0)]
    fig, axes = plt.subplots(1, 3, figsize=(9.6, 2.7), dpi=90, layout="constrained")
    for ax, (title, z) in zip(axes, panels):
        ax.imshow(turned(z), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.axis("off")
    fig.savefig(Path(__file__).parent / "_static" / "live.png", pil_kwargs={"optimize": True})
