"use strict";
// The images stay in this page: they are sent when they are shown to the model and when they are taught. All texts
// enter the page as text, whatever they contain.

const AT_ONCE = 20; // images that are sent for prediction at a time
const PERIOD = 5000; // milliseconds between looks at whether the model was taught elsewhere

const at = (id) => document.getElementById(id);
const make = (tag, name, text) =>
  Object.assign(document.createElement(tag), name ? { className: name } : {}, text === undefined ? {} : { textContent: text });
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);
const counted = (count, one, several) => `${count} ${count === 1 ? one : several}`;

let state = { version: null, limits: { files: 0, file_mb: 0, all_mb: 0 } };
let images = []; // {file, url, answer}, in the order in which they came
let asked = 0; // number of the newest round of predictions; an older one ends when there is a newer

async function ask(path, fields) {
  let answer;
  try {
    if (fields === undefined) {
      answer = await fetch(path);
    } else {
      const body = new FormData();
      fields.forEach(([name, value]) => body.append(name, value));
      answer = await fetch(path, { method: "POST", headers: { "X-Cil": "1" }, body });
    }
  } catch {
    throw new Error("cil teach does not answer; is it still running?");
  }
  const found = await answer.json().catch(() => ({ error: "cil teach met an error, which its terminal shows" }));
  if (found.error) throw new Error(found.error);
  return found;
}

function say(lines, bad) {
  at("said").className = bad ? "error" : "";
  at("said").replaceChildren(...lines.map((line) => make("p", "", line)));
}

// --- the model --------------------------------------------------------------------------------------------------------
function drawState() {
  const { classes, lessons, accuracy, undo } = state;
  document.title = at("folder").textContent = state.folder;
  at("about").textContent = lessons.length ? `${state.learner} on ${state.backbone}` : "a new model";
  at("nothing").hidden = lessons.length > 0;
  at("learned").hidden = !lessons.length && !undo;
  at("accuracy").textContent = percent(accuracy);
  at("of").textContent = accuracy === null ? "no image is held out, so accuracy is not known" : "of all held-out images are right";
  at("classes").textContent = `${counted(classes.length, "class", "classes")}: ${classes.join(", ")}`;
  at("known").replaceChildren(...classes.map((name) => Object.assign(make("option"), { value: name })));
  at("lessons").replaceChildren(
    ...lessons.map((lesson, i) => {
      const row = make("tr");
      const cells = [i + 1, lesson.classes.join(", "), lesson.train, lesson.held_out];
      cells.push(percent(lesson.accuracy_then), percent(lesson.accuracy_now));
      row.append(...cells.map((cell, k) => make("td", k === 1 ? "text" : "", cell)));
      return row;
    }),
  );
  at("undo").hidden = !undo;
  at("undo").textContent = `Undo ${undo}`;
}

async function look() {
  const found = await ask("state");
  if (found.version === state.version) return;
  const first = state.version === null;
  state = found;
  drawState();
  if (!first && images.length) await predict();
}

// --- the images -------------------------------------------------------------------------------------------------------
function card(image) {
  const item = make("li"), body = make("div", "body"), { answer } = image;
  const shown = Object.assign(make("img"), { src: image.url, alt: "" });
  const name = Object.assign(make("div", "file", image.file.name), { title: image.file.name });
  const remove = Object.assign(make("button", "remove", "×"), { type: "button", ariaLabel: `Remove ${image.file.name}` });
  remove.addEventListener("click", () => forget([image]));
  shown.addEventListener("error", () => (shown.hidden = true)); // a type that the browser does not show
  body.append(name);
  if (!answer) body.append(make("div", "soft", "…"));
  else if (answer.error) body.append(make("div", "error soft", answer.error));
  else {
    item.classList.toggle("is-unknown", answer.known === false);
    if (answer.known === false) body.append(make("div", "unknown", "unknown"));
    for (const [label, score] of answer.classes) {
      const guess = make("div", "guess");
      if (image.calibrated) guess.append(Object.assign(make("progress"), { max: 1, value: score, ariaLabel: label }));
      guess.append(make("span", "", label), make("span", "", image.calibrated ? percent(score) : score.toFixed(3)));
      body.append(guess);
    }
  }
  item.append(shown, remove, body);
  return item;
}

function drawImages() {
  at("cards").replaceChildren(...images.map((image) => (image.card ??= card(image))));
  at("clear").hidden = at("teaching").hidden = !images.length;
  const usable = images.filter((image) => !image.answer?.error);
  at("ask").textContent = usable.length === 1 ? "What does this image show?" : `What do these ${usable.length} images show?`;
  at("learn").disabled = !usable.length;
  if (!images.length) at("note").hidden = true;
}

function forget(gone) {
  gone.forEach((image) => URL.revokeObjectURL(image.url));
  images = images.filter((image) => !gone.includes(image));
  drawImages();
}

// The reason why some files cannot be taken together with those that are there, or "".
function refusal(files) {
  const { limits } = state, mb = (bytes) => Math.ceil(bytes / 1e6);
  const large = files.find((file) => file.size > limits.file_mb * 1e6);
  if (large) return `${large.name}: ${mb(large.size)} MB; a file may have ${limits.file_mb} MB`;
  const all = [...images.map((image) => image.file), ...files];
  if (all.length > limits.files)
    return `${all.length} images are too many; allowed: ${limits.files}. Teach a whole folder with cil learn.`;
  const size = all.reduce((sum, file) => sum + file.size, 0);
  if (size > 0.99 * limits.all_mb * 1e6) return `${mb(size)} MB are too much; allowed: ${limits.all_mb} MB at a time`;
  return "";
}

async function add(list) {
  const key = (file) => `${file.name}\0${file.size}\0${file.lastModified}`;
  const there = new Set(images.map((image) => key(image.file)));
  const files = [...list].filter((file) => !there.has(key(file)));
  const reason = refusal(files);
  at("refused").textContent = reason;
  at("refused").hidden = !reason;
  if (reason) return;
  say([]);
  images.push(...files.map((file) => ({ file, url: URL.createObjectURL(file) })));
  drawImages();
  await predict();
}

async function predict() {
  const round = ++asked, all = [...images];
  for (let start = 0; start < all.length; start += AT_ONCE) {
    const some = all.slice(start, start + AT_ONCE).filter((image) => images.includes(image));
    if (!some.length) continue;
    const found = await ask("predict", some.map((image) => ["files", image.file]));
    if (round !== asked) return;
    some.forEach((image, i) => Object.assign(image, { answer: found.images[i], calibrated: found.calibrated, card: null }));
    at("note").textContent = found.note;
    at("note").hidden = !found.note;
    drawImages();
  }
}

// --- what a person does -----------------------------------------------------------------------------------------------
async function act(meanwhile, action) {
  const buttons = [...document.querySelectorAll("button, #name")];
  buttons.forEach((button) => (button.disabled = true));
  say([meanwhile]);
  try {
    const { message, notes } = await action();
    say([message, ...notes]);
  } catch (error) {
    say([error.message], true);
  }
  buttons.forEach((button) => (button.disabled = false));
  drawImages();
  await attempt(look);
}

const attempt = (action) => action().catch((error) => say([error.message], true));

at("files").addEventListener("change", (event) => {
  attempt(() => add(event.target.files));
  event.target.value = "";
});
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a browser would open a file that is dropped beside the field
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") attempt(() => add(event.dataTransfer.files));
  });
at("clear").addEventListener("click", () => forget(images));
at("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  const files = images.filter((image) => !image.answer?.error).map((image) => ["files", image.file]);
  act("Learning …", () => ask("teach", [["name", at("name").value], ...files]));
});
at("undo").addEventListener("click", () => act("Undoing …", () => ask("undo", [["version", state.version]])));
document.addEventListener("visibilitychange", () => document.hidden || attempt(look));
setInterval(() => document.hidden || look().catch(() => {}), PERIOD);
attempt(look);
