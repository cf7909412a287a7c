"""Draw the pictures of the book: `python nbs/images/make_images.py`.

pipeline.png, doubled_batch.png, gradient_route.png, and pipeline-NAME.png: the pipeline as eight small stages, those of LIGHTS[NAME] lit, for the head of each chapter."""
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
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", shrinkA=0, shrinkB=0, color=color, **{"linewidth": 1.6, "mutation_scale": 16, **style}))

def way_back(ax, *points): # of the gradient: a dashed line with corners, its last stretch an arrow
    if len(points) > 2: ax.plot(*zip(*points[:-1]), color=GRADIENT, linewidth=1.8, linestyle=(0, (4, 2)))
    arrow(ax, points[-2], points[-1], GRADIENT, linewidth=1.8, linestyle=(0, (4, 2)), mutation_scale=14)

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
    fig, ax = canvas(11.8, 4.75)
    box(ax, .15, 2.3, 1.5, 1.3, "documents", "raw text:\nno questions,\nno labels")
    box(ax, 2.0, 2.3, 1.5, 1.3, "chunks", "a few sentences\nor lines each")
    box(ax, 3.85, 2.3, 1.5, 1.3, "group", "B related chunks\nread each other")
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
    way_back(ax, (10.0, .76), (10.0, 1.02), (9.15, 1.02))                                # loss -> sum over w -> w -> S -> retriever
    way_back(ax, (9.15, 1.27), (10.5, 1.27), (10.5, 3.2))
    way_back(ax, (10.25, 3.34), (9.35, 3.34)); way_back(ax, (8.25, 3.34), (7.8, 3.34))
    ax.text(8.55, 2.82, "gradient, through w and S, back to the retriever", ha="center", va="center", fontsize=10.5, color=GRADIENT)
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

def draw_gradient_route():
    fig, ax = canvas(6.9, 4.35)
    box(ax, .08, 2.25, 1.3, 1.1, "retriever", color=RETRIEVER, size=13)
    box(ax, 1.85, 2.95, .8, .6, "q$_i$", color=RETRIEVER, size=14); box(ax, 1.85, 2.05, .8, .6, "p$_j$", color=RETRIEVER, size=14)
    weights = [[None, .95, 0, .2], [.8, None, .1, 0], [0, .1, None, .95], [.1, 0, .9, None]]
    matrix(ax, 3.2, 2.1, 1.4, [[.9, .8, .2, .4], [.8, .9, .3, .1], [.2, .3, .9, .8], [.3, .1, .7, .9]], "Blues", "S$_{ij}$ = q$_i$ · p$_j$")
    matrix(ax, 5.35, 2.1, 1.4, weights, "Oranges", "w$_{ij}$")
    for i, row in enumerate(weights):
        for j, v in enumerate(row):
            if not v:
                for x in (3.2, 5.35): ax.text(x + (j + .5)*.35, 3.5 - (i + .5)*.35, "×", ha="center", va="center", fontsize=15, color="#7a818b")
    box(ax, 3.2, .62, 3.55, .95, "in-batch row i", "its own words + Σ$_j$ w$_{ij}$ · c$_{ij}$", LM, 13)
    box(ax, .6, .72, 1.5, .75, "loss", size=13)
    for start, end in (((1.38, 2.98), (1.85, 3.3)), ((1.38, 2.6), (1.85, 2.45)), ((2.65, 3.3), (3.2, 3.05)), ((2.65, 2.45), (3.2, 2.75)),
                       ((4.6, 2.95), (5.35, 2.95)), ((5.8, 2.1), (5.8, 1.57)), ((3.2, 1.25), (2.1, 1.25))): arrow(ax, start, end, WIRE, mutation_scale=13)
    for start, end in (((2.1, .95), (3.2, .95)), ((6.3, 1.57), (6.3, 2.1)), ((5.35, 2.5), (4.6, 2.5)), ((3.2, 3.25), (2.65, 3.47)),
                       ((3.2, 2.4), (2.65, 2.2)), ((1.85, 3.12), (1.38, 2.8)), ((1.85, 2.2), (1.38, 2.4))): way_back(ax, start, end)
    arrow(ax, (.2, 4.1), (.75, 4.1), WIRE, mutation_scale=13); ax.text(.85, 4.1, "forward", ha="left", va="center", fontsize=12)
    way_back(ax, (2.55, 4.1), (2.0, 4.1))
    ax.text(2.65, 4.1, "gradient", ha="left", va="center", fontsize=12, color=GRADIENT)
    ax.text(.12, .25, "×  no gradient: the diagonal, which nobody reads, and pairs of weight 0", ha="left", va="center", fontsize=12)
    return fig, ax

STAGES = {"corpus": "chunks", "groups": "groups", "retriever": "retriever", "attention": "attention", "patching": "LM layers", "model": "loss", "trainer": "training",
          "evaluation": "search"}
LIGHTS = {stage: (stage,) for stage in STAGES} | {"all": tuple(STAGES), "backbone": ("retriever", "patching")}
LIT, DIM, PENCIL, WIRE = "#ffcf8a", "#d3d8df", "#4a505a", "#8a919c"     # a box is opaque, a wire of middle grey: both can be read on white and on black paper

def sketch(ax, stage, x, y, ink):
    "The stage as a sketch 0.6 wide and 0.3 high with its lower left corner at (x, y)."
    def line(xs, ys, **style): ax.plot([x + v for v in xs], [y + v for v in ys], color=ink, **{"linewidth": 1.6, "solid_capstyle": "round", **style})
    def square(dx, dy, w, h, fill=None): ax.add_patch(Rectangle((x + dx, y + dy), w, h, facecolor=fill or "none", edgecolor=ink, linewidth=1.2))
    if stage == "corpus":
        for k, end in enumerate((.6, .5, .6, .3)): line((0, end), (.28 - .09*k, .28 - .09*k))
    elif stage == "groups":
        for k in range(3): square(.02 + .2*k, .05, .16, .2, ink if k < 2 else None)
    elif stage == "retriever":
        for dx, dy in ((.52, .26), (.58, .15), (.25, .3)): ax.add_patch(FancyArrowPatch((x, y), (x + dx, y + dy), arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, color=ink, linewidth=1.3))
    elif stage == "attention":
        for i, row in enumerate("013 103 310".split()):
            for j, v in enumerate(row): ax.add_patch(Rectangle((x + .14 + .11*j, y + .22 - .11*i), .1, .1, facecolor=ink, alpha=.15 + .28*int(v), linewidth=0))
    elif stage == "patching":
        for k in range(3): square(.05, .01 + .1*k, .5, .08, ink if k == 1 else None)
    elif stage == "model":
        line((.05, .3, .55, .55), (.22, .22, .22, .05)); ax.add_patch(FancyArrowPatch((x + .55, y + .05), (x + .03, y + .05), arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, color=ink, linewidth=1.6, linestyle=(0, (3, 1.5))))
    elif stage == "trainer":
        xs = [k/20 for k in range(2, 13)]
        line((0, 0, .62), (.3, 0, 0), linewidth=1); line(xs, [.025/v for v in xs])
    else:
        ax.add_patch(plt.Circle((x + .25, y + .17), .13, fill=False, edgecolor=ink, linewidth=1.8)); line((.35, .5), (.08, -.02), linewidth=2.4)

def draw_stages(lit):
    w, h, gap = 1.42, .82, .3
    fig, ax = canvas(4*w + 3*gap + .16, 2*h + .46)
    for k, (stage, label) in enumerate(STAGES.items()):
        x, y, on = .08 + (k % 4)*(w + gap), .08 + (1 - k//4)*(h + .3), stage in lit
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=.09", facecolor=LIT if on else DIM, edgecolor="#b3541e" if on else DIM, linewidth=3 if on else 1))
        sketch(ax, stage, x + w/2 - .3, y + .4, "#5c2a0a" if on else PENCIL)
        ax.text(x + w/2, y + .18, f"{k + 1}  {label}", ha="center", va="center", fontsize=12, color="#2b1404" if on else "#343941", weight="bold" if on else "normal")
        if k % 4: arrow(ax, (x - gap + .03, y + h/2), (x - .02, y + h/2), WIRE, mutation_scale=14)
    middle, right, left = .08 + h + .15, .08 + 3*(w + gap) + w/2, .08 + w/2
    ax.plot([right, right, left], [.08 + h + .3, middle, middle], color=WIRE, linewidth=1.6)
    arrow(ax, (left, middle + .01), (left, .08 + h + .01), WIRE, mutation_scale=11)
    return fig, ax

if __name__ == "__main__":
    for name, lit in LIGHTS.items():
        fig, _ = draw_stages(lit)
        fig.savefig(HERE / f"pipeline-{name}.png", transparent=True); plt.close(fig)
    for name, draw in (("pipeline", draw_pipeline), ("doubled_batch", draw_doubled_batch), ("gradient_route", draw_gradient_route)):
        fig, _ = draw()
        fig.savefig(HERE / f"{name}.png", facecolor="white"); plt.close(fig)
