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
    fig, ax = canvas(11.8, 5.0)
    box(ax, .15, 2.3, 1.5, 1.3, "documents", "raw text:\nno questions,\nno labels")
    box(ax, 2.0, 2.3, 1.5, 1.3, "chunks", "a few sentences\nor lines each")
    box(ax, 3.85, 2.3, 1.5, 1.3, "group", "B related chunks\nare one batch")
    arrow(ax, (1.65, 2.95), (2.0, 2.95)); arrow(ax, (3.5, 2.95), (3.85, 2.95))
    box(ax, 5.95, 3.1, 1.85, 1.4, "retriever", "query: first half → q\npassage: whole → p", RETRIEVER)
    arrow(ax, (4.6, 3.6), (5.95, 4.0), connectionstyle="angle,angleA=90,angleB=0,rad=8")
    sim = [[.9, .8, .2, .3], [.8, .9, .3, .1], [.2, .3, .9, .7], [.2, .1, .8, .9]]
    weights = [[None, .95, .1, .15], [.95, None, .1, .05], [.1, .15, None, .8], [.1, .05, .9, None]]
    matrix(ax, 8.25, 3.2, 1.1, sim, "Blues", "similarity S")
    matrix(ax, 10.25, 3.2, 1.1, weights, "Oranges", "weights w")
    arrow(ax, (7.8, 3.75), (8.25, 3.75)); arrow(ax, (9.35, 3.75), (10.25, 3.75))
    ax.text(9.8, 3.84, "softmax(S/τ)", ha="center", va="bottom", fontsize=9.5); ax.text(9.8, 3.65, "no diagonal", ha="center", va="top", fontsize=9.5)
    box(ax, 5.95, .75, 3.4, 1.75, "", "", LM)
    ax.text(7.65, 2.27, "language model reads chunk i", ha="center", va="center", fontsize=12, weight="bold")
    box(ax, 6.15, 1.55, 3.0, .45, "attention to its own words", color="white", size=10.5)
    box(ax, 6.15, .92, 3.0, .45, "+ Σ w$_{ij}$ · attention to chunk j", color="white", size=10.5)
    arrow(ax, (4.6, 2.3), (5.95, 1.62), connectionstyle="angle,angleA=-90,angleB=0,rad=8")
    arrow(ax, (10.78, 3.2), (9.15, 1.145), connectionstyle="angle,angleA=-90,angleB=0,rad=8")
    box(ax, 9.75, .1, 1.9, .66, "next-token loss", size=12)
    arrow(ax, (8.0, .75), (9.75, .43), connectionstyle="angle,angleA=-90,angleB=0,rad=8")
    ax.plot([11.55, 11.55, 6.88], [.76, 4.74, 4.74], color=GRADIENT, linewidth=1.8, linestyle=(0, (4, 2)))   # way back, outside
    arrow(ax, (6.88, 4.76), (6.88, 4.5), GRADIENT)
    ax.text(9.2, 4.88, "gradient, through w and S, back to the retriever", ha="center", va="center", fontsize=10.5, color=GRADIENT)
    return fig, ax

def stack(ax, x, y, names, color, w=2.6, h=.42):
    for k, name in enumerate(names):
        top = y - k*h
        ax.add_patch(Rectangle((x, top - h), w, h, facecolor=color, edgecolor=INK, linewidth=1))
        ax.text(x + w/2, top - h/2, name, ha="center", va="center", fontsize=11)

def draw_doubled_batch():
    fig, ax = canvas(10.5, 5.0)
    ax.text(1.95, 4.78, "one batch of 2B rows", ha="center", va="center", fontsize=12, weight="bold")
    ax.text(7.2, 4.78, "in every layer", ha="center", va="center", fontsize=12, weight="bold")
    rows = ["chunk 0", "chunk 1", "…", "chunk B−1"]
    stack(ax, .65, 4.5, rows, RETRIEVER); stack(ax, .65, 2.1, rows, LM)
    for y, n in ((4.5, ["0", "1", "", "B−1"]), (2.1, ["B", "B+1", "", "2B−1"])):
        for k, text in enumerate(n): ax.text(.57, y - (k + .5)*.42, text, ha="right", va="center", fontsize=10)
    box(ax, 4.3, 2.82, 5.9, 1.68, "plain stream", "ordinary causal attention inside the row\nits keys K and values V are what others read", RETRIEVER)
    box(ax, 4.3, .42, 5.9, 1.68, "in-batch stream", "causal attention inside row i   +   Σ w$_{ij}$ · c$_{ij}$\nc$_{ij}$: its queries read K, V of plain row j,  for all j ≠ i", LM)
    arrow(ax, (3.25, 3.66), (4.3, 3.66)); arrow(ax, (3.25, 1.26), (4.3, 1.26))
    arrow(ax, (6.2, 2.82), (6.2, 2.1), linewidth=2.4)
    ax.text(6.35, 2.46, "K$_j$, V$_j$ of the same layer", ha="left", va="center", fontsize=11)
    arrow(ax, (9.2, 2.46), (9.2, 2.1)); ax.text(9.2, 2.6, "weights w", ha="center", va="center", fontsize=11)
    ax.text(1.95, .2, "same token ids, same positions, same parameters", ha="center", va="center", fontsize=10)
    ax.text(7.25, .2, "the loss is taken here, from rows B … 2B−1", ha="center", va="center", fontsize=10)
    return fig, ax

if __name__ == "__main__":
    for name, draw in (("pipeline", draw_pipeline), ("doubled_batch", draw_doubled_batch)):
        fig, _ = draw()
        fig.savefig(HERE / f"{name}.png", facecolor="white"); plt.close(fig)
