"use strict";
// The legend of a chart shows the numbers of the step under the pointer, else the last ones.
for (const chart of document.querySelectorAll("figure.chart")) {
  const svg = chart.querySelector("svg"), cursor = svg.querySelector(".cursor"), at = chart.querySelector(".at");
  const values = [...chart.querySelectorAll(".legend b")], last = values.map((value) => value.textContent);
  const lines = JSON.parse(svg.dataset.lines), width = svg.viewBox.baseVal.width;
  const [low, high, start, end] = svg.dataset.steps.split(" ").map(Number);
  const middle = (point) => (point[0] + point[1]) / 2;
  const steps = [...new Set(lines.flat().map(middle))].sort((a, b) => a - b);
  let shown = steps.length - 1;

  const nearest = (points, step) =>
    points.reduce((best, point) => (Math.abs(middle(point) - step) < Math.abs(middle(best) - step) ? point : best));
  const show = (place) => {
    shown = Math.max(0, Math.min(steps.length - 1, place));
    const x = start + ((steps[shown] - low) / (high - low)) * (end - start);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    const points = lines.map((points) => nearest(points, steps[shown]));
    points.forEach((point, number) => (values[number].textContent = point[2]));
    const group = points.reduce((best, p) => (Math.abs(middle(p) - steps[shown]) < Math.abs(middle(best) - steps[shown]) ? p : best));
    at.textContent = group[0] === group[1] ? group[0] : group[0] + "–" + group[1];
  };
  const hide = () => {
    shown = steps.length - 1;
    cursor.setAttribute("visibility", "hidden");
    values.forEach((value, number) => (value.textContent = last[number]));
    at.textContent = "";
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const step = low + ((x - start) / (end - start)) * (high - low);
    show(steps.indexOf(steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best))));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      event.preventDefault();
      show(shown + move);
    }
  });
}
for (const link of document.querySelectorAll('a[href^="#setting-"]')) {
  link.addEventListener("click", () => {
    const details = document.getElementById(link.hash.slice(1))?.closest("details");
    if (details) details.open = true;
  });
}
