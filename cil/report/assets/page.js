/** The section of a protocol: the selected learners, the highlighted one, and everything that draws them. */
class Section {
  constructor(root, data) {
    this.root = root;
    this.data = data;
    this.off = new Set(data.rows.filter((row) => !row.shown));
    this.active = null;
    this.legend = new Legend(this);
    this.charts = ["accuracy/seen", "forgetting/mean"].map((key) => new Curves(this, key));
    this.charts.push(new Scatter(this));
    const panels = html("div", { class: "panels" }, ...this.charts.map((chart) => chart.figure), matrices(this));
    root.querySelector(".charts").append(this.legend.root, panels);
    sortable(root.querySelector(".ranked"));
    this.draw();
  }

  chosen() {
    return this.data.rows.filter((row) => !this.off.has(row));
  }

  choose(rows, on) {
    for (const row of rows) on ? this.off.delete(row) : this.off.add(row);
    this.draw();
  }

  draw() {
    this.legend.draw();
    for (const chart of this.charts) chart.draw();
  }

  /** Highlight one learner in every chart; null highlights none. */
  focus(row) {
    if (this.active === row) return;
    this.active = row;
    this.highlight();
  }

  highlight() {
    this.root.classList.toggle("focused", this.active !== null && !this.off.has(this.active));
    for (const drawn of this.root.querySelectorAll(".series")) {
      const active = this.active !== null && drawn.dataset.title === this.active.title;
      drawn.classList.toggle("active", active);
      if (active) drawn.parentNode.append(drawn); // above the others
    }
  }
}

/** One button per learner that shows and hides it everywhere. */
class Legend {
  constructor(section) {
    this.section = section;
    const { rows } = section.data;
    this.count = html("legend");
    this.buttons = rows.map((row) => {
      const button = html("button", { type: "button", title: row.note }, swatch(row), row.title);
      button.addEventListener("click", () => section.choose([row], section.off.has(row)));
      for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => section.focus(row));
      for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => section.focus(null));
      return [row, button];
    });
    const all = html("button", { type: "button", class: "all" }, "all");
    all.addEventListener("click", () => section.choose(rows, true));
    const none = html("button", { type: "button", class: "all" }, "none");
    none.addEventListener("click", () => section.choose(rows, false));
    const buttons = this.buttons.map(([, button]) => button);
    this.root = html("fieldset", { class: "legend" }, this.count, ...buttons, all, none);
  }

  draw() {
    this.count.textContent = `Learners: ${this.section.chosen().length} of ${this.buttons.length} shown`;
    for (const [row, button] of this.buttons) button.setAttribute("aria-pressed", String(!this.section.off.has(row)));
  }
}

// matplotlib's, which figures.matrix uses, at ninths
const CIVIDIS = "#00224e #123570 #3b496c #575d6d #707173 #8a8678 #a59c74 #c3b369 #e1cc55 #fee838".split(" ");

/** The colour of an accuracy in per cent, and black or white for text on it. */
function shade(value) {
  const at = (Math.min(100, Math.max(0, value)) / 100) * (CIVIDIS.length - 1);
  const [from, to] = [CIVIDIS[Math.floor(at)], CIVIDIS[Math.ceil(at)]];
  const mix = [1, 3, 5].map((i) => {
    const [a, b] = [parseInt(from.slice(i, i + 2), 16), parseInt(to.slice(i, i + 2), 16)];
    return Math.round(a + (b - a) * (at % 1));
  });
  const bright = 0.299 * mix[0] + 0.587 * mix[1] + 0.114 * mix[2];
  return [`rgb(${mix.join()})`, bright > 120 ? "#000" : "#fff"];
}

/** The accuracy matrix of the selected run as a table: rows are stages, columns tasks. */
function matrices(section) {
  const runs = section.data.rows.flatMap((row) => row.runs.map((run) => [row, run]));
  const which = html("select", { "aria-label": "Run" });
  runs.forEach(([row, run], i) => which.append(new Option(`${row.title}, order ${run.order}, seed ${run.seed}`, i)));
  const kinds = [new Option("among all classes seen", "seen"), new Option("with the task given", "within")];
  if (runs[0][1].forgetting) kinds.push(new Option("forgetting by group of first appearance, points", "forgetting"));
  const kind = html("select", { "aria-label": "Which accuracy" }, ...kinds);
  const place = html("div", { class: "heat", tabindex: 0, role: "region", "aria-label": "Accuracy matrix" });
  const bar = html("span", { class: "scale", style: `background: linear-gradient(90deg, ${CIVIDIS.join()})` });
  const scale = html("span", { class: "small" }, "0 ", bar, " 100 %");
  const draw = () => {
    const run = runs[which.value][1];
    place.replaceChildren(matrix(run[kind.value], run.at));
  };
  for (const select of [which, kind]) select.addEventListener("change", draw);
  draw();
  const choices = [which, kind].map((select) => html("label", {}, select));
  const caption = html("figcaption", {}, html("h3", {}, "Accuracy on every task, %"), ...choices, scale);
  return html("figure", { class: "tasks" }, caption, place);
}

/** `at` has the numbers of the stages and tasks if these are not all. */
function matrix(rows, at = rows.map((_, i) => i + 1)) {
  const tasks = at.map((j) => html("th", { scope: "col" }, String(j)));
  const head = html("tr", {}, html("th", { scope: "col" }, "stage ╲ task"), ...tasks);
  const body = rows.map((values, i) => {
    const cells = values.map((value, j) => {
      const [background, ink] = value === null ? ["transparent", "inherit"] : shade(value);
      const told = `after stage ${at[i]}, task ${at[j]}: ${number(value)} %`;
      return html("td", { style: `background: ${background}; color: ${ink}`, title: told }, number(value, 0));
    });
    return html("tr", {}, html("th", { scope: "row" }, String(at[i])), ...cells);
  });
  const style = `max-width: ${6 + 3.2 * rows.length}rem`;
  return html("table", { class: "matrix", style }, html("thead", {}, head), html("tbody", {}, ...body));
}

/** Headings that sort, first best to worst, then reversed; rows without a value and unfinished ones stay last. */
function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    if (!heading.dataset.first) return;
    const button = html("button", { type: "button" }, heading.textContent);
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const opposite = { ascending: "descending", descending: "ascending" };
      const way = heading.ariaSort ? opposite[heading.ariaSort] : heading.dataset.first;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value ?? null;
      const compare = (a, b) => {
        if (a.className !== b.className) return a.className ? 1 : -1;
        if (column === 0) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent);
        const [u, v] = [value(a), value(b)];
        return u === null || v === null ? (u === null) - (v === null) : sign * (u - v);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

const roots = document.querySelectorAll("section");
const sections = JSON.parse(document.getElementById("data").textContent).map((data, i) => new Section(roots[i], data));
