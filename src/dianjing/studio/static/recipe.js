// A new recipe: a form made of the schema, with what a run with its values takes next to it.

import { $, about, element, request, say, toast } from "./page.js";

const PAUSE_MS = 700;
let timer = 0;
let asking = false;
let again = null;  // the form whose values have changed since they were sent

// Shows the form in a box; `start` is the recipe it begins with, `recipes` those of the folder, `done` is called with the file written.
export async function openForm(box, recipes, done, start = "") {
  const { value } = await request(`recipe/form?from=${encodeURIComponent(start)}`);
  const name = element("input", { id: "recipe-name", required: true, pattern: "[\\w\\-]+", value: "mine", maxlength: 100 });
  const from = element("select", { id: "recipe-from", onchange: () => openForm(box, recipes, done, from.value) },
    element("option", { value: "" }, say("none")),
    ...[...recipes, ...about.shipped].map((one) => element("option", { value: one, selected: one === start }, one)));
  const parts = sections(value.fields).map(([section, fields]) => element("fieldset", {},
    element("legend", {}, section || say("the_run")),
    ...fields.filter((field) => field.first).map(row),
    ...more(fields.filter((field) => !field.first))));
  const form = element("form", { id: "recipe-form", oninput: later, onsubmit: (event) => send(event, false) },
    element("div", { class: "headline" }, element("h1", {}, say("new_recipe"))),
    element("div", { class: "pair" }, labelled(say("recipe_name"), name), labelled(say("start_from"), from)),
    ...parts,
    element("div", { class: "row" },
      element("button", { type: "submit", class: "good" }, say("write_recipe")),
      element("button", { type: "button", id: "write-and-start", onclick: (event) => send(event, true) }, say("write_and_start"))));
  box.dataset.name = "";
  box.replaceChildren(element("div", { class: "drafting" }, form, element("div", { id: "plan", "aria-live": "polite" })));
  later();

  async function send(event, start) {
    event.preventDefault();
    if (!form.reportValidity()) return;
    const { value } = await request("recipe/write", { name: name.value, values: values(form) });
    toast(say("recipe_written", { file: value.name }));
    done(value.name, start);
  }

  function later() {
    clearTimeout(timer);
    timer = setTimeout(() => plan(form), PAUSE_MS);
  }
}

function sections(fields) {
  const found = new Map();
  for (const field of fields) found.set(field.section, [...(found.get(field.section) ?? []), field]);
  return [...found];
}

function more(fields) {
  return fields.length ? [element("details", {}, element("summary", {}, say("more_fields", { n: fields.length })), ...fields.map(row))] : [];
}

function row(field) {
  const attributes = { "data-field": field.name, "aria-label": field.name };
  let control;
  if (field.choices.length) {
    control = element("select", attributes, ...field.choices.map((choice) =>
      element("option", { value: choice, selected: choice === field.value }, choice || '""')));
  } else if (field.lines) {
    control = element("textarea", { ...attributes, rows: Math.max(1, field.value.split("\n").length) });
    control.value = field.value;
  } else {
    control = element("input", { ...attributes, value: field.value, placeholder: field.wanted });
  }
  return element("label", { class: "field" }, element("code", {}, field.key), control, element("small", {}, field.meaning));
}

function labelled(text, control) {
  return element("label", { class: "field" }, text, control);
}

function values(form) {
  return Object.fromEntries([...form.querySelectorAll("[data-field]")].map((one) => [one.dataset.field, one.value]));
}

async function plan(form) {
  again = form;
  if (asking) return;  // one plan at a time: it takes seconds
  asking = true;
  try {
    while (again?.isConnected) {
      const planned = again, box = $("plan");
      again = null;
      box.replaceChildren(element("h2", {}, say("plan_title")), element("p", { class: "faint" }, say("planning")));
      const { status, value } = await request("recipe/plan", { values: values(planned) }, [422]);
      if (again || !planned.isConnected) continue;
      box.replaceChildren(element("h2", {}, say("plan_title")),
        ...(status === 422 ? [element("p", { class: "notice" }, value.error)] : answer(value)));
    }
  } finally {
    asking = false;
  }
}

function answer(value) {
  const heads = ["GPU", say("plan_needed"), say("plan_time")].map((text) => element("th", {}, text));
  const rows = value.verdicts.map((one) => element("tr", { class: one.fits ? "" : "faint" },
    element("td", {}, one.gpu),
    element("td", {}, `${gib(one.needed)} / ${gib(one.memory)}`),
    element("td", {}, one.fits ? time(one.hours) : one.refused || say("too_large"))));
  return [
    element("p", {}, value.records ? say("plan_steps", { records: value.records, steps: value.steps }) : say("plan_no_data")),
    element("p", {}, say("plan_trains", { number: value.trainable.toLocaleString("en") })),
    value.few_steps ? element("p", { class: "notice" }, value.few_steps) : "",
    element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)),
    element("p", { class: "faint" }, say("plan_predicted")),
  ];
}

function gib(bytes) {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

function time(hours) {
  if (hours === null) return "";
  if (hours * 60 < 1) return say("under_a_minute");
  return hours < 1 ? say("minutes", { n: Math.round(hours * 60) }) : say("hours", { n: hours.toFixed(1) });
}
