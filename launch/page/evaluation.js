// Evaluations: accuracy by task with intervals, and every question with its clip and its answers.

const FILTERS = {
  all: ["all", () => true],
  wrong: ["wrong", (row) => row.correct === false],
  right: ["right", (row) => row.correct === true],
  deaf: ["right without sound too", (row) => row.correct && row.answers.silent?.right],
  lost: ["wrong, but right without sound", (row) => row.correct === false && row.answers.silent?.right],
};
const ORDERS = {
  file: ["as in the file", null],
  sure: ["most confident first", (first, second) => (second.confidence ?? -1) - (first.confidence ?? -1)],
  unsure: ["least confident first", (first, second) => (first.confidence ?? 2) - (second.confidence ?? 2)],
};
const PAGE = 40; // questions drawn at a time
const asked = { run: 0, filter: "all", order: "file", search: "", task: "", count: PAGE, rows: null, version: null };

async function drawEvaluation(panel) {
  const runs = main.runs.map((run, number) => [number, run]).filter(([, run]) => run.evaluation);
  if (!runs.length) {
    panel.replaceChildren(make("p", {}, "These runs have no evaluation. `hark evaluate RUN --silent --shuffled-audio` writes one."));
    return;
  }
  if (!main.runs[asked.run].evaluation) asked.run = runs[0][0];
  const { part: name, version } = main.runs[asked.run].evaluation, key = `${name} ${version}`;
  const found = await part(name, version);
  if (asked.version === key) return;
  asked.version = key;
  asked.rows = found?.rows ?? [];
  panel.replaceChildren(accuracyTable(runs), make("h2", {}, "Questions"),
    found?.problem ? make("p", { class: "quiet" }, "Without the texts of the questions: ", said(found.problem)) : "",
    questionControls(runs), make("p", { id: "count", role: "status" }), make("div", { id: "questions" }));
  drawQuestions();
}

// Accuracy

function accuracyTable(runs) {
  const tasks = [...new Set(runs.flatMap(([, run]) => Object.keys(run.evaluation.groups?.task ?? {})))];
  const rows = [
    ["all", (one) => [one.accuracy, one.accuracy_interval]],
    ...tasks.map((task) => [task, (one) => [one.groups?.task?.[task]?.accuracy, one.groups?.task?.[task]?.interval]]),
    ...["silent", "shuffled_audio", "shuffled_choices"].map((name) => [CONTROLS[name], (one) => [one[`${name}_accuracy`], one[`${name}_accuracy_interval`]]]),
  ].filter(([, of]) => runs.some(([, run]) => typeof of(run.evaluation)[0] === "number"));
  const cells = rows.map(([name, of]) => [said(name), ...runs.map(([number, run]) => accuracyCell(number, ...of(run.evaluation), run.evaluation.chance))]);
  return table(["test accuracy", ...runs.map(([number]) => runName(number))], cells, { class: "accuracy", "aria-label": "test accuracy of the runs" });
}

function accuracyCell(run, accuracy, interval, chance) {
  if (typeof accuracy !== "number") return "–";
  const [low, high] = interval ?? [accuracy, accuracy];
  const strip = svg("svg", { viewBox: "0 0 100 10", class: `strip run-${run % 6}`, "aria-hidden": "true" },
    svg("line", { class: "rule", x1: 0, x2: 100, y1: 5, y2: 5 }), chance ? svg("line", { class: "chance", x1: 100 * chance, x2: 100 * chance, y1: 0, y2: 10 }) : null,
    svg("line", { class: "bar", x1: 100 * low, x2: 100 * high, y1: 5, y2: 5 }), svg("circle", { class: "dot", cx: 100 * accuracy, cy: 5, r: 2.5 }));
  return make("div", {}, make("strong", {}, percent(accuracy)), make("small", {}, ` ${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)}`), strip);
}

// Questions

function questionControls(runs) {
  const set = (name) => (value) => { Object.assign(asked, { [name]: value, count: PAGE }); drawQuestions(); };
  const pickRun = (value) => { asked.run = Number(value); drawEvaluation(document.getElementById("evaluation")); };
  const tasks = [...new Set(asked.rows.map((row) => row.task).filter(Boolean))];
  const hasConfidence = asked.rows.some((row) => typeof row.confidence === "number");
  return make("div", { class: "controls", id: "filters" },
    runs.length > 1 ? choose("Run", runs.map(([number, run]) => [String(number), run.name]), String(asked.run), pickRun) : null,
    choose("Show", Object.entries(FILTERS).map(([key, [text]]) => [key, text]), asked.filter, set("filter")),
    tasks.length > 1 ? choose("Task", [["", "all"], ...tasks.map((task) => [task, visible(task)])], asked.task, set("task")) : null,
    hasConfidence ? choose("Order", Object.entries(ORDERS).map(([key, [text]]) => [key, text]), asked.order, set("order")) : null,
    make("label", {}, "Search", make("input", { type: "search", value: asked.search, oninput: (event) => set("search")(event.target.value) })));
}

function selected() {
  const words = asked.search.toLowerCase().split(/\s+/).filter(Boolean), [, keep] = FILTERS[asked.filter], [, order] = ORDERS[asked.order];
  const rows = asked.rows.filter((row) => keep(row) && (!asked.task || row.task === asked.task) && words.every((word) => searchable(row).includes(word)));
  return order ? [...rows].sort(order) : rows;
}

function searchable(row) {
  row.searchable ??= [row.id, row.question, row.prediction, row.category, ...row.choices, ...row.accepted].join(" ").toLowerCase();
  return row.searchable;
}

function drawQuestions() {
  const rows = selected(), more = rows.length > asked.count;
  document.getElementById("count").textContent = `${rows.length} of ${asked.rows.length} questions`;
  document.getElementById("questions").replaceChildren(...rows.slice(0, asked.count).map(questionRow),
    more ? make("button", { type: "button", onclick: () => { asked.count += PAGE; drawQuestions(); } }, "Show more") : "");
}

function questionRow(row) {
  const fill = (event) => { if (event.target.open && event.target.children.length === 1) event.target.append(questionDetail(row)); };
  return make("details", { class: "row", ontoggle: fill }, make("summary", {}, verdict(row.correct), " ", said(row.question || row.id, { class: "ask" }),
    make("span", { class: "quiet" }, said(row.prediction || "(empty)")), typeof row.confidence === "number" ? make("span", { class: "number" }, percent(row.confidence)) : null));
}

function questionDetail(row) {
  const choices = row.choices.map((choice, n) => make("li", { class: n === row.right ? "right" : null }, said(choice), n === row.right ? make("small", {}, " right") : null));
  const place = make("dl", { class: "answers" });
  answersOf(row).then((items) => place.replaceChildren(...items));
  return make("section", { class: "question" },
    make("div", {}, make("p", { class: "quiet" }, said([row.id, row.task, row.category].filter(Boolean).join(" · "))),
      choices.length ? make("ol", { class: "choices", type: "A" }, choices) : row.accepted.length ? make("p", {}, "Right: ", said(row.accepted.join(" | "))) : null, place),
    make("div", {}, row.clips.map(clipView)));
}

// The answers of all runs to a question, and those under the controls.
async function answersOf(row) {
  const items = [];
  for (const [number, run] of main.runs.entries()) {
    const own = run.evaluation && (await part(run.evaluation.part, run.evaluation.version))?.rows.find((one) => one.id === row.id);
    if (!own) continue;
    items.push(answerItem(runName(number), own.correct, own.prediction, own.confidence));
    for (const [name, answer] of Object.entries(own.answers)) items.push(answerItem(CONTROLS[name] ?? visible(name), answer.right, answer.text));
  }
  return items;
}

function answerItem(name, isRight, text, confidence) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, verdict(isRight), " ", said(text || "(empty)"),
    typeof confidence === "number" ? make("small", {}, ` ${percent(confidence)}`) : null));
}
