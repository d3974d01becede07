// Curves: one small chart for each metric, a line for each run, one step marked in all charts.

const SECTIONS = [
  ["Reward and accuracy", ["accuracy", "silent_accuracy", "reward", "reward/*", "reward_std", "equal_reward_share"]],
  ["Policy", ["loss", "kl", "entropy", "clip_share", "sampler_gap", "grad_norm", "lr"]],
  ["Completions", ["completion_tokens", "stopped_share", "skipped_share", "no_choice_share", "cut_off_share", "duplicate_share"]],
  ["Time and memory", ["seconds/step", "seconds/*", "speed/*", "memory/*", "tokens", "macs", "communication/*", "record/*"]],
  ["Other", ["*"]],
];
const LABELS = {
  accuracy: "validation accuracy", silent_accuracy: "validation accuracy without sound", reward_std: "spread of rewards in a group",
  equal_reward_share: "share of groups with equal rewards", kl: "KL to the reference", entropy: "entropy, nats",
  clip_share: "share of tokens clipped", sampler_gap: "sampler gap", grad_norm: "gradient norm", lr: "learning rate",
  completion_tokens: "tokens of a completion", stopped_share: "share of completions that stopped",
  skipped_share: "share of groups skipped", tokens: "tokens scored", macs: "multiply-adds",
  "memory/peak_gib": "peak memory, GiB", "speed/tokens_per_second": "tokens per second",
  "speed/limit_share": "share of the device's rate",
};
const BOX = { width: 320, height: 150, left: 40, right: 14, top: 8, bottom: 20 };
const view = { smoothing: 0.6, step: null, charts: [] };

function drawCurves(panel) {
  const metrics = sectioned();
  view.charts = [];
  panel.replaceChildren(summary(), warningList(), smoothingControl(), ...metrics.map(sectionOf));
  mark(view.step);
}

function sectionOf([title, names]) {
  const charts = names.map((name) => chart(name));
  view.charts.push(...charts);
  return make("section", { class: "charts" }, make("h2", {}, title), make("div", { class: "grid" }, charts.map((one) => one.element)));
}

// The metrics that the runs have, by section, each in the first section that names it.
function sectioned() {
  const left = new Set(main.runs.flatMap((run) => [...evaluated(run), ...Object.keys(run.metrics)]));
  const take = (pattern) => [...left].filter((name) => fits(name, pattern) && left.delete(name));
  return SECTIONS.map(([title, patterns]) => [title, patterns.flatMap(take)]).filter(([, names]) => names.length);
}

function evaluated(run) {
  const names = run.evaluations.flatMap((one) => Object.keys(one));
  return names.filter((name) => name !== "step" && name !== "questions" && !name.endsWith("_interval") && !name.startsWith("accuracy/category"));
}

function fits(name, pattern) {
  return pattern.endsWith("*") ? name.startsWith(pattern.slice(0, -1)) : name === pattern;
}

function label(name) {
  return LABELS[name] ?? name.replace("reward/", "reward: ").replace("seconds/", "seconds: ").replace("accuracy/task/", "accuracy: ").replaceAll("_", " ");
}

// The points [step, value, interval] of a metric of a run.
function pointsOf(run, name) {
  if (name in run.metrics) {
    return run.metrics[name].map((value, n) => [run.steps[n], value]).filter(([, value]) => value !== null);
  }
  const known = run.evaluations.filter((one) => typeof one[name] === "number");
  return known.map((one) => [one.step, one[name], one[`${name}_interval`]]);
}

// Exponential moving average, corrected for its start.
function smooth(points, share) {
  let mean = 0, weight = 0;
  return points.map(([step, value]) => {
    mean = share * mean + (1 - share) * value;
    weight = share * weight + (1 - share);
    return [step, mean / weight];
  });
}

function chart(name) {
  const lines = main.runs.map((run, number) => ({ number, points: pointsOf(run, name) })).filter((line) => line.points.length);
  const isSparse = lines.some((line) => line.points[0].length === 3) || lines.every((line) => line.points.length < 40);
  const scale = scaleOf(lines.map((line) => line.points));
  const cursor = svg("line", { class: "cursor", y1: BOX.top, y2: BOX.height - BOX.bottom, visibility: "hidden" });
  const drawn = lines.flatMap((line) => (isSparse ? sparse(line, scale) : dense(line, scale)));
  const readout = make("output", { class: "readout" });
  const picture = svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, "aria-hidden": "true" }, axes(scale), drawn, cursor);
  const element = make("div", { class: "chart", tabindex: 0, role: "slider", "data-metric": name, "aria-label": `${label(name)}, by step`,
    "aria-valuemin": scale.first, "aria-valuemax": scale.last, onkeydown: (event) => moveByKey(event, scale) },
    make("h3", {}, label(name)), readout, picture);
  picture.addEventListener("pointermove", (event) => mark(stepAt(event, picture, scale)));
  picture.addEventListener("pointerleave", () => mark(null));
  return { element, lines, scale, cursor, readout };
}

// The scales of a chart, for the points of its lines.
function scaleOf(lines) {
  const values = lines.flat().flatMap(([, value, interval]) => [value, ...(interval ?? [])]);
  let low = Math.min(...bounded(values, Math.min)), high = Math.max(...bounded(values, Math.max));
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const first = Math.min(1, ...lines.map((points) => points[0][0])), last = Math.max(2, ...lines.map((points) => points.at(-1)[0]));
  const width = BOX.width - BOX.left - BOX.right, height = BOX.height - BOX.top - BOX.bottom;
  return {
    low, high, first, last,
    x: (step) => BOX.left + ((step - first) / (last - first)) * width,
    y: (value) => BOX.top + (1 - (value - low) / (high - low)) * height,
    step: (x) => Math.round(first + ((x - BOX.left) / width) * (last - first)),
  };
}

// The extreme values in pieces: a call cannot have very many arguments.
function bounded(values, extreme) {
  const pieces = [];
  for (let n = 0; n < values.length; n += 1000) pieces.push(extreme(...values.slice(n, n + 1000)));
  return pieces;
}

function axes(scale) {
  const across = ticks(scale.low, scale.high, 3).map((value) => [
    svg("line", { class: "rule", x1: BOX.left, x2: BOX.width - BOX.right, y1: scale.y(value), y2: scale.y(value) }),
    svg("text", { x: BOX.left - 4, y: scale.y(value) + 3, "text-anchor": "end" }, number(value, 3)),
  ]);
  const along = ticks(scale.first, scale.last, 4).map((step) =>
    svg("text", { x: scale.x(step), y: BOX.height - 6, "text-anchor": "middle" }, String(step)));
  return [...across.flat(), ...along];
}

// Round numbers between two limits.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / size);
  const found = [];
  for (let n = first; n * size <= high + size * 1e-9; n++) found.push(Number((n * size).toPrecision(12)));
  return found;
}

function dense({ number: run, points }, scale) {
  const path = (some, kind) => svg("path", { class: `${kind} run-${run % 6}`, d: pathOf(some, scale) });
  return view.smoothing ? [path(points, "faint"), path(smooth(points, view.smoothing), "line")] : [path(points, "line")];
}

function sparse({ number: run, points }, scale) {
  const bars = points.filter(([, , interval]) => interval).map(([step, , [low, high]]) =>
    svg("line", { class: `bar run-${run % 6}`, x1: scale.x(step), x2: scale.x(step), y1: scale.y(low), y2: scale.y(high) }));
  const dots = points.map(([step, value]) => svg("circle", { class: `dot run-${run % 6}`, cx: scale.x(step), cy: scale.y(value), r: 2.5 }));
  return [svg("path", { class: `line run-${run % 6}`, d: pathOf(points, scale) }), ...bars, ...dots];
}

function pathOf(points, scale) {
  return points.map(([step, value], n) => `${n ? "L" : "M"}${scale.x(step).toFixed(1)} ${scale.y(value).toFixed(1)}`).join("");
}

// The marked step

function stepAt(event, picture, scale) {
  const frame = picture.getBoundingClientRect();
  return Math.min(Math.max(scale.step(((event.clientX - frame.left) / frame.width) * BOX.width), scale.first), scale.last);
}

function moveByKey(event, scale) {
  const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 10, PageDown: -10 }[event.key];
  const now = view.step ?? scale.last;
  const step = event.key === "Home" ? scale.first : event.key === "End" ? scale.last : event.key === "Escape" ? null : by && now + by;
  if (step === undefined) return;
  event.preventDefault();
  mark(step === null ? null : Math.min(Math.max(step, scale.first), scale.last));
}

function mark(step) {
  view.step = step;
  for (const { element, lines, scale, cursor, readout } of view.charts) {
    const shown = lines.map(({ number: run, points }) => [run, nearest(points, step)]);
    readout.replaceChildren(...shown.map(([run, point]) => make("span", { class: `run-${run % 6}` }, number(point[1]), interval(point))));
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    const place = Math.min(step ?? scale.last, scale.last);
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, scale.x(place));
    element.setAttribute("aria-valuenow", place);
    const texts = shown.map(([run, point]) => `${main.runs[run].name} ${number(point[1])} at step ${point[0]}`);
    element.setAttribute("aria-valuetext", texts.join(", "));
  }
  document.getElementById("marked").textContent = step === null ? "the last step" : `step ${step}`;
}

// The last point that is not after a step; the first one if there is none.
function nearest(points, step) {
  if (step === null) return points.at(-1);
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (points[middle][0] <= step) low = middle; else high = middle - 1;
  }
  return points[low];
}

function interval(point) {
  return point[2] ? make("small", {}, ` ${number(point[2][0], 3)} to ${number(point[2][1], 3)}`) : null;
}

// Above the charts

function smoothingControl() {
  const change = (event) => {
    view.smoothing = Number(event.target.value);
    redrawCharts();
  };
  const input = make("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: view.smoothing, oninput: change });
  return make("div", { class: "controls" }, make("label", {}, "Smoothing", input),
    make("p", { class: "quiet" }, "Values of ", make("span", { id: "marked" }), ". Point at a chart, or use its arrow keys."));
}

function redrawCharts() {
  const panel = document.getElementById("curves");
  for (const section of panel.querySelectorAll(".charts")) section.remove();
  view.charts = [];
  panel.append(...sectioned().map(sectionOf));
  mark(view.step);
}

function summary() {
  const rows = main.runs.map((run, number) => [runName(number), ...figuresOf(run)]);
  const heads = ["run", "steps", "reward", "validation", "test accuracy", "without sound", "with other sound", "time"];
  return table(heads, rows, { class: "summary", "aria-label": "figures of the runs" });
}

function figuresOf(run) {
  const last = (name) => (run.metrics[name] ?? []).filter((value) => value !== null).slice(-20);
  const mean = (values) => (values.length ? number(sum(values) / values.length, 3) : "–");
  const test = run.evaluation ?? {};
  const seconds = sum((run.metrics["seconds/step"] ?? []).map((value) => value ?? 0));
  return [run.total ? `${run.steps.at(-1) ?? 0} of ${run.total}` : String(run.steps.at(-1) ?? 0), mean(last("reward")),
    percent(run.evaluations.at(-1)?.accuracy), percent(test.accuracy), percent(test.silent_accuracy),
    percent(test.shuffled_audio_accuracy), duration(seconds)];
}

function duration(seconds) {
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function warningList() {
  const found = main.runs.flatMap((run, number) => run.warnings.map((warning) => ({ number, ...warning })));
  if (!found.length) return make("p", { class: "quiet", id: "warnings" }, "The diagnosis has found nothing in these runs.");
  const items = found.map(({ number, step, name, text }) =>
    make("li", {}, runName(number), ` step ${step}: `, make("strong", {}, said(name)), " ", said(text)));
  return make("section", { id: "warnings", class: "warnings" }, make("h2", {}, "Diagnosis"), make("ul", {}, items));
}

function runName(number) {
  return make("span", { class: `run run-${number % 6}` }, said(main.runs[number].name));
}
