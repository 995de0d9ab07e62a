// The playground: sends an image to the server and explores the response. The response contains every length, so that
// the page itself can apply lengths, criteria and thresholds.

const $ = (id) => document.getElementById(id);

// range: thresholds that the server accepts; slide: minimum, maximum and step of the slider; threshold: the initial
// value; up: higher is better
const MEASURES = {
  l1: { name: "L1", label: "mean absolute error", range: [0, 1], slide: [0, 0.2, 0.001], threshold: 0.08 },
  mse: { name: "MSE", label: "mean squared error", range: [0, 1], slide: [0, 0.05, 0.0005], threshold: 0.015 },
  psnr: { name: "PSNR", label: "signal-to-noise, dB", range: [0, 100], slide: [8, 40, 0.1], threshold: 18, up: true },
  ssim: { name: "SSIM", label: "structural similarity", range: [-1, 1], slide: [0, 1, 0.01], threshold: 0.5, up: true },
};
const RETURN = ["ids", "trace", "every_length", "attention"];
const HEAT = [255, 122, 41];

const state = {
  models: [],
  key: "", // in memory only
  file: null, // the most recent one, for retries
  name: "", // of the file in the answer
  asked: "", // the criterion of the request
  answer: null,
  measure: "l1",
  thresholds: Object.fromEntries(Object.entries(MEASURES).map(([name, { threshold }]) => [name, threshold])),
  shown: 0, // index of the displayed length
  token: 0,
  retry: null,
  request: new AbortController(),
};

/** Returns the server's description of a model, by default of the selected one. */
const model = (wanted = $("model").value) => state.models.find(({ name }) => name === wanted);
const result = () => state.answer.results[0];
const lengths = () => result().every_length;
const criterion = () => `${state.measure}:${state.thresholds[state.measure]}`;

// ------------------------------------------------------------------------------------------ requests

/** An error, with a message for the user. */
class Problem extends Error {
  constructor(message, { status = 0, transient = false } = {}) {
    super(sentence(message));
    this.status = status;
    this.transient = transient; // the same request may succeed later
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

async function ask(path, signal, body) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const send = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, send).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Problem("the server cannot be reached, or closed the connection", { transient: true });
  });
  const answer = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return {};
  });
  if (response.ok && Object.keys(answer).length) return answer;
  const { status } = response;
  const wait = response.headers.get("Retry-After");
  const when = wait === null ? "" : Number(wait) ? ` Try again in ${wait} seconds.` : " Try again later.";
  const refusal = answer.detail || answer.title || `the server responded with status ${status}`;
  const what = response.ok ? "the server's response cannot be read" : refusal;
  throw new Problem(sentence(what) + when, { status, transient: status === 429 || status >= 500 });
}

/** Runs an exchange with the server, cancels the previous one, and shows a failure to the user. */
async function attempt(message, exchange) {
  state.request.abort();
  const request = (state.request = new AbortController());
  state.retry = () => attempt(message, exchange);
  showStatus(message);
  document.body.classList.add("busy");
  try {
    await exchange(request.signal);
    state.retry = null;
  } catch (error) {
    if (request.signal.aborted) return; // cancelled by a newer exchange
    const problem = error instanceof Problem ? error : new Problem(`this page failed: ${error.message}`);
    showError(problem);
  }
  if (state.request === request) document.body.classList.remove("busy");
}

function showStatus(message) {
  $("status").textContent = message;
  $("alert").replaceChildren();
  $("retry").hidden = true;
}

function showError({ message, status, transient }) {
  showStatus("");
  $("alert").textContent = message;
  $("retry").hidden = !transient;
  if (status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

const loadModels = () => attempt("Loading the list of models…", async (signal) => {
  const { models, default: first } = await ask("v1/models", signal);
  state.models = models;
  $("model").replaceChildren(...models.map(({ name }) => new Option(name, name, name === first, name === first)));
  selectDefaultCriterion();
  showStatus("");
  if (state.file) encodeFile(state.file);
});

/** Selects the model's default criterion, if the page supports it. */
function selectDefaultCriterion() {
  const [name, value] = model().default_criterion.split(":");
  if (!MEASURES[name]) return;
  state.measure = name;
  state.thresholds[name] = Number(value);
}

function encodeFile(file) {
  state.file = file;
  if (!state.models.length) return loadModels(); // which calls this function again
  attempt(`Encoding ${file.name}…`, async (signal) => {
    if (!/^(image\/|$)/.test(file.type)) throw new Problem(`“${file.name}” is not an image (${file.type})`);
    const asked = criterion();
    const images = [{ data: await base64(file) }];
    signal.throwIfAborted(); // a newer image was chosen while this one was read
    const answer = await ask("v1/encode", signal, { model: model().name, images, criterion: asked, return: RETURN });
    const { error } = answer.results[0];
    if (error) throw new Problem(`“${file.name}”: ${error.detail || error.title}`, error);
    Object.assign(state, { answer, asked, name: file.name, token: 0 });
    showAnswer();
  });
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Problem(`“${file.name}” cannot be read: it may be a folder, or too large`));
    reader.readAsDataURL(file);
  });
}

// ------------------------------------------------------------------------------------------ choosing a length

/** Returns the first length that reaches the threshold, else the longest; compares in fp32, as the server does. */
function choose(measure) {
  const threshold = Math.fround(state.thresholds[measure]);
  const reaches = (value) => value !== null && (MEASURES[measure].up ? value >= threshold : value <= threshold);
  const index = lengths().findIndex((length) => reaches(Math.fround(length[measure] ?? NaN)));
  return { index: index < 0 ? lengths().length - 1 : index, satisfied: index >= 0 };
}

const png = (data) => `data:image/png;base64,${data}`;
const sign = (measure) => (MEASURES[measure].up ? "≥" : "≤");
const bytes = (tokens) => Math.ceil((tokens * Math.log2(model(state.answer.model).codebook_size)) / 8);

function format(measure, value) {
  if (!Number.isFinite(value)) return "–";
  return measure === "psnr" ? value.toFixed(1) : value.toPrecision(3).replace("-", "−");
}

function showAnswer() {
  const { input, width, height } = result();
  const { name } = state;
  const size = model(state.answer.model).image_size;
  $("results").hidden = false;
  $("results").classList.toggle("coarse", size <= 128);
  for (const id of ["original", "attended"]) $(id).src = png(input);
  $("original").alt = `${name}, as the model sees it`;
  $("attended").alt = `${name}, in gray`;
  const sides = (x, y) => `${x}\u00a0×\u00a0${y}`;
  caption("original-caption", "Original", `${name}, ${sides(width, height)}; the model sees ${sides(size, size)}`);
  $("length").max = lengths().length - 1;
  $("asked").textContent = state.asked;
  $("footer").textContent = `Model ${state.answer.model}, fingerprint ${state.answer.fingerprint}`;
  showStatus(`${name} is encoded.`);
  showChoice();
}

function caption(id, strong, text) {
  $(id).replaceChildren(make("b", { textContent: strong }), text);
}

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/** Updates everything that depends on the criterion and its threshold, and displays the chosen length. */
function showChoice() {
  for (const measure of Object.keys(MEASURES)) {
    const { index, satisfied } = choose(measure);
    $(`limit-${measure}`).textContent = `${sign(measure)} ${state.thresholds[measure]}`;
    $(`chosen-${measure}`).textContent = `${lengths()[index].num_tokens} tokens${satisfied ? "" : ", not met"}`;
    $(`chosen-${measure}`).classList.toggle("unmet", !satisfied);
  }
  const { name, range: [low, high], slide: [min, max, step] } = MEASURES[state.measure];
  const threshold = state.thresholds[state.measure];
  $(`criterion-${state.measure}`).checked = true;
  $("threshold-label").textContent = `Threshold of ${name}`;
  $("threshold-hint").textContent = `A number from ${low} to ${high}.`.replace("-", "−");
  Object.assign($("threshold"), { min, max, step, value: threshold });
  const number = $("threshold-number");
  if (document.activeElement !== number) Object.assign(number, { min: low, max: high, step, value: threshold });
  number.removeAttribute("aria-invalid");
  const { index, satisfied } = choose(state.measure);
  const tokens = lengths()[index].num_tokens;
  const goal = `${name} ${sign(state.measure)} ${threshold}`;
  $("choice").textContent = satisfied
    ? `${tokens} tokens are enough for ${goal}.`
    : `No length reaches ${goal}: the longest is taken, ${tokens} tokens.`;
  $("curl").textContent = curl();
  showTable(index);
  showLength(index);
}

function setThreshold(field) {
  const [low, high] = MEASURES[state.measure].range;
  const value = field.valueAsNumber;
  if (!(value >= low && value <= high)) return field.setAttribute("aria-invalid", "true");
  state.thresholds[state.measure] = value;
  showChoice();
}

function showTable(chosen) {
  const measures = Object.keys(MEASURES);
  const heads = ["tokens", "bytes", ...measures.map((measure) => MEASURES[measure].name)];
  const columns = heads.map((textContent) => make("th", { scope: "col", textContent }));
  columns[2 + measures.indexOf(state.measure)].className = "active";
  const rows = lengths().map((length, i) => {
    const header = make("th", { scope: "row", textContent: length.num_tokens });
    if (i === chosen) header.append(make("small", { textContent: " chosen" }));
    const cells = [bytes(length.num_tokens), ...measures.map((measure) => format(measure, length[measure]))];
    const data = cells.map((textContent) => make("td", { textContent }));
    return make("tr", { className: i === chosen ? "chosen" : "" }, header, ...data);
  });
  $("table-head").replaceChildren(make("tr", {}, ...columns));
  $("table-body").replaceChildren(...rows);
}

/** Updates everything that depends on the displayed length. */
function showLength(index) {
  state.shown = index;
  const length = lengths()[index];
  const { index: chosen } = choose(state.measure);
  const tokens = `${length.num_tokens} tokens`;
  $("length").value = index;
  $("length").setAttribute("aria-valuetext", tokens + (index === chosen ? ", chosen" : ""));
  $("length-ticks").replaceChildren(...lengths().map(({ num_tokens }, i) => {
    const className = [i === index && "now", i === chosen && "chosen"].filter(Boolean).join(" ");
    return make("span", { textContent: num_tokens, className });
  }));
  $("reconstruction").src = png(length.reconstruction);
  $("reconstruction").alt = `${state.name}, reconstructed from ${tokens}`;
  const score = `${MEASURES[state.measure].name} ${format(state.measure, length[state.measure])}`;
  caption("reconstruction-caption", `From ${tokens}`, `${bytes(length.num_tokens)} bytes, ${score}`);
  $("ids").textContent = JSON.stringify(length.ids).replaceAll(",", ", ");
  $("ids-title").textContent = `Token ids of ${tokens}`;
  drawCurve();
  showTokens();
}

// ------------------------------------------------------------------------------------------ the curve

function svg(name, attributes, textContent = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = textContent;
  return element;
}

/** Returns at most six round numbers from low to high. */
function ticks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => power * m >= rough * 0.999);
  const numbers = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) numbers.push(Number((i * step).toPrecision(6)));
  return numbers;
}

function drawCurve() {
  const { measure } = state;
  const { name, label, up = false } = MEASURES[measure];
  const { index: chosen, satisfied } = choose(measure);
  const limit = state.thresholds[measure];
  const all = lengths().map((length, i) => ({ i, tokens: length.num_tokens, value: length[measure] }));
  const points = all.filter(({ value }) => Number.isFinite(value));

  const [width, height, left, right, top, bottom] = [$("curve").clientWidth || 480, 300, 46, 12, 26, 44];
  const [inner, plot] = [width - left - right, height - top - bottom];
  const values = [...points.map(({ value }) => value), limit];
  const [smallest, largest] = [Math.min(...values), Math.max(...values)];
  const margin = (largest - smallest) * 0.12 || Math.abs(limit) * 0.1 || 1;
  const [low, high] = [smallest - margin, largest + margin];
  const [first, span] = [all[0].tokens, all.at(-1).tokens - all[0].tokens];
  const x = (tokens) => left + inner * (0.06 + 0.88 * (span ? (tokens - first) / span : 0.5));
  const y = (value) => top + plot * (1 - (value - low) / (high - low));

  const summary = points.map(({ tokens, value }) => `${tokens} tokens: ${format(measure, value)}`).join("; ");
  const [begin, tall] = up ? [top, y(limit) - top] : [y(limit), top + plot - y(limit)];
  const parts = [
    svg("title", { id: "curve-name" }, `${name} (${label}) over tokens`),
    svg("desc", { id: "curve-text" }, `${summary}. Threshold ${limit}. Chosen: ${all[chosen].tokens} tokens.`),
    svg("rect", { class: "reached", x: left, y: begin, width: inner, height: tall }),
  ];
  for (const tick of ticks(low, high)) {
    const label = String(tick).replace("-", "−");
    parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    parts.push(svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, label));
  }
  for (const { tokens } of all) {
    parts.push(svg("text", { x: x(tokens), y: top + plot + 20, "text-anchor": "middle" }, tokens));
  }
  // places the threshold's label away from the curve: to its left, or to its right once it has crossed the threshold
  const behind = satisfied && x(all[chosen].tokens) < left + inner / 2;
  const side = behind ? { x: width - right - 6, "text-anchor": "end" } : { x: left + 6 };
  parts.push(
    svg("line", { class: "limit", x1: left, x2: width - right, y1: y(limit), y2: y(limit) }),
    svg("text", { class: "accent", ...side, y: y(limit) + (up !== behind ? -7 : 16) }, `threshold ${limit}`),
    svg("polyline", { class: "line", points: points.map(({ tokens, value }) => `${x(tokens)},${y(value)}`).join(" ") }),
  );
  for (const { i, tokens, value } of points) {
    const [cx, cy] = [x(tokens), y(value)];
    if (i === state.shown) parts.push(svg("circle", { class: "now-ring", cx, cy, r: 11 }));
    if (i === chosen) {
      const label = { class: "strong", x: cx, y: cy + (up ? 28 : -17), "text-anchor": "middle" };
      parts.push(svg("circle", { class: "pick", id: "curve-chosen", cx, cy, r: 7, "data-tokens": tokens }));
      parts.push(svg("text", label, format(measure, value)));
    }
    parts.push(svg("circle", { class: "dot", cx, cy, r: 3.5 }));
  }
  parts.push(svg("text", { x: left + inner / 2, y: height - 4, "text-anchor": "middle" }, "tokens"));
  parts.push(svg("text", { x: 0, y: 12 }, `${name}, ${label}`));
  $("curve").setAttribute("height", height);
  $("curve").replaceChildren(...parts);
}

// ------------------------------------------------------------------------------------------ attention

/** Returns the attention map of every token at the displayed length: the roots of `grid` × `grid` weights in 0..1. */
function maps() {
  const { grid, maps: data } = result().attention[state.shown];
  const weights = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return lengths()[state.shown].ids.map((_, token) => {
    const map = [...weights.subarray(token * grid * grid, (token + 1) * grid * grid)];
    const peak = Math.max(1, ...map);
    return { grid, weights: map.map((weight) => Math.sqrt(weight / peak)) };
  });
}

function paint(canvas, { grid, weights }) {
  canvas.width = canvas.height = grid;
  const pixels = weights.flatMap((weight) => [...HEAT, Math.round(255 * 0.9 * weight)]);
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels), grid), 0, 0);
  return canvas;
}

function showTokens() {
  const { ids } = lengths()[state.shown];
  $("tokens").replaceChildren(...maps().map((map, i) => {
    const ariaLabel = `Token ${i + 1}, id ${ids[i]}, ${where(map)}`;
    const option = { id: `token-${i}`, className: "token", role: "option", ariaLabel };
    return make("div", option, paint(make("canvas"), map), String(i + 1));
  }));
  $("token").max = ids.length - 1;
  showToken(Math.min(state.token, ids.length - 1));
}

function showToken(token) {
  state.token = token;
  const { ids } = lengths()[state.shown];
  const map = maps()[token];
  const description = `id ${ids[token]}, attends most to the ${where(map)}`;
  paint($("heat"), map).ariaLabel = `Token ${token + 1} ${description}`;
  caption("token-caption", `Token ${token + 1} of ${ids.length}`, description);
  $("token").value = token;
  $("token").setAttribute("aria-valuetext", `${token + 1} of ${ids.length}, ${description}`);
  for (const [i, option] of [...$("tokens").children].entries()) option.ariaSelected = i === token;
  $("tokens").setAttribute("aria-activedescendant", `token-${token}`);
}

/** Describes the position of a map's maximum in words. */
function where({ grid, weights }) {
  const peak = weights.indexOf(Math.max(...weights));
  const third = (place) => Math.floor(((place + 0.5) / grid) * 3);
  const row = ["top", "middle", "bottom"][third(Math.floor(peak / grid))];
  return `${row} ${["left", "center", "right"][third(peak % grid)]}`;
}

function moveToken(event) {
  const columns = getComputedStyle($("tokens")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity };
  const step = steps[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const last = $("tokens").children.length - 1;
  const to = state.token + step;
  showToken(Math.min(Math.max(to, 0), last));
}

// ------------------------------------------------------------------------------------------ export

/** Returns the page's request as a shell command; printf, as a shell builtin, accepts an image of any size. */
function curl() {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const body = { model: state.answer.model, criterion: criterion(), return: RETURN, images: [{ data: "\0" }] };
  const template = JSON.stringify(body).replaceAll("%", "%%").replace("\\u0000", "%s");
  const key = state.key ? "\n    -H \"Authorization: Bearer $ALIT_KEY\" \\" : "";
  return `printf ${quote(template)} \\
    "$(base64 < ${quote(state.name)} | tr -d '\\n')" |
  curl ${quote(new URL("v1/encode", location.href).href)} \\${key}
    -H 'Content-Type: application/json' --data-binary @-`;
}

function confirm(id, message) {
  $(id).textContent = message;
  clearTimeout(confirm[id]);
  confirm[id] = setTimeout(() => $(id).replaceChildren(), 4000);
}

async function copy(name) {
  try {
    await navigator.clipboard.writeText($(name).textContent); // undefined on pages loaded over plain HTTP
    confirm(`copied-${name}`, "Copied");
  } catch {
    getSelection().selectAllChildren($(name));
    confirm(`copied-${name}`, "Selected: press Ctrl+C or ⌘C to copy");
  }
}

function download() {
  const blob = new Blob([JSON.stringify(state.answer, null, 1)], { type: "application/json" });
  const href = URL.createObjectURL(blob);
  make("a", { href, download: `${state.name.replace(/\.[^.]*$/, "")}.alit.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
  confirm("downloaded", "Downloaded");
}

// ------------------------------------------------------------------------------------------ examples

const SAMPLES = [
  ["gradient", "Gradient", "simple", (context, size) => {
    const fill = context.createLinearGradient(0, 0, size, size);
    fill.addColorStop(0, "#f3c99f");
    fill.addColorStop(1, "#5b7f9e");
    context.fillStyle = fill;
    context.fillRect(0, 0, size, size);
  }],
  ["shapes", "Shapes", "medium", (context, size) => {
    const shapes = {
      "#e8e2d4": "M0 0H1V1H0",
      "#2f5d62": "M.1 .5H.52V.9H.1",
      "#d9541a": "M.42 .34a.24 .24 0 1 1 .48 0a.24 .24 0 1 1 -.48 0",
      "#e9b44c": "M.5 .92H.92L.71 .52",
    };
    context.scale(size, size);
    for (const [color, path] of Object.entries(shapes)) {
      context.fillStyle = color;
      context.fill(new Path2D(path));
    }
  }],
  ["texture", "Texture", "complex", (context, size) => {
    let seed = 7; // the same texture everywhere
    const random = (from, to) => from + (to - from) * ((seed = (seed * 16807) % 2147483647) / 2147483647);
    for (let i = 0; i < 2600; i++) {
      context.fillStyle = `hsl(${random(0, 360)} ${random(30, 90)}% ${random(10, 90)}%)`;
      context.fillRect(random(-12, size), random(-12, size), random(4, 20), random(4, 20));
    }
  }],
];

function drawSamples() {
  for (const [id, name, kind, draw] of SAMPLES) {
    const canvas = make("canvas", { width: 256, height: 256 });
    draw(canvas.getContext("2d"), 256);
    const words = [make("b", { textContent: name }), make("span", { textContent: kind })];
    const button = make("button", { id: `sample-${id}` }, canvas, ...words);
    button.onclick = () => canvas.toBlob((blob) => encodeFile(new File([blob], `${id}.png`, { type: blob.type })));
    $("samples").append(button);
  }
}

// ------------------------------------------------------------------------------------------ the page

function drawCriteria() {
  for (const [measure, { name, label }] of Object.entries(MEASURES)) {
    const onchange = () => {
      state.measure = measure;
      showChoice();
    };
    const radio = make("input", { type: "radio", name: "criterion", id: `criterion-${measure}`, onchange });
    const limit = make("span", { id: `limit-${measure}` });
    const meaning = make("span", { textContent: label });
    const text = make("div", {}, make("b", { textContent: name }), " ", limit, make("br"), meaning);
    const tokens = make("span", { id: `chosen-${measure}`, className: "tokens" });
    $("criteria").append(make("label", { className: "criterion" }, radio, text, tokens));
  }
}

function listen() {
  const encodeFirst = (files) => files.length && encodeFile(files[0]);
  $("file").onchange = () => {
    encodeFirst($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  };
  document.onpaste = (event) => encodeFirst(event.clipboardData.files);
  document.ondragover = (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  };
  document.ondragleave = (event) => event.relatedTarget || document.body.classList.remove("dragging");
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    encodeFirst(event.dataTransfer.files);
  };
  $("model").onchange = () => {
    selectDefaultCriterion();
    if (state.file) encodeFile(state.file);
  };
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    state.key = $("key").value;
    state.retry?.();
  };
  $("retry").onclick = () => state.retry();
  $("length").oninput = () => showLength($("length").valueAsNumber);
  $("threshold").oninput = () => setThreshold($("threshold"));
  $("threshold-number").oninput = () => setThreshold($("threshold-number"));
  $("threshold-number").onblur = () => state.answer && showChoice();
  $("token").oninput = () => showToken($("token").valueAsNumber);
  $("tokens").onkeydown = moveToken;
  $("tokens").onpointerover = ({ target }) => {
    const option = target.closest(".token");
    if (option) showToken([...$("tokens").children].indexOf(option));
  };
  $("copy-ids").onclick = () => copy("ids");
  $("copy-curl").onclick = () => copy("curl");
  $("download").onclick = download;
  new ResizeObserver(() => state.answer && drawCurve()).observe($("curve"));
}

drawSamples();
drawCriteria();
listen();
loadModels();
