// Recipes and runs of the folder: start, follow, stop.

import { $, element, request, say, span, toast } from "./page.js";
import { openForm } from "./recipe.js";

const PERIOD_MS = 2000;
let chosen = "";
let timer = 0;
let entered = false;
let names = [];
let step = null;  // whose sample answers are shown; null: the latest

export async function enter(place) {
  entered = true;
  if (place && place !== chosen) [chosen, step] = [place, null];
  await follow();
}

export function leave() {
  entered = false;
  clearTimeout(timer);
}

async function follow() {
  clearTimeout(timer);
  const { value } = await request("runs");
  lists(value);
  if (chosen.endsWith(".html")) page(chosen);
  else if (chosen) await show(chosen);
  if (entered) timer = setTimeout(() => (document.hidden ? later() : follow()), PERIOD_MS);
}

function later() {
  document.addEventListener("visibilitychange", () => { if (entered) follow(); }, { once: true });
}

async function start(recipe, resume) {
  const { value } = await request("runs/start", { recipe, resume });
  open(value.name);
}

$("new-recipe").addEventListener("click", () => {
  chosen = "";
  openForm($("run"), names, async (file, now) => {
    if (now) await start(file, false);
    await follow();
  });
});

function lists({ recipes, runs, pages, going }) {
  const begin = (recipe, resume) => () => start(recipe, resume);
  names = recipes;
  fill($("recipe-list"), recipes.map((name) => element("li", {},
    element("span", { class: "name", title: name }, ...short(name)),
    element("button", { type: "button", disabled: going.length > 0, onclick: begin(name, false) }, say("start")),
    element("button", { type: "button", class: "quiet", disabled: going.length > 0, onclick: begin(name, true) }, say("resume")))),
    say("no_recipes"));
  const link = (name) => element("a", { href: `#runs/${encodeURIComponent(name)}`,
    "aria-current": name === chosen ? "true" : null, title: name }, name);
  $("pages").hidden = !pages.length;
  fill($("page-list"), pages.map((name) => element("li", {}, link(name))), "");
  fill($("run-list"), runs.map((name) => element("li", {},
    link(name),
    going.includes(name) ? element("span", { class: "chip going" }, say("going")) : null)), say("no_runs"));
}

// The recipe's own name first, then its folder.
function short(name) {
  const parts = name.replace(/\.toml$/, "").split("/");
  const own = parts.pop();
  return [own, ...(parts.length ? [element("small", {}, parts.join("/"))] : [])];
}

function fill(list, items, empty) {
  redraw(list, items.map((item) => item.outerHTML), () => (items.length ? items : [element("li", { class: "faint" }, empty)]));
}

// Drawn anew only when what it shows has changed: nothing flickers, closes, or is taken away from under the pointer.
function redraw(box, shown, make) {
  const now = JSON.stringify(shown);
  if (box.dataset.shown === now) return;
  box.dataset.shown = now;
  box.replaceChildren(...make());
}

function open(name) {
  [chosen, step] = [name, null];
  location.hash = `runs/${encodeURIComponent(name)}`;
}

// A page that Dianjing wrote, in a frame that reaches nothing but what stands in its file.
function page(name) {
  if ($("run").dataset.name === name) return;
  $("run").dataset.name = name;
  $("run").replaceChildren(element("iframe", { src: `page?name=${encodeURIComponent(name)}`, title: name, sandbox: "allow-scripts" }));
}

async function show(name) {
  const { value: run } = await request(`run?name=${encodeURIComponent(name)}${step === null ? "" : `&step=${step}`}`);
  if (name !== chosen) return;
  const state = run.going ? say("going")
    : run.exit_code !== null ? say("ended", { code: run.exit_code })
    : run.seconds_since_last_line !== null ? say("last_line", { seconds: span(run.seconds_since_last_line) }) : "";
  const last = run.last;
  const figures = last ? [
    [say("step"), `${last.step}${run.total_steps ? ` / ${run.total_steps}` : ""}`],
    ["loss", last.loss?.toFixed(4) ?? "NaN"],
    [say("rate"), last.learning_rate?.toExponential(2) ?? "NaN"],
    [say("speed"), last.samples_per_second?.toFixed(1) ?? "NaN"],
  ] : [];
  if ($("run").dataset.name !== name) {
    $("run").dataset.name = name;
    $("run").replaceChildren(...["head", "curve", "samples", "log"].map((part) => element("div", { id: `run-${part}` })));
  }
  const damaged = run.damaged_lines.length ? say("damaged_lines", { lines: run.damaged_lines.join(", ") }) : "";
  redraw($("run-head"), [name, state, run.going, figures, damaged], () => [
    element("div", { class: "headline" },
      element("h1", {}, name), element("span", { class: `chip ${run.going ? "going" : ""}`, id: "run-state" }, state),
      element("span", { class: "gap" }),
      run.going ? element("button", { type: "button", id: "stop", class: "bad", onclick: async () => {
        await request("runs/stop", { name });
        toast(say("stopping"));
      } }, say("stop")) : null),
    last ? element("dl", { class: "figures" }, ...figures.map(([label, text]) =>
      element("div", {}, element("dt", {}, label), element("dd", {}, text))))
      : element("p", { class: "faint" }, run.going ? say("starting") : ""),
    damaged ? element("p", { class: "faint" }, damaged) : "",
  ]);
  redraw($("run-curve"), [run.curve, run.held_out, step], () => (run.curve.length > 1 ? [curve(run.curve, run.held_out)] : []));
  redraw($("run-samples"), run.samples, () => samples(run));
  const failed = (run.exit_code ?? 0) !== 0;
  redraw($("run-log"), [run.log, failed], () => (run.log
    ? [element("details", { open: failed || $("run-log").querySelector("details")?.open },
      element("summary", {}, say("log")), element("pre", { class: "raw" }, run.log))] : []));
}

function samples(run) {
  if (!run.samples.length) return [];
  const rows = run.samples.map((row) => element("tr", {},
    element("td", {}, row.picture ? element("img", { alt: row.id,
      src: `run/picture?name=${encodeURIComponent(run.name)}&record=${encodeURIComponent(row.id)}` }) : ""),
    element("td", {}, row.question), element("td", { class: row.answer === row.reference ? "same" : "" }, row.answer),
    element("td", { class: "faint" }, row.reference)));
  const heads = ["", say("question"), say("answer"), say("reference")].map((text) => element("th", {}, text));
  return [element("h2", {}, say("samples", { step: run.samples[0].step })),
    element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows))];
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The loss over the steps, with a few round numbers at the sides; a point wherever held-out questions were answered.
function curve(points, heldOut) {
  const [width, height, left, right, bottom, top] = [760, 290, 56, 24, 44, 14];
  const steps = points.map(([step]) => step), losses = points.map(([, loss]) => loss).filter(Number.isFinite);
  if (!losses.length) return element("span");
  const [first, final] = [Math.min(...steps), Math.max(...steps)];
  const ticks = round(Math.min(...losses), Math.max(...losses));
  const [low, high] = [ticks[0], ticks.at(-1)];
  const x = (step) => left + ((step - first) / Math.max(final - first, 1)) * (width - left - right);
  const y = (loss) => top + ((high - loss) / (high - low)) * (height - top - bottom);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": say("loss"), class: "curve" });
  for (const tick of ticks) {
    drawn.append(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid" }),
      svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(+tick.toFixed(6))));
  }
  for (const tick of round(first, final).filter((tick) => tick >= first && tick <= final && Number.isInteger(tick))) {
    drawn.append(svg("text", { x: x(tick), y: height - bottom + 18, "text-anchor": "middle" }, String(tick)));
  }
  const path = points.filter(([, loss]) => Number.isFinite(loss))
    .map(([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  drawn.append(svg("path", { d: path, class: "line" }),
    svg("text", { x: width - right, y: height - 7, "text-anchor": "end" }, say("step")));
  const shown = step ?? heldOut.at(-1)?.[0];
  for (const [at, f1] of heldOut) {
    const value = f1.toFixed(2);
    const mark = svg("circle", { cx: x(at), cy: top + (1 - f1) * (height - top - bottom), r: 5, tabindex: 0, role: "button",
      class: at === shown ? "held-out shown" : "held-out", "aria-label": say("held_out_point", { step: at, value }) });
    mark.append(svg("title", {}, say("held_out_point", { step: at, value })));
    const choose = () => { step = at; follow(); };
    mark.addEventListener("click", choose);
    mark.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
    drawn.append(mark);
  }
  return element("figure", {}, element("figcaption", {}, say("loss"), heldOut.length ? ` · ${say("held_out")}` : ""), drawn);
}

// Round numbers around a range: 1, 2 or 5 times a power of ten apart.
function round(low, high) {
  const range = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(range / 4));
  const gap = power * [1, 2, 5, 10].find((factor) => range / (factor * power) <= 5);
  const found = [];
  for (let i = Math.floor(low / gap + 1e-9); i * gap < high + gap * (1 - 1e-9); i += 1) found.push(i * gap);
  return found.length > 1 ? found : [found[0], found[0] + gap];
}
