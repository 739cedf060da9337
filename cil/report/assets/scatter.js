/** Cost against final accuracy, one dot per selected learner, with its name if there is room. */
class Scatter extends Chart {
  constructor(section) {
    const select = html("select", {});
    for (const [key, name] of Object.entries(section.data.costs)) select.append(new Option(name, key));
    const caption = [html("h3", {}, "A_last, %, against"), html("label", {}, select)];
    super(section, "Cost against final accuracy; arrow keys read it out", caption);
    select.setAttribute("aria-label", "Cost");
    select.addEventListener("change", () => this.show(select.value));
    this.cost = select.value;
  }

  show(cost) {
    this.cost = cost;
    this.leave();
    this.draw();
  }

  rows() {
    return this.section.chosen().filter((row) => row.finished && row.costs[this.cost] !== null);
  }

  draw() {
    const rows = this.rows();
    this.dots = [];
    if (!this.start(rows, Math.round(Math.min(420, Math.max(280, this.canvas.clientWidth * 0.6))))) return;
    const ends = rows.flatMap((row) => [row.accuracy - (row.spread || 0), row.accuracy + (row.spread || 0)]);
    const room = 0.08 * (Math.max(...ends) - Math.min(...ends) || 10);
    const [low, high] = [Math.max(0, Math.min(...ends) - room), Math.max(...ends) + room];
    const { top, bottom } = this.box;
    const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
    const [x, marks, log] = this.scale(rows.map((row) => row.costs[this.cost]));
    const name = this.section.data.costs[this.cost] + (log ? " (log scale)" : "");
    this.axes(marks, ticks(low, high, 6).map((v) => [v, v]), x, y, name);
    for (const row of [...rows].reverse()) {
      const [cx, cy] = [x(row.costs[this.cost]), y(row.accuracy)];
      const group = svg("g", { class: "series", style: colour(row), "data-title": row.title });
      if (row.spread) {
        const [y1, y2] = [y(row.accuracy - row.spread), y(row.accuracy + row.spread)];
        group.append(svg("line", { class: "error", x1: cx, x2: cx, y1, y2 }));
      }
      group.append(svg("circle", { class: "dot", cx, cy, r: 5 }));
      this.svg.append(group);
      this.dots.push({ row, cx, cy });
    }
    this.dots.reverse();
    this.label();
    this.section.highlight();
  }

  /** Logarithmic if costs span more than a factor of twenty; zeros then have a separate position at the left. */
  scale(costs) {
    const { left, right } = this.box;
    const some = costs.filter((v) => v > 0);
    const [least, most] = [Math.min(...some), Math.max(...some)];
    if (!some.length || most / least <= 20) {
      const high = (some.length ? most : 1) * 1.08;
      const marks = ticks(0, high, Math.max(2, this.width / 90)).map((v) => [v, compact.format(v)]);
      return [(v) => left + (v / high) * (right - left), marks, false];
    }
    const start = some.length < costs.length ? left + 44 : left;
    const [a, b] = [Math.log10(least) - 0.1, Math.log10(most) + 0.1];
    const x = (v) => (v > 0 ? start + ((Math.log10(v) - a) / (b - a)) * (right - start) : left + 18);
    const powers = Array.from({ length: Math.floor(b) - Math.floor(a) + 1 }, (_, i) => 10 ** (Math.floor(a) + i));
    let marks = powers.flatMap((power) => (b - a < 2.2 ? [1, 2, 5] : [1]).map((f) => +(f * power).toPrecision(6)));
    marks = marks.filter((v) => Math.log10(v) >= a && Math.log10(v) <= b);
    while (marks.length > Math.max(2, this.width / 60)) marks = marks.filter((_, i) => i % 2 === 0);
    if (start > left) marks.unshift(0);
    return [x, marks.map((v) => [v, compact.format(v)]), true];
  }

  /** Names beside dots, best learner first, each at the first position where it covers nothing. */
  label() {
    const { left, right, top, bottom } = this.box;
    const taken = this.dots.map(({ cx, cy }) => [cx - 5, cy - 5, cx + 5, cy + 5]);
    const inside = ([x1, y1, x2, y2]) => x1 >= left && x2 <= right && y1 >= top && y2 <= bottom;
    const apart = (a, b) => a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
    for (const { row, cx, cy } of this.dots) {
      const text = this.svg.appendChild(svg("text", { class: "label" }, row.title));
      const wide = text.getComputedTextLength();
      const [beside, above, before] = [[8, 4], [-wide / 2, -9], [-8 - wide, 4]];
      const corners = [[5, -8], [5, 16], [-5 - wide, -8], [-5 - wide, 16]];
      const found = [beside, before, above, [-wide / 2, 17], ...corners]
        .map(([dx, dy]) => [cx + dx, cy + dy])
        .map(([x, y]) => ({ x, y, box: [x - 1, y - 10, x + wide + 1, y + 3] }))
        .find(({ box }) => inside(box) && taken.every((other) => apart(box, other)));
      if (!found) {
        text.remove();
        continue;
      }
      fill(text, { x: found.x, y: found.y }, []);
      taken.push(found.box);
    }
  }

  point([px, py]) {
    const distance = ({ cx, cy }) => Math.hypot(cx - px, cy - py);
    const nearest = this.dots.reduce((a, b) => (a && distance(a) <= distance(b) ? a : b), null);
    if (nearest && distance(nearest) < 30) this.read(nearest);
    else this.leave();
  }

  read({ row, cx }) {
    this.section.focus(row);
    const spread = row.spread === null ? "" : ` ± ${number(row.spread)}`;
    const cost = `${compact.format(row.costs[this.cost])} ${this.section.data.costs[this.cost]}`;
    this.tell(cost, [[row, `${number(row.accuracy)} %${spread}`]], cx);
  }

  mark() {}

  key(event) {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step || !this.dots.length) return;
    event.preventDefault();
    const along = [...this.dots].sort((a, b) => a.cx - b.cx);
    const now = along.findIndex(({ row }) => row === this.section.active);
    this.read(along[Math.min(along.length - 1, Math.max(0, now + step))]);
  }
}
