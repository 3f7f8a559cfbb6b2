"""The social card of the site: `python docs/card.py` draws docs/_static/card.png, 1200 by 630, from the name and the description in settings.ini."""
import math
from pathlib import Path

import matplotlib.pyplot as plt
from reader import settings

blue, orange, grey, ink = "#2f5d8a", "#c8643c", "#b4bbc5", "#222b36"
s = settings()
fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="white")
ax = fig.add_axes((.06, .1, .88, .42))
sigma = [2.2 * math.exp(-i / 14) for i in range(36)]
z = [1 + .45 * math.sin(1.3 * i) * math.exp(-i / 40) for i in range(36)]
for i, (v, f) in enumerate(zip(sigma, z)):
    ax.plot([i, i], [v, v * f], color=orange if f > 1 else blue, lw=5, alpha=.8, solid_capstyle="round")
    ax.plot(i, v, "o", color=grey, ms=8)
    ax.plot(i, v * f, "o", color=ink, ms=8)
ax.axis("off")
fig.text(.06, .82, "Transformer²", fontsize=58, color=ink, family="DejaVu Serif")
fig.text(.06, .71, "Self-adaptive LLMs, as a book that runs", fontsize=28, color=ink, family="DejaVu Sans")
fig.text(.06, .61, "one number for every singular value, learned from rewards, chosen anew for every prompt", fontsize=17, color="#5d6875", family="DejaVu Sans")
fig.text(.94, .05, s["repo"], fontsize=16, color=blue, ha="right", family="DejaVu Sans Mono")
fig.savefig(Path(__file__).parent / "_static" / "card.png", pil_kwargs={"optimize": True})
