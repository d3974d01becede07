// The browser of recorded steps: a run, a step, a question, and its completions side by side.

const shown = { run: 0, part: "", group: 0, quantity: "logprob", update: 0, step: null };
const CONTROLS = { greedy: "greedily", silent: "without sound", shuffled_audio: "with other sound", shuffled_choices: "with choices in another order" };

async function drawSteps(panel) {
  const runs = main.runs.map((run, number) => [number, run]).filter(([, run]) => run.recorded.length);
  if (!runs.length) {
    panel.replaceChildren(make("p", {}, "These runs have no recorded steps. Train with record.every above 0."));
    return;
  }
  if (!main.runs[shown.run].recorded.length) shown.run = runs[0][0];
  const recorded = main.runs[shown.run].recorded;
  if (!recorded.some((one) => one.part === shown.part)) shown.part = recorded.at(-1).part;
  if (!panel.querySelector("#step")) panel.replaceChildren(make("div", { class: "controls", id: "pick" }), make("div", { id: "step" }), detailPanel());
  document.getElementById("pick").replaceChildren(...stepControls(runs, recorded));
  await openStep();
}

function detailPanel() {
  return make("aside", { id: "token", "aria-label": "values of a token", "aria-live": "polite", hidden: true });
}

function stepControls(runs, recorded) {
  const place = recorded.findIndex((one) => one.part === shown.part);
  const pickRun = (value) => { shown.run = Number(value); shown.part = ""; drawSteps(document.getElementById("steps")); };
  const pickStep = (value) => { shown.part = value; drawSteps(document.getElementById("steps")); };
  const beside = (by, text) => make("button", { type: "button", disabled: !recorded[place + by], "aria-label": text,
    onclick: () => { pickStep(recorded[place + by].part); document.querySelector(`#pick button[aria-label="${text}"]:not([disabled])`)?.focus(); } }, by < 0 ? "‹" : "›");
  return [
    runs.length > 1 ? choose("Run", runs.map(([number, run]) => [String(number), run.name]), String(shown.run), pickRun) : null,
    choose("Step", recorded.map((one) => [one.part, String(one.step)]), shown.part, pickStep),
    beside(-1, "earlier step"), beside(1, "later step"),
  ].filter(Boolean);
}

// Read the chosen step and draw it; nothing is drawn again if it is open already.
async function openStep() {
  const { part: name, version } = main.runs[shown.run].recorded.find((one) => one.part === shown.part);
  if (shown.step?.name === name && shown.step.version === version) return;
  const step = await part(name, version);
  if (shown.part !== name) return;
  shown.step = { name, version, step };
  shown.group = Math.min(shown.group, Math.max((step?.groups?.length ?? 1) - 1, 0));
  shown.update = 0;
  drawStep();
}

function drawStep() {
  const { step } = shown.step, place = document.getElementById("step");
  hideToken();
  if (step === null || step.problem) {
    place.replaceChildren(make("p", {}, said(step?.problem ?? "This page does not hold the step.")));
    return;
  }
  if (!step.groups.length) {
    place.replaceChildren(make("p", {}, "This page holds no question of the step."));
    return;
  }
  place.replaceChildren(stepFacts(step), questionPicker(step), make("div", { id: "group" }));
  drawGroup();
}

function stepFacts(step) {
  const missing = step.ranks - step.parts.length;
  const names = Object.keys(step.updates[0] ?? {}).filter((name) => typeof step.updates[0][name] === "number");
  const figures = step.updates.map((update) => names.map((name) => `${name.replaceAll("_", " ")} ${number(update[name])}`).join(", "));
  return make("div", { class: "facts" },
    make("p", {}, `Step ${step.step}, learning rate ${number(step.learning_rate)}, ${step.questions} questions of ${step.group_size} completions. `,
      step.reason === "every" ? null : said(`Recorded because: ${step.reason}. `), missing ? `The parts of ${missing} ranks are missing.` : null),
    figures.map((text, n) => make("p", { class: "quiet" }, `update ${n + 1}: ${text}`)));
}

function questionPicker(step) {
  const pick = (n) => {
    shown.group = n;
    for (const button of document.querySelectorAll(".picker button")) button.setAttribute("aria-pressed", button.value === String(n));
    drawGroup();
  };
  const buttons = step.groups.map((group, n) => make("button", { type: "button", value: n, "aria-pressed": String(n === shown.group), onclick: () => pick(n) },
    said(group.id), make("small", {}, ` ${spreadOf(group)}`)));
  return make("div", { class: "picker", role: "group", "aria-label": "questions of the step" }, buttons);
}

function spreadOf(group) {
  const rewards = group.completions.map((one) => one.reward).filter((reward) => reward !== undefined);
  return rewards.length ? `${number(Math.min(...rewards), 3)} to ${number(Math.max(...rewards), 3)}` : "";
}

function drawGroup() {
  const { step } = shown.step, group = step.groups[shown.group];
  hideToken();
  document.getElementById("group").replaceChildren(questionView(group), colourControl(step), completionGrid(step, group));
}

function questionView(group) {
  const choices = group.choices.map((choice, n) => make("li", { class: n === group.right ? "right" : null }, said(choice), n === group.right ? make("small", {}, " right") : null));
  return make("section", { class: "question" },
    make("div", {}, make("h2", {}, said(group.question)),
      choices.length ? make("ol", { class: "choices", type: "A" }, choices) : make("p", {}, "Right: ", said(group.accepted.join(" | "))),
      controlAnswers(group),
      make("details", {}, make("summary", {}, "Prompt"), make("pre", {}, said(group.prompt)), make("p", { class: "quiet" }, said(group.line)))),
    make("div", {}, group.clips.map(clipView)));
}

function controlAnswers(group) {
  const answers = Object.entries(group.answers);
  if (!answers.length) return null;
  const items = answers.map(([name, answer]) => make("div", {}, make("dt", {}, CONTROLS[name] ?? visible(name)),
    make("dd", {}, verdict(answer.right), " ", said(answer.text || "(empty)"))));
  return make("dl", { class: "answers" }, make("div", {}, make("dt", {}, make("strong", {}, "Answered"))), items);
}

function verdict(isRight) {
  if (isRight === null || isRight === undefined) return make("span", { class: "quiet verdict" }, "not graded");
  return make("span", { class: `verdict ${isRight ? "good" : "bad"}` }, isRight ? "✓ right" : "✗ wrong");
}

function colourControl(step) {
  const has = (name) => step.groups.some((group) => group.completions.some((one) => one.tokens?.some((id, t) => typeof QUANTITIES[name].of(one, t, 0) === "number")));
  const names = [...Object.keys(QUANTITIES).filter(has), PLAIN];
  if (!names.includes(shown.quantity)) shown.quantity = names[0];
  const radio = (name) => make("label", {}, make("input", { type: "radio", name: "quantity", value: name, checked: name === shown.quantity,
    onchange: () => { shown.quantity = name; drawCompletions(); } }), name);
  const updates = step.updates.length > 1 ? choose("Update", step.updates.map((_, n) => [String(n), String(n + 1)]), String(shown.update),
    (value) => { shown.update = Number(value); drawCompletions(); }) : null;
  return make("div", { class: "controls" }, make("fieldset", {}, make("legend", {}, "Colour by"), names.map(radio)), updates, make("p", { class: "quiet", id: "scale" }));
}

function completionGrid(step, group) {
  queueMicrotask(drawCompletions);
  return make("div", { class: "completions", id: "completions" });
}

function drawCompletions() {
  const { step } = shown.step, group = step.groups[shown.group], place = document.getElementById("completions");
  const open = new Set([...place.querySelectorAll("details[open]")].map((one) => one.dataset.completion));
  place.replaceChildren(...group.completions.map((one, g) => completionCard(step, group, g, open.has(String(g)))));
  document.getElementById("scale").replaceChildren(...scaleText(group));
}

function scaleText(group) {
  const quantity = QUANTITIES[shown.quantity];
  if (!quantity) return [];
  const at = (shade, text) => make("span", { class: "swatch", "data-shade": shade }, text);
  const scale = scaleIn(group, shown), isLogprob = shown.quantity === "logprob";
  if (scale <= NOTHING) return [`no value differs from ${shown.quantity === "ratio" ? 1 : 0}`];
  const name = shown.quantity === "ratio" ? "log ratio" : shown.quantity;
  const isOneSided = isLogprob || shown.quantity === "KL" || shown.quantity === "entropy";
  return [isOneSided ? null : at(-SHADES, "low"), at(0, isLogprob ? "likely" : "0"), at(SHADES, isLogprob ? "unlikely" : "high"),
    ` ${name}, deepest at ${isLogprob ? "−4" : number(scale, 3)}; clipped tokens are underlined`].filter(Boolean);
}

function completionCard(step, group, g, isOpen) {
  const one = group.completions[g];
  const fill = (details) => { if (details.open && details.children.length === 1) details.append(...arithmetic(step, group, g, shown.update)); };
  const details = make("details", { "data-completion": g, open: isOpen, ontoggle: (event) => fill(event.target) }, make("summary", {}, "Arithmetic of its loss"));
  return make("article", { class: "completion", "aria-label": `completion ${g}` }, completionHead(step, one, g),
    tokenLine(step, group, g, shown, (at, t) => showToken(step, group, at, t)), one.advantage === undefined ? null : details);
}

function completionHead(step, one, g) {
  const rewards = one.rewards ? step.reward_names.map((name, k) => make("span", { class: "quiet" }, said(name), ` ${number(one.rewards[k])} `)) : [];
  return make("header", {}, make("h3", {}, String(g)),
    one.advantage === undefined ? null : make("strong", { class: one.advantage > 0 ? "good" : one.advantage < 0 ? "bad" : null }, `advantage ${signed(one.advantage)}`),
    one.reward === undefined ? null : make("span", {}, `reward ${number(one.reward)}`), rewards,
    one.stopped === false ? make("span", { class: "bad" }, "cut off") : null);
}

function showToken(step, group, g, t) {
  const place = document.getElementById("token");
  place.replaceChildren(make("button", { type: "button", class: "close", "aria-label": "close", onclick: hideToken }, "×"), ...tokenDetail(step, group, g, t, shown.update).filter(Boolean));
  place.hidden = false;
}

function hideToken() {
  document.getElementById("token").hidden = true;
}
