// The tokens of completions: coloured by a quantity, their values, and how a loss comes about.

const PLAIN = "plain text";
const QUANTITIES = {
  logprob: { label: "logprob", of: (one, t, u) => one.logprobs?.[u]?.[t], shade: (value, scale) => -value / scale, scale: () => 4 },
  ratio: { label: "ratio", of: (one, t, u) => one.ratio?.[u]?.[t], shade: (value, scale) => Math.log(value) / scale, size: (value) => Math.abs(Math.log(value)) },
  KL: { label: "KL", of: (one, t, u) => one.kl?.[u]?.[t], shade: (value, scale) => value / scale, size: Math.abs },
  advantage: { label: "advantage", of: (one) => one.advantage, shade: (value, scale) => value / scale, size: Math.abs },
  loss: { label: "loss", of: (one, t, u) => one.loss?.[u]?.[t], shade: (value, scale) => value / scale, size: Math.abs },
  entropy: { label: "entropy", of: (one, t, u) => one.entropy?.[u]?.[t], shade: (value, scale) => value / scale, size: Math.abs },
};
const SHADES = 4; // in each direction
const NOTHING = 1e-12; // the largest value that counts as 0

function tokenLine(step, group, g, shown, onshow) {
  const one = group.completions[g];
  if (shown.quantity === PLAIN || !one.tokens?.length) return make("p", { class: "tokens" }, said(one.text || "(empty)"));
  const scale = scaleIn(group, shown);
  const line = make("p", { class: "tokens", role: "group", "aria-label": `tokens of completion ${g}` },
    one.tokens.map((id, t) => tokenButton(step, one, id, t, shown, scale, () => onshow(g, t))));
  line.addEventListener("keydown", moveBetweenTokens);
  return line;
}

function tokenButton(step, one, id, t, shown, scale, onshow) {
  const quantity = QUANTITIES[shown.quantity], value = quantity.of(one, t, shown.update);
  const text = tokenText(step.texts[id] ?? `#${id}`);
  return make("button", { class: `token${one.clipped?.[shown.update]?.[t] ? " clipped" : ""}`, type: "button", tabindex: t ? -1 : 0,
    "data-shade": shadeOf(quantity, value, scale), title: `${quantity.label} ${number(value)}`,
    onfocus: onshow, onpointerenter: onshow, onclick: onshow }, text);
}

function shadeOf(quantity, value, scale) {
  if (value === null || value === undefined) return 0;
  return Math.min(Math.max(Math.round(quantity.shade(value, scale) * SHADES), -SHADES), SHADES);
}

// The value at the deepest shade: the largest one among the completions of a question.
function scaleIn(group, shown) {
  const quantity = QUANTITIES[shown.quantity];
  if (quantity.scale) return quantity.scale();
  const values = group.completions.flatMap((one) => (one.tokens ?? []).map((id, t) => quantity.of(one, t, shown.update)));
  return Math.max(NOTHING, ...bounded(values.filter((value) => typeof value === "number").map(quantity.size), Math.max));
}

// Left and right within a completion; up and down to the same place of its neighbour.
function moveBetweenTokens(event) {
  const line = event.currentTarget, own = [...line.children], place = own.indexOf(document.activeElement);
  const lines = [...document.querySelectorAll("p.tokens[role=group]")], row = lines.indexOf(line);
  const target = {
    ArrowLeft: () => own[place - 1], ArrowRight: () => own[place + 1], Home: () => own[0], End: () => own.at(-1),
    ArrowUp: () => atPlace(lines[row - 1], place), ArrowDown: () => atPlace(lines[row + 1], place),
  }[event.key];
  if (!target) return;
  event.preventDefault();
  const token = target();
  if (!token) return;
  for (const other of token.parentElement.children) other.tabIndex = other === token ? 0 : -1;
  token.focus();
}

function atPlace(line, place) {
  return line && (line.children[place] ?? line.lastElementChild);
}

// The values of one token, and the likeliest tokens at its place.
function tokenDetail(step, group, g, t, update) {
  const one = group.completions[g], id = one.tokens[t];
  const values = [
    ["logprob", one.logprobs?.[update]?.[t]], ["at sampling", one.old_logprobs?.[t]], ["reference", one.ref_logprobs?.[t]],
    ["ratio", one.ratio?.[update]?.[t]], ["KL", one.kl?.[update]?.[t]], ["entropy", one.entropy?.[update]?.[t]],
    ["advantage", one.advantage], ["weight", one.weights?.[t]], ["loss", one.loss?.[update]?.[t]],
  ].filter(([, value]) => value !== undefined);
  const pairs = values.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, number(value, 6))));
  return [
    make("h3", {}, said(tokenText(step.texts[id] ?? "")), make("small", {}, ` token ${id}, place ${t} of completion ${g}${one.clipped?.[update]?.[t] ? ", clipped" : ""}`)),
    make("dl", { class: "values" }, pairs), likeliest(step, one, t),
  ];
}

function likeliest(step, one, t) {
  if (!one.likeliest) return null;
  const rows = one.likeliest.ids[t].map((id, k) => likelyRow(step, id, Math.exp(one.likeliest.logprobs[t][k]), id === one.tokens[t]));
  return make("ol", { class: "likeliest", "aria-label": "likeliest tokens at this place" }, rows);
}

function likelyRow(step, id, share, isDrawn) {
  const bar = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { width: 100 * share, height: 8 }));
  return make("li", { class: isDrawn ? "drawn" : null }, said(tokenText(step.texts[id] ?? `#${id}`), { class: "text" }), bar,
    make("span", {}, percent(share)), isDrawn ? make("small", {}, "drawn") : null);
}

// The arithmetic of the loss of a completion

function arithmetic(step, group, g, update) {
  const one = group.completions[g];
  if (one.advantage === undefined || !one.loss) return [make("p", {}, "This completion has no loss of GRPO.")];
  const loss = step.config.loss, low = 1 - loss.clip_low, high = 1 + loss.clip_high;
  const rows = one.tokens.map((id, t) => lossRow(step, one, id, t, update, [low, high]));
  const heads = ["token", "log π", "log π at sampling", "ratio ρ", `clip(ρ, ${number(low)}, ${number(high)})`, "S", "log π of the reference", "KL", "weight w", "w (−S + β KL)"];
  const total = sum(one.loss[update]);
  return [make("p", {}, rewardLine(step, one)), make("p", {}, advantageLine(step, group, one)),
    make("p", {}, `loss of a token = w (−S + β KL${loss.entropy ? " − c H" : ""}), S = ${surrogateOf(loss)}, with A = ${fixed(one.advantage)} and β = ${number(betaOf(step))}`),
    table(heads, rows, { class: "arithmetic", "aria-label": `arithmetic of the loss of completion ${g}` }),
    make("p", { class: "total" }, `sum over ${one.tokens.length} tokens = ${fixed(total)}`)];
}

function lossRow(step, one, id, t, update, [low, high]) {
  const ratio = one.ratio[update][t], clip = Math.min(Math.max(ratio, low), high);
  const bonus = (step.config.loss.entropy ?? 0) * (one.entropy?.[update]?.[t] ?? 0);
  const surrogate = one.weights[t] ? betaOf(step) * (one.kl?.[update]?.[t] ?? 0) - bonus - one.loss[update][t] / one.weights[t] : 0;
  return [said(tokenText(step.texts[id] ?? "")), fixed(one.logprobs[update][t]), fixed(one.old_logprobs?.[t]), fixed(ratio), fixed(clip), fixed(surrogate),
    fixed(one.ref_logprobs?.[t]), fixed(one.kl?.[update]?.[t]), fixed(one.weights[t]), fixed(one.loss[update][t])];
}

// What bounds the ratio, by the settings of the loss.
function surrogateOf(loss) {
  if (loss.kind?.includes(".py:")) return `minus the loss of ${visible(loss.kind)}`;
  const cap = loss.ratio_cap ? `, at least ${number(loss.ratio_cap)} A where A < 0` : "";
  const surrogate = { clip: `min(ρ A, clip(ρ) A)${cap}`, cispo: "clip(ρ) A log π", sapo: "4/τ σ(τ (ρ − 1)) A", none: "ρ A", reinforce: "A log π" };
  return `${loss.importance_cap ? "importance · " : ""}${surrogate[loss.bound ?? "clip"]}`;
}

// The weight of the KL in the loss.
function betaOf(step) {
  return step.config.loss.kl_in === "reward" ? 0 : step.beta ?? step.config.loss.beta;
}

function rewardLine(step, one) {
  const weights = step.config.reward?.weights ?? {};
  const terms = step.reward_names.map((name, k) => `${number(weights[name] ?? 1)} × ${number(one.rewards[k])} (${visible(name)})`);
  return `reward r = ${terms.join(" + ")} = ${number(one.reward)}`;
}

function advantageLine(step, group, one) {
  const rewards = group.completions.map((each) => each.reward), mean = sum(rewards) / rewards.length;
  const spread = Math.sqrt(sum(rewards.map((each) => (each - mean) ** 2)) / Math.max(rewards.length - 1, 1));
  const kind = step.config.loss.advantage;
  if (!["std", "none"].includes(kind)) return `advantage A = ${visible(kind)} of the rewards = ${fixed(one.advantage)}`;
  const below = kind === "std" ? ` / (${fixed(spread)} + 0.0001)` : "";
  return `advantage A = (${number(one.reward)} − ${fixed(mean)})${below} = ${fixed(one.advantage)}`;
}
