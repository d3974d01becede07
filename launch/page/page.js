// The page: its tabs, the runs in its head, and the data of a run that is still running.

const VIEWS = { curves: drawCurves, steps: drawSteps, evaluation: drawEvaluation, configuration: drawConfiguration };
const POLL = 2000; // ms between two questions to the server

function openView(name, focus = false) {
  for (const key of Object.keys(VIEWS)) {
    const tab = document.getElementById(`tab-${key}`), isOpen = key === name;
    tab.setAttribute("aria-selected", isOpen);
    tab.tabIndex = isOpen ? 0 : -1;
    document.getElementById(key).hidden = !isOpen;
    if (isOpen && focus) tab.focus();
  }
  history.replaceState(null, "", `#show-${name}`); // no element has this name: the page does not scroll
  if (main.runs) VIEWS[name](document.getElementById(name));
}

function currentView() {
  return Object.keys(VIEWS).find((name) => !document.getElementById(name).hidden);
}

function moveBetweenTabs(event) {
  const names = Object.keys(VIEWS), place = names.indexOf(currentView()), count = names.length;
  const target = { ArrowLeft: place - 1 + count, ArrowRight: place + 1, Home: 0, End: count - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  openView(names[target % count], true);
}

function drawHead() {
  document.getElementById("runs").replaceChildren(...main.runs.map((run, number) => make("li", {}, runName(number))));
  document.title = `Hark: ${main.runs.map((run) => visible(run.name)).join(", ")}`;
  const notes = main.left_out.map((text) => make("li", {}, said(text)));
  document.getElementById("footer").replaceChildren(notes.length ? make("div", {}, make("p", {}, "Left out of this page:"), make("ul", { id: "left-out" }, notes)) : "");
}

function drawConfiguration(panel) {
  const heads = ["option", ...main.runs.map((run, number) => runName(number))];
  const rows = main.differences.map(({ name, values }) => [said(name), ...values.map((value) => said(typeof value === "string" ? value : JSON.stringify(value) ?? "not set"))]);
  const text = main.runs.length < 2 ? "One run has nothing to compare with. Its configuration is in its config.yaml." : "The configurations are equal.";
  panel.replaceChildren(make("h2", {}, "What the configurations differ in"),
    rows.length ? table(heads, rows, { class: "options", "aria-label": "options that differ" }) : make("p", {}, text));
}

// A run that is still running: what is open stays open, and what has changed is drawn again.

let tag = null;

async function poll() {
  try {
    const answer = await fetch("/main.json", tag ? { headers: { "If-None-Match": tag } } : {});
    if (answer.status === 200 && answer.headers.get("ETag") !== tag) {
      tag = answer.headers.get("ETag");
      update(await answer.json());
    }
    tell(`following; ${main.runs.map((run) => `step ${run.steps.at(-1) ?? 0}`).join(", ")}`);
  } catch (error) {
    tell("the server does not answer");
  }
  setTimeout(poll, POLL);
}

function update(found) {
  const isFirst = !main.runs;
  main = found;
  drawHead();
  if (isFirst) openView(viewInAddress());
  else if (currentView() === "curves") followCurves();
  else VIEWS[currentView()](document.getElementById(currentView()));
}

// Draw the curves again, with the focus where it was.
function followCurves() {
  const metric = document.activeElement?.dataset?.metric;
  const panel = document.getElementById("curves");
  panel.querySelector("#warnings").replaceWith(warningList());
  panel.querySelector(".wide").replaceWith(summary());
  redrawCharts();
  if (metric) document.querySelector(`[data-metric="${CSS.escape(metric)}"]`)?.focus({ preventScroll: true });
}

function tell(text) {
  const place = document.getElementById("status");
  if (place.textContent !== text) place.textContent = text;
}

function viewInAddress() {
  const name = location.hash.replace("#show-", "");
  return name in VIEWS ? name : "curves";
}

document.querySelector("[role=tablist]").addEventListener("keydown", moveBetweenTabs);
for (const name of Object.keys(VIEWS)) document.getElementById(`tab-${name}`).addEventListener("click", () => openView(name));
if (main.live) {
  poll();
} else {
  drawHead();
  openView(viewInAddress());
}
