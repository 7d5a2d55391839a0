// One record at a time: look, decide, edit, undo.

import { $, about, element, request, say, toast } from "./page.js";
import * as editor from "./editor.js";

let shown = null; // the record on the page
let busy = false;
let asked = 0; // for the counts; only the latest answer is shown
let filter = "all";
let entered = false;
let polling = 0;

// What this tab changed: the records in order, and each one's version after it; undone in that order, also after a reload.
// Kept by the data file's hash: another file may be reviewed at the same address later.
const mine = {
  name: `mine-${about.data_hash}`,
  read: () => JSON.parse(sessionStorage.getItem(mine.name) ?? '{"order": [], "versions": {}}'),
  write: (value) => sessionStorage.setItem(mine.name, JSON.stringify({ ...value, order: value.order.slice(-500) })),
};

export async function enter(place) {
  if (!about.data) return;
  if (!entered) begin();
  entered = true;
  watchCheck();
  const index = /^\d+$/.test(place) ? Number(place) : shown ? shown.index : 0;
  if (!shown || shown.index !== index) await alone(() => move(index, 1, "all"));
}

export function leave() {
  clearTimeout(polling);
}

export function index() {
  return shown && shown.images.length ? shown.index : null;
}

export function key(event) {
  const pressed = { ArrowRight: "j", ArrowLeft: "k" }[event.key] ?? event.key.toLowerCase();
  const button = { j: "next", k: "previous", a: "accept", r: "reject", e: "edit", u: "undo", g: "generate", s: "sees" }[pressed];
  if (!button || !about.data) return false;
  if (event.repeat && button !== "next" && button !== "previous") return true; // a key held down decides once
  $(button).click();
  return true;
}

// One thing at a time: a key pressed before the answer is here would be about a record that nobody has seen.
async function alone(work) {
  if (busy || editor.isOpen()) return;
  busy = true;
  try {
    await work();
  } finally {
    busy = false;
  }
  await counts();
}

function begin() {
  filter = sessionStorage.getItem("filter") ?? "all";
  for (const button of $("filters").children) {
    button.addEventListener("click", () => choose(button.dataset.filter));
  }
  $("previous").addEventListener("click", () => alone(() => move(shown.index - 1, -1, filter)));
  $("next").addEventListener("click", () => alone(() => move(shown.index + 1, 1, filter)));
  $("accept").addEventListener("click", () => alone(() => decide("accept")));
  $("reject").addEventListener("click", () => alone(() => decide("reject")));
  $("edit").addEventListener("click", () => busy || edit(shown.messages ?? [], null));
  $("undo").addEventListener("click", () => alone(undo));
  $("generate").addEventListener("click", generate);
  $("sees").addEventListener("click", async () => {
    $("seen").hidden = !$("seen").hidden;
    await showSeen();
    if (!$("seen").hidden) $("seen").scrollIntoView({ block: "start" });
  });
  $("export").addEventListener("click", writeReviewed);
  $("jump").addEventListener("change", () => {
    const wanted = Number($("jump").value);
    $("jump").value = "";
    $("jump").blur();
    alone(() => move(Math.max(0, Math.floor(wanted)), 1, "all"));
  });
  $("prompt").value = `conversation_${document.documentElement.lang}`;
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && shown) alone(refresh);
  });
  marks();
}

function marks() {
  for (const button of $("filters").children) button.setAttribute("aria-pressed", button.dataset.filter === filter);
}

function choose(name) {
  filter = name;
  sessionStorage.setItem("filter", name);
  marks();
  alone(async () => {
    const here = shown ? shown.index : 0;
    if (!(await move(here, 1, filter, true))) await move(here, -1, filter);
  });
}

// Show the first record of a filter from `start` on, in one direction.
async function move(start, step, chosen, quietly = false) {
  const { value } = await request(`next?from=${start}&step=${step}&filter=${chosen}`);
  if (value.index === null) {
    if (!quietly) toast(say(shown ? "no_more" : "nothing_here"));
    return false;
  }
  show((await request(`records/${value.index}`)).value);
  return true;
}

async function refresh() {
  const { value } = await request(`records/${shown.index}`);
  if (value.version !== shown.version) show(value);
}

function show(record) {
  shown = record;
  history.replaceState(null, "", `#review/${record.index}`);
  $("record-name").textContent = record.id === String(record.index) ? say("record", { index: record.index }) : record.id;
  $("record-name").title = say("record", { index: record.index });
  $("status").textContent = say(record.status);
  $("status").className = `chip ${record.status}`;
  $("edited").hidden = !record.edited;
  notice(record.changed_on_disk ? say("changed_on_disk") : "");
  showPictures(record);
  showConversation(record);
  showFindings(record);
  buttons();
  showSeen();
  scrollTo(0, 0);
}

function buttons() {
  const writing = editor.isOpen();
  for (const id of ["previous", "next", "accept", "reject", "undo"]) $(id).disabled = writing;
  $("edit").disabled = writing || !shown?.can_edit;
  $("generate").disabled = writing || !about.generate || !shown?.can_edit || shown?.images.length !== 1;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function showPictures(record) {
  const made = record.images.map((name, number) => {
    const image = element("img", { alt: name, src: `records/${record.index}/pictures/${number}` });
    const figure = element("figure", {}, image, element("figcaption", {}, name));
    image.addEventListener("error", async () => {
      const answer = await fetch(image.src);
      const reason = answer.ok ? "" : (await answer.json()).error;
      image.replaceWith(element("p", { class: "broken" }, say("picture_failed", { reason })));
    });
    return figure;
  });
  $("pictures").replaceChildren(...(made.length ? made : [element("p", { class: "empty" }, say("no_picture"))]));
}

function showConversation(record) {
  if (record.messages === null) {
    $("conversation").replaceChildren(
      element("p", { class: "faint" }, say("as_it_stands")), element("pre", { class: "raw" }, record.raw));
    return;
  }
  $("conversation").replaceChildren(...record.messages.map((message) => {
    const known = message.from === "human" || message.from === "gpt";
    return element("div", { class: `message ${known ? message.from : "other"}` },
      element("div", { class: "who" }, known ? say(message.from) : message.from),
      element("div", { class: "text" }, message.value));
  }));
}

function showFindings(record) {
  const made = record.findings.map((finding) => {
    // In the reader's language where there is one; the check's own sentence, which names the place, in any case.
    const [meaning, remedy] = about.codes[finding.code] ?? ["", finding.fix];
    return element("li", { class: finding.severity },
      element("span", { class: `chip ${finding.severity}` }, say(finding.severity)),
      element("code", {}, finding.code),
      element("span", {}, meaning || finding.text),
      meaning ? element("div", { class: "faint" }, finding.text) : null,
      finding.fix && remedy ? element("div", { class: "faint" }, say("what_to_do", { fix: remedy })) : null);
  });
  $("findings").replaceChildren(...(made.length ? [element("ul", { "aria-label": say("findings") }, ...made)] : []));
}

async function counts() {
  const ticket = (asked += 1);
  const { value } = await request("state");
  const { value: place } = shown ? await request(`next?from=${shown.index}&filter=${filter}`) : {};
  if (ticket !== asked) return value.check.state;
  const number = value.counts;
  for (const button of $("filters").children) {
    button.querySelector(".count").textContent = number[button.dataset.filter].toLocaleString();
  }
  const done = number.accepted + number.rejected;
  $("done-bar").style.width = `${(100 * done) / number.all}%`;
  $("done-text").textContent = say("progress", { done: done.toLocaleString(), all: number.all.toLocaleString() });
  $("position").textContent = place && place.index === shown.index
    ? say("position", { position: (place.position + 1).toLocaleString(), total: place.total.toLocaleString() }) : "";
  const checks = {
    running: () => say("checking", { progress: value.check.progress }),
    done: () => say("check_done", { number: number.findings.toLocaleString() }),
  };
  const told = (checks[value.check.state] ?? (() => say("check_failed", { reason: value.check.state })))();
  const refused = value.pictures_refused ? [say("pictures_refused", { number: value.pictures_refused })] : [];
  $("check-state").textContent = [told, ...refused, ...value.whole.map((one) => one.text)].join(" · ");
  return value.check.state;
}

// While the whole set is checked, its progress; then the findings of the shown record anew.
async function watchCheck() {
  clearTimeout(polling);
  if ((await counts()) === "running") polling = setTimeout(watchCheck, 500);
  else if (shown && !editor.isOpen()) {
    const { value } = await request(`records/${shown.index}`);
    if (value.index === shown.index && value.version === shown.version) showFindings(value);
  }
}

// Send a change made on the shown version; another tab may have been faster.
async function change(record, version, op, conversations) {
  const body = conversations ? { op, version, conversations } : { op, version };
  const { status, value } = await request(`records/${record}/change`, body, [409]);
  if (status === 409) {
    show(value.record);
    notice(say(op === "edit" ? "stale_draft" : "stale"));
    return null;
  }
  const { order, versions } = mine.read();
  // What another tab did in between is not undone from here.
  const own = versions[record] === version ? order : order.filter((which) => which !== record);
  if (op === "undo") own.splice(own.lastIndexOf(record), own.includes(record) ? 1 : 0);
  else own.push(record);
  mine.write({ order: own, versions: { ...versions, [record]: value.version } });
  return value;
}

async function decide(op) {
  const from = shown.index;
  const record = await change(from, shown.version, op);
  if (!record) return;
  if (await move(from + 1, 1, filter, true)) return;
  show(record);
  toast(say("no_more"));
}

async function undo() {
  const { order, versions } = mine.read();
  const record = order.at(-1) ?? shown.index;
  if (!order.length && !shown.can_undo) {
    toast(say("nothing_to_undo"));
    return;
  }
  const value = await change(record, order.length ? versions[record] : shown.version, "undo");
  if (!value) {
    mine.write({ order: order.filter((which) => which !== record), versions });
    return;
  }
  show(value);
  toast(say("undone"));
}

function edit(messages, proposal) {
  const lines = proposal ? [
    say("proposal", { model: proposal.model }),
    ...(proposal.calls ? [] : [say("from_journal")]),
    ...(Object.keys(proposal.dropped).length
      ? [say("dropped", { reasons: Object.entries(proposal.dropped).map(([why, n]) => `${n} ${why}`).join(", ") })] : []),
  ] : [];
  $("conversation").hidden = !proposal;
  editor.open(messages, lines, {
    save: async (conversations) => {
      if (busy) return;
      busy = true;
      try {
        const record = await change(shown.index, shown.version, "edit", conversations);
        if (record) {
          shut();
          show(record);
        } else $("conversation").hidden = false; // how the record stands now, above the text that is not saved yet
      } finally {
        busy = false;
      }
      await counts();
    },
    cancel: () => { shut(); notice(""); show(shown); },
  });
  buttons();
}

function shut() {
  editor.close();
  $("conversation").hidden = false;
  buttons();
}

async function generate() {
  if (busy) return;
  const record = shown.index;
  notice(say("asking"));
  $("generate").disabled = true;
  try {
    const { value } = await request(`records/${record}/proposal`, { prompt: $("prompt").value });
    if (shown.index === record && !busy && !editor.isOpen()) edit(value.conversations, value);
    else toast(say("proposal_waits", { index: record }));
  } finally {
    if (shown.index === record) notice("");
    buttons();
  }
}

async function writeReviewed() {
  const { value } = await request("export", {});
  toast(say("exported", { file: value.file, ...value.counts }));
}

async function showSeen() {
  const box = $("seen");
  if (box.hidden || !shown) return;
  const { value: listing } = await request("runs");
  const recipes = [...(about.recipe ? [about.recipe] : []), ...listing.recipes, ...listing.runs];
  if (!recipes.length) {
    box.replaceChildren(element("h2", {}, say("sees")), element("p", { class: "faint" }, say("no_recipe")));
    return;
  }
  const chosen = recipes.includes(box.dataset.recipe) ? box.dataset.recipe : recipes[0];
  const select = element("select", { "aria-label": say("recipe"), onchange: () => { box.dataset.recipe = select.value; showSeen(); } },
    ...recipes.map((name) => element("option", { selected: name === chosen }, name)));
  const body = element("div", {}, element("p", { class: "faint" }, "..."));
  box.replaceChildren(element("div", { class: "row" }, element("h2", {}, say("sees")), select), body);
  const record = shown.index;
  const query = `recipe=${encodeURIComponent(chosen)}`;
  const answer = await fetch(`records/${record}/seen?${query}`);
  const value = await answer.json();
  if (shown.index !== record || !body.isConnected) return;
  if (!answer.ok) {
    body.replaceChildren(element("p", { class: "broken" }, value.error));
    return;
  }
  const pictures = shown.images.map((name, number) => element("figure", {},
    element("img", { alt: name, src: `records/${record}/seen/${number}?${query}` }),
    element("figcaption", {}, say("after_preprocessing"))));
  body.replaceChildren(
    element("p", { class: "faint" }, value.headline), element("div", { class: "small" }, ...pictures),
    element("pre", { class: "tokens" }, ...value.parts.map((part) => element("span", { class: part.kind }, part.text))),
    element("p", { class: "faint" }, say("supervised_legend")));
}
