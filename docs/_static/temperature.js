// Weights against temperature: softmax of the six chunks' similarities, row by row, diagonal out. No library, no network.
(() => {
  const widget = document.getElementById("tau-widget");
  if (!widget) return;
  const S = JSON.parse(widget.dataset.similarity), slider = document.getElementById("tau-slider");
  const set = (id, text) => { document.getElementById(id).textContent = text; };
  let row = 0;

  const weights = tau => S.map((line, i) => {
    const top = Math.max(...line.filter((_, j) => j !== i));
    const e = line.map((s, j) => (j === i ? 0 : Math.exp((s - top) / tau)));
    const sum = e.reduce((a, b) => a + b);
    return e.map(x => x / sum);
  });

  const draw = () => {
    const tau = 10 ** Number(slider.value), W = weights(tau), shown = tau >= 0.01 ? Number(tau.toPrecision(2)) : tau.toExponential(1);
    set("tau-value", shown);
    slider.setAttribute("aria-valuetext", `temperature ${shown}`);
    W.forEach((line, i) => line.forEach((w, j) => {
      const cell = widget.querySelector(`[data-cell="${i},${j}"]`);
      cell.style.setProperty("--w", w.toFixed(3));
      cell.classList.toggle("tau-read", i === row);
      if (i !== j) cell.textContent = w.toFixed(2);
    }));
    W[row].forEach((w, j) => {
      const bar = widget.querySelector(`[data-bar="${j}"]`);
      bar.style.setProperty("--w", w.toFixed(3));
      bar.classList.toggle("tau-self", j === row);
      bar.querySelector(".tau-value").textContent = j === row ? "out" : w.toFixed(3);
    });
    widget.querySelectorAll(".tau-row").forEach(b => b.setAttribute("aria-pressed", String(Number(b.dataset.row) === row)));
    const most = Math.max(...W[row]), entropy = -W[row].reduce((a, w) => a + (w > 0 ? w * Math.log(w) : 0), 0);
    document.getElementById("tau-title").innerHTML = `Chunk <b>${row}</b> reads:`;
    document.getElementById("tau-state").firstChild.textContent = `Chunk ${row} reads, in effect, `;
    set("tau-count", Math.exp(entropy).toFixed(1));
    set("tau-slope", (most * (1 - most)).toFixed(3));
  };

  slider.addEventListener("input", draw);
  widget.querySelectorAll("[data-tau]").forEach(b => b.addEventListener("click", () => { slider.value = Math.log10(Number(b.dataset.tau)); draw(); }));
  widget.querySelectorAll(".tau-row").forEach(b => b.addEventListener("click", () => { row = Number(b.dataset.row); draw(); }));
  draw();
})();
