"""The temperature page's widget and its picture for those without JavaScript, from the six chunks of 00_tour. Standard library only."""
import html
import json
import math

CHUNKS = ("The cat sat on the warm mat. It purred.", "A cat purrs when it is warm and calm.", "Dogs bark at cats that sit on mats.",
          "Python lists grow with append. A list keeps order.", "Append adds one item to the end of a list.", "A tuple is a list that cannot grow.")
DIRECTIONS = ((1, .1), (.9, .2), (.7, .4), (.1, 1), (.2, .9), (.4, .8))       # as in 00_tour
SHOWN = 0.1                                                                  # the temperature shown before anything is moved


def similarity():
    "(6, 6) inner products of the six unit vectors."
    unit = [(x / math.hypot(x, y), y / math.hypot(x, y)) for x, y in DIRECTIONS]
    return [[a * c + b * d for c, d in unit] for a, b in unit]


def weights(S, tau):
    "Softmax of every row without its diagonal, at temperature tau."
    out = []
    for i, row in enumerate(S):
        top = max(s for j, s in enumerate(row) if j != i)
        e = [0.0 if j == i else math.exp((s - top) / tau) for j, s in enumerate(row)]
        out.append([x / sum(e) for x in e])
    return out


def widget():
    "The widget with its state at tau = 0.1 already filled in; temperature.js moves it."
    S, W = similarity(), weights(similarity(), SHOWN)
    head = "".join(f'<th scope="col">{j}</th>' for j in range(6))
    body = "".join(f'<tr><th scope="row"><button type="button" class="tau-row" data-row="{i}" aria-pressed="{str(i == 0).lower()}" aria-label="show row {i}">{i}</button></th>'
                   + "".join(f'<td data-cell="{i},{j}" style="--w:{w:.3f}">{"–" if i == j else f"{w:.2f}"}</td>' for j, w in enumerate(row)) + "</tr>" for i, row in enumerate(W))
    bars = "".join(f'<div class="tau-bar" data-bar="{j}" style="--w:{W[0][j]:.3f}"><span class="tau-text">{j}: {html.escape(text)}</span>'
                   f'<span class="tau-track"><span class="tau-fill"></span></span><span class="tau-value">{W[0][j]:.3f}</span></div>' for j, text in enumerate(CHUNKS))
    data = html.escape(json.dumps([[round(x, 6) for x in row] for row in S]))
    return f"""<div class="tau-widget" id="tau-widget" data-similarity="{data}">
<p class="tau-control"><label for="tau-slider">temperature τ = <output id="tau-value" for="tau-slider">{SHOWN}</output></label>
<input id="tau-slider" type="range" min="-4" max="1" step="0.02" value="{math.log10(SHOWN):g}" aria-describedby="tau-state"></p>
<p class="tau-presets">Jump to <button type="button" data-tau="0.0001">0.0001 (the released script)</button> <button type="button" data-tau="0.02">0.02</button>
<button type="button" data-tau="0.1">0.1</button> <button type="button" data-tau="1">1</button></p>
<div class="tau-panels">
<table class="tau-matrix"><caption>weights w: row i reads column j</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>
<div class="tau-bars"><p id="tau-title">Chunk <b>0</b> reads:</p>{bars}</div>
</div>
<p id="tau-state" role="status">Chunk 0 reads, in effect, <b id="tau-count">{effective(W[0]):.1f}</b> of 5 chunks; gradient of its largest weight by the logit, w(1−w): <b id="tau-slope">{max(W[0]) * (1 - max(W[0])):.3f}</b>.</p>
<noscript><p>Without JavaScript the slider does not move. The same matrix at three temperatures:</p>
<img src="_static/temperature.svg" width="660" height="250" alt="Weights of the six chunks at τ = 1, 0.1 and 0.02: every chunk reads all others; two topics stand out; nearly all weight on the nearest chunk"></noscript>
</div>
<script src="_static/temperature.js" defer></script>"""


def effective(row):
    "How many chunks a row reads in effect: exp of its entropy."
    return math.exp(-sum(w * math.log(w) for w in row if w > 0))


def fallback():
    "An SVG of the weights at three temperatures."
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 250" width="660" height="250" font-family="sans-serif" font-size="12">',
             '<title>Weights of the six chunks at temperatures 1, 0.1 and 0.02</title><rect width="660" height="250" fill="#fff"/>']
    for k, tau in enumerate((1, 0.1, 0.02)):
        left = 30 + 215 * k
        parts.append(f'<text x="{left + 90}" y="24" text-anchor="middle">τ = {tau}</text>')
        for i, row in enumerate(weights(similarity(), tau)):
            for j, w in enumerate(row):
                x, y = left + 30 * j, 36 + 30 * i
                shade = "none" if i == j else f"rgb({round(255 - 166 * w)},{round(255 - 114 * w)},{round(255 - 62 * w)})"
                parts.append(f'<rect x="{x}" y="{y}" width="29" height="29" fill="{shade}" stroke="#ccc"/>')
                if i != j: parts.append(f'<text x="{x + 14.5}" y="{y + 19}" text-anchor="middle" font-size="10" fill="#111">{w:.2f}</text>')
    parts.append('<text x="330" y="242" text-anchor="middle">rows: the chunk that reads; columns: the chunk that is read; the diagonal is out</text></svg>')
    return "\n".join(parts)
