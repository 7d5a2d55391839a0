// A picture of one's own, one or two models, and their answers side by side as they are written.

import { $, about, element, reach, request, say, toast, upload } from "./page.js";
import * as review from "./review.js";

let picture = {}; // {picture: name} or {record: index}
let talks = []; // one a model: {model, history, log}
let asked = 0; // answers under way
let asking = new AbortController(); // ends them when the conversation is left
let ready = false;

export async function enter() {
  if (!ready) begin();
  ready = true;
  $("take-record").hidden = review.index() === null;
  const { value } = await request("runs");
  const names = [...about.models, ...value.runs, ...value.exports];
  for (const [id, first] of [["model-1", []], ["model-2", [["", say("none")]]]]) {
    const before = $(id).value || (id === "model-2" && !talks.length ? (about.models[1] ?? "") : "");
    const options = [...first, ...names.map((name) => [name, name])];
    $(id).replaceChildren(...options.map(([key, text]) => element("option", { value: key, selected: key === before }, text)));
  }
  if (!names.length) $("columns").replaceChildren(element("p", { class: "empty" }, say("no_models")));
  else if (!talks.length) restart();
}

export function leave() {}

function begin() {
  $("file").addEventListener("change", () => take($("file").files[0]));
  const drop = $("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])][0];
    if (!$("chat").hidden && file) take(file);
  });
  $("take-record").addEventListener("click", () => {
    picture = { record: review.index() };
    preview(`records/${picture.record}/pictures/0`);
  });
  for (const id of ["model-1", "model-2"]) $(id).addEventListener("change", restart);
  $("restart").addEventListener("click", restart);
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
}

async function take(file) {
  if (!file) return;
  const { value } = await upload("pictures", file);
  picture = { picture: value.name };
  preview(`pictures/${value.name}`);
}

function preview(source) {
  $("own").src = source;
  $("own").hidden = false;
  $("drop-text").hidden = true;
  restart();
}

function restart() {
  asking.abort();
  asking = new AbortController();
  asked = 0;
  const models = [$("model-1").value, $("model-2").value].filter((name, i, all) => name && all.indexOf(name) === i);
  talks = models.map((model) => ({ model, history: [], log: element("div", { class: "log" }) }));
  $("columns").replaceChildren(...talks.map((talk) =>
    element("div", { class: "column" }, element("h2", { title: talk.model }, talk.model), talk.log)));
}

function ask() {
  const question = $("question").value.trim();
  if (!question || asked || !talks.length) return;
  $("question").value = "";
  talks.forEach((talk) => answer(talk, question));
}

async function answer(talk, question) {
  const said = element("div", { class: "text" }, element("span", { class: "faint" }, say("thinking")));
  talk.log.append(
    element("div", { class: "message human" }, element("div", { class: "who" }, say("human")), element("div", { class: "text" }, question)),
    element("div", { class: "message gpt waiting" }, element("div", { class: "who" }, say("gpt")), said));
  asked += 1;
  const { signal } = asking;
  try {
    const text = await read(talk, question, said, signal);
    if (text !== null) talk.history.push([question, text]);
  } catch (error) {
    if (!signal.aborted) throw error;
  } finally {
    if (!signal.aborted) asked -= 1;
    said.parentElement.classList.remove("waiting");
  }
}

// Read the answer's lines as they come; null when it ended in an error.
async function read(talk, question, said, signal) {
  const body = { model: talk.model, question, history: talk.history, ...picture };
  const headers = { "content-type": "application/json" };
  const response = await reach("chat", { method: "POST", headers, body: JSON.stringify(body), signal });
  const fail = (text) => { said.replaceChildren(element("span", { class: "broken" }, text)); toast(text, true); return null; };
  if (!response.ok) return fail((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", text = "";
  said.textContent = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((one) => JSON.parse(one))) {
      if (line.error) return fail(line.error);
      if (line.notice) talk.log.lastChild.before(element("p", { class: "notice" }, say("blind")));
      text += line.text ?? "";
      said.textContent = text;
    }
  }
  return text;
}
