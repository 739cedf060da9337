"use strict";
// Curves and scatter as SVG, redrawn in real pixels whenever the size or the selection changes, so text keeps its size.

const number = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function swatch(row) {
  const line = svg("line", { x1: 0, x2: 26, y1: 6, y2: 6, class: "line", "stroke-dasharray": row.dash });
  return svg("svg", { class: "swatch", width: 26, height: 12, style: colour(row), "aria-hidden": "true" }, line);
}

const colour = (row) => `--c: var(--line-${row.colour})`;

/** Round numbers from low to high, about `most` of them. */
function ticks(low, high, most) {
  const raw = (high - low || 1) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  const last = high / step + 1e-9;
  for (let i = Math.ceil(low / step - 1e-9); i <= last; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

/** Base of both charts: a figure with a caption, a plot that redraws on resize, and a readout. */
class Chart {
  constructor(section, name, caption) {
    this.section = section;
    this.readout = html("div", { class: "readout", role: "status" });
    this.canvas = html("div");
    const focusable = { class: "plot", tabindex: 0, role: "group", "aria-label": name };
    this.plot = html("div", focusable, this.canvas, this.readout);
    this.figure = html("figure", {}, html("figcaption", {}, ...caption), this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(this.place(event)));
    this.plot.addEventListener("pointerdown", (event) => this.point(this.place(event)));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.canvas.clientWidth !== this.width && this.draw()).observe(this.canvas);
  }

  /** Position of a pointer, in pixels of the drawing. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  leave() {
    this.readout.replaceChildren();
    this.section.focus(null);
    this.mark(null);
  }

  /** Clear the drawing; returns false if there is no room or nothing to draw. */
  start(rows, height) {
    this.width = this.canvas.clientWidth;
    this.height = height;
    this.plot.classList.toggle("narrow", this.width < 480);
    this.box = { left: 44, right: this.width - 12, top: 10, bottom: height - 40 };
    this.svg = svg("svg", { width: this.width, height, "aria-hidden": "true" });
    if (!rows.length) this.canvas.replaceChildren(html("p", { class: "empty" }, "No learner is chosen above."));
    else this.canvas.replaceChildren(this.svg);
    return rows.length > 0 && this.width > 0;
  }

  /** Grid lines and numbers of both axes, and the label of the horizontal one. */
  axes(xs, ys, x, y, below) {
    const { left, right, top, bottom } = this.box;
    for (const [value, text] of ys) {
      this.svg.append(svg("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "grid" }));
      this.svg.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", class: "tick" }, text));
    }
    for (const [value, text] of xs) {
      this.svg.append(svg("line", { x1: x(value), x2: x(value), y1: top, y2: bottom, class: "grid" }));
      this.svg.append(svg("text", { x: x(value), y: bottom + 16, "text-anchor": "middle", class: "tick" }, text));
    }
    this.svg.append(svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    this.svg.append(svg("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, below));
  }

  /** Show lines of text beside a place; `rows` are [row, text]. */
  tell(heading, rows, x) {
    const lines = rows.map(([row, text]) => {
      const line = html("div", {}, swatch(row), html("span", { class: "number" }, text), html("span", {}, row.title));
      line.classList.toggle("active", row === this.section.active);
      return line;
    });
    this.readout.replaceChildren(html("div", {}, heading), ...lines);
    const left = x > this.width / 2;
    this.readout.style.right = left ? `${this.width - x + 14}px` : "auto";
    this.readout.style.left = left ? "auto" : `${x + 14}px`;
  }
}

/** A curve over stages for every selected learner, with a band of one standard deviation if there are several runs. */
class Curves extends Chart {
  constructor(section, metric) {
    const select = html("select", {});
    for (const [key, name] of Object.entries(section.data.curves)) {
      select.append(new Option(name, key, false, key === metric));
    }
    super(section, "Curves over stages; arrow keys read them out", [html("label", {}, select)]);
    select.setAttribute("aria-label", "What the curves show");
    select.addEventListener("change", () => this.show(select.value));
    this.metric = metric;
  }

  show(metric) {
    this.metric = metric;
    this.leave();
    this.draw();
  }

  draw() {
    const rows = this.section.chosen();
    if (!this.start(rows, Math.round(Math.min(360, Math.max(240, this.canvas.clientWidth * 0.62))))) return;
    const curves = rows.map((row) => row.curves[this.metric]);
    this.stages = Math.max(...curves.map(({ mean }) => mean.length));
    const [low, high] = this.range(curves);
    const { left, right, top, bottom } = this.box;
    const step = (right - left - 16) / (this.stages - 1);
    this.x = (stage) => (this.stages > 1 ? left + 8 + (stage - 1) * step : (left + right) / 2);
    this.y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
    const whole = ticks(1, this.stages, Math.max(2, this.width / 60)).filter(Number.isInteger);
    this.axes(whole.map((v) => [v, v]), ticks(low, high, 6).map((v) => [v, v]), this.x, this.y, "stage");
    this.cross = this.svg.appendChild(svg("line", { y1: top, y2: bottom, class: "cross", visibility: "hidden" }));
    for (const row of [...rows].reverse()) this.svg.append(this.series(row, row.curves[this.metric]));
    this.section.highlight();
  }

  /** Lowest and highest end of all bands, with a margin: at least two points, and from zero if that is near. */
  range(curves) {
    const ends = curves.flatMap(({ mean, std }) =>
      mean.flatMap((value, i) => (value === null ? [] : [value - (std[i] || 0), value + (std[i] || 0)])),
    );
    const [least, most] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
    const room = Math.max(0.04 * (most - least), 1 - (most - least) / 2);
    const near = least >= 0 && least < 0.3 * most;
    return [near ? 0 : least - room, most + room];
  }

  series(row, { mean, std }) {
    const known = mean
      .map((value, i) => ({ value, x: this.x(i + 1), spread: std[i] || 0 }))
      .filter(({ value }) => value !== null);
    const path = (at) => known.map((p) => `${p.x.toFixed(1)},${this.y(at(p)).toFixed(1)}`);
    const group = svg("g", { class: "series", style: colour(row), "data-title": row.title });
    if (known.some((p) => p.spread)) {
      const edge = [...path((p) => p.value + p.spread), ...path((p) => p.value - p.spread).reverse()];
      group.append(svg("polygon", { class: "band", points: edge.join(" ") }));
    }
    const points = path((p) => p.value).join(" ");
    group.append(svg("polyline", { class: "line", points, "stroke-dasharray": row.dash }));
    if (this.stages <= 25) {
      for (const { x, value } of known) group.append(svg("circle", { class: "dot", cx: x, cy: this.y(value), r: 3 }));
    }
    return group;
  }

  /** Learners with a value at a stage, highest first. */
  at(stage) {
    const value = (row) => row.curves[this.metric].mean[stage - 1] ?? null;
    const rows = this.section.chosen().filter((row) => value(row) !== null);
    return rows.map((row) => [row, value(row)]).sort((a, b) => b[1] - a[1]);
  }

  point([px, py]) {
    if (!this.x || !this.section.chosen().length) return;
    const span = this.stages > 1 ? this.x(2) - this.x(1) : 1;
    const stage = Math.min(this.stages, Math.max(1, 1 + Math.round((px - this.x(1)) / span)));
    const found = this.at(stage);
    const distance = ([, value]) => Math.abs(this.y(value) - py);
    this.read(stage, found.length ? found.reduce((a, b) => (distance(b) < distance(a) ? b : a))[0] : null);
  }

  read(stage, row, most = 9) {
    this.stage = stage;
    this.section.focus(row);
    this.mark(stage);
    const found = this.at(stage);
    const from = Math.max(0, Math.min(found.findIndex(([r]) => r === row) - (most >> 1), found.length - most));
    const lines = found.slice(from, from + most).map(([r, value]) => {
      const spread = r === row ? r.curves[this.metric].std[stage - 1] : null;
      return [r, number(value) + (spread ? ` ± ${number(spread)}` : "")];
    });
    const some = lines.length < found.length ? ` · ${lines.length} of ${found.length}` : "";
    this.tell(`stage ${stage}${found.length ? some : ": undefined"}`, lines, this.x(stage));
  }

  mark(stage) {
    if (!this.cross) return;
    this.cross.setAttribute("visibility", stage ? "visible" : "hidden");
    if (stage) for (const end of ["x1", "x2"]) this.cross.setAttribute(end, this.x(stage));
  }

  key(event) {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const [along, across] = arrows[event.key] || [];
    if (along === undefined || !this.section.chosen().length) return;
    event.preventDefault();
    const stage = Math.min(this.stages, Math.max(1, (this.stage || this.stages + 1) + along));
    const found = this.at(stage).map(([row]) => row);
    const now = found.indexOf(this.section.active);
    this.read(stage, found[Math.min(found.length - 1, Math.max(0, now + across))] || null);
  }
}
