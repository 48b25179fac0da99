"use strict";
// What is shown of a mark when it is pointed at, tapped, or reached with the arrow keys.
(() => {
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");
  let at = null, byKey = false;
  const marksOf = (chart) => {
    const svg = [...chart.querySelectorAll("svg")].find((s) => s.getClientRects().length);
    if (!svg) return [];
    if (!svg.marks) {
      const grid = chart.dataset.grid && JSON.parse(document.getElementById(chart.dataset.grid).textContent);
      svg.marks = grid
        ? [...svg.querySelectorAll(".role-mark.mark-rect > path")]
        : [...svg.querySelectorAll(".role-mark [role='graphics-symbol'][aria-label]")];
      const words = grid && grid.counts.flatMap((counts, row) => counts.map((n, i) =>
        `${grid.names[0]} ${grid.rows[row]}, ${grid.names[1]} ${i}\n${n.toLocaleString("en-US")} ${grid.names[2]}`));
      svg.marks.forEach((m, i) => { m.words = grid ? words[i] : m.getAttribute("aria-label"); });
    }
    return svg.marks;
  };
  const leave = () => {
    if (at) at.classList.remove("at");
    at = null;
    tip.hidden = true;
  };
  const show = (mark, x, y) => {
    if (mark !== at) {
      leave();
      at = mark;
      mark.classList.add("at");
      tip.textContent = mark.words;
      tip.hidden = false;
    }
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18) + "px";
  };
  const middle = (m) => { const b = m.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; };
  const nearest = (marks, from, dx, dy) => {
    const [x, y] = middle(from);
    let best = null, least = Infinity;
    for (const m of marks) {
      const [u, v] = middle(m);
      const along = (u - x) * dx + (v - y) * dy, aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (along > 0.5 && along + 3 * aside < least) { least = along + 3 * aside; best = m; }
    }
    return best;
  };
  for (const chart of document.querySelectorAll(".chart")) {
    const point = (e) => {
      byKey = false;
      const marks = marksOf(chart);
      if (marks.includes(e.target)) show(e.target, e.clientX, e.clientY);
      else leave();
    };
    chart.addEventListener("pointermove", point);
    chart.addEventListener("click", point);
    chart.addEventListener("pointerleave", leave);
    chart.addEventListener("blur", leave);
    chart.addEventListener("keydown", (e) => {
      if (e.key === "Escape") { leave(); return; }
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
      const marks = marksOf(chart);
      if ((!way && e.key !== "Home" && e.key !== "End") || !marks.length || e.ctrlKey || e.altKey || e.metaKey) return;
      e.preventDefault();
      let to = e.key === "End" ? marks[marks.length - 1] : marks[0];
      if (way && at && marks.includes(at)) to = nearest(marks, at, ...way) || at;
      byKey = true;
      to.scrollIntoView({ block: "nearest", inline: "nearest" });
      show(to, ...middle(to));
      said.textContent = to.words;
    });
  }
  // a key may have moved the page to its mark: then what is shown goes along
  addEventListener("scroll", () => { if (at && byKey) show(at, ...middle(at)); else leave(); }, { passive: true, capture: true });
})();
