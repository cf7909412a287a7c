"""Draw pipeline.png and doubled_batch.png, the two pictures of the book: `python nbs/images/make_images.py`."""
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
INK, TEXT, RETRIEVER, LM, GRADIENT = "#30343b", "#eceff3", "#d5e6f7", "#fbe3c8", "#c2362f"
plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans", "text.color": INK})

def canvas(width, height): # inches at 100 dpi; one unit is one inch
    fig, ax = plt.subplots(figsize=(width, height), dpi=100)
    fig.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, width), ylim=(0, height)); ax.axis("off")
    return fig, ax

def box(ax, x, y, w, h, title, lines="", color=TEXT, size=12):
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=.09", facecolor=color, edgecolor=INK, linewidth=1.2))
    if title: ax.text(x + w/2, y + h - .23 if lines else y + h/2, title, ha="center", va="center", fontsize=size, weight="bold")
    if lines: ax.text(x + w/2, y + (h - .3)/2, lines, ha="center", va="center", fontsize=10.5, linespacing=1.35)

def arrow(ax, start, end, color=INK, **style):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, shrinkA=0, shrinkB=0, color=color, **{"linewidth": 1.6, **style}))

def matrix(ax, x, y, side, values, cmap, name):
    n = len(values)
    step = side / n
    shade = plt.get_cmap(cmap)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            face = "white" if v is None else shade(.08 + .8*v)
            ax.add_patch(Rectangle((x + j*step, y + side - (i + 1)*step), step, step, facecolor=face, edgecolor="white", linewidth=1))
            if v is None: ax.text(x + (j + .5)*step, y + side - (i + .5)*step, "×", ha="center", va="center", fontsize=10, color="#9aa0a8")
    ax.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=INK, linewidth=1.2))
    ax.text(x + side/2, y + side + .17, name, ha="center", va="center", fontsize=11.5, weight="bold")

def draw_pipeline():
    fig, ax = canvas(11.8, 4.7)
    box(ax, .15, 2.15, 1.45, 1.3, "documents", "raw text,\nno questions,\nno labels")
    box(ax, 1.95, 2.15, 1.45, 1.3, "chunks", "a few sentences\nof one\ndocument")
    box(ax, 3.75, 2.15, 1.5, 1.3, "group", "B related chunks,\nread together\nin one batch")
    arrow(ax, (1.6, 2.8), (1.95, 2.8)); arrow(ax, (3.4, 2.8), (3.75, 2.8))
    box(ax, 5.75, 2.75, 1.75, 1.55, "retriever", "query: first half → q\n\npassage: whole → p", RETRIEVER)
    arrow(ax, (5.25, 3.1), (5.75, 3.5))
    arrow(ax, (7.5, 3.5), (8.0, 3.5))
    sim = [[.9, .8, .2, .3], [.8, .9, .3, .1], [.2, .3, .9, .7], [.2, .1, .8, .9]]
    weights = [[None, .95, .1, .15], [.95, None, .1, .05], [.1, .15, None, .8], [.1, .05, .9, None]]
    matrix(ax, 8.0, 2.95, 1.1, sim, "Blues", "similarity S")
    matrix(ax, 10.1, 2.95, 1.1, weights, "Oranges", "weights w")
    arrow(ax, (9.1, 3.5), (10.1, 3.5))
    ax.text(9.6, 3.66, "softmax(S/τ)", ha="center", va="bottom", fontsize=9.5); ax.text(9.6, 3.36, "no diagonal", ha="center", va="top", fontsize=9.5)
    box(ax, 5.75, .5, 3.4, 1.75, "", "", LM)
    ax.text(7.45, 2.02, "language model", ha="center", va="center", fontsize=12, weight="bold")
    box(ax, 5.95, 1.3, 3.0, .45, "attention inside chunk i", color="white", size=10.5)
    box(ax, 5.95, .65, 3.0, .45, "+ Σ w$_{ij}$ · attention to chunk j", color="white", size=10.5)
    arrow(ax, (4.5, 2.15), (5.75, 1.4), connectionstyle="angle,angleA=-90,angleB=0,rad=8")
    arrow(ax, (10.4, 2.95), (8.95, .88), connectionstyle="angle,angleA=-90,angleB=0,rad=8")
    E = None
    return fig, ax

def draw_doubled_batch():
    fig, ax = canvas(10.5, 5.2)
    return fig, ax

if __name__ == "__main__":
    for name, draw in (("pipeline", draw_pipeline), ("doubled_batch", draw_doubled_batch)):
        fig, _ = draw()
        fig.savefig(HERE / f"{name}.png", facecolor="white"); plt.close(fig)
