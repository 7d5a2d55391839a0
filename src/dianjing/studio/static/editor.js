// A conversation as text fields; what is in them is lost only when the user says so.

import { $, element, say } from "./page.js";

let before = "";

export const isOpen = () => !$("editor").hidden;

export function open(messages, lines, { save, cancel }) {
  const form = $("editor");
  const list = element("div", { class: "rows" });
  const add = (message) => list.append(row(message));
  messages.forEach(add);
  if (!messages.length) [{ from: "human", value: "" }, { from: "gpt", value: "" }].forEach(add);
  form.replaceChildren(
    ...lines.map((line) => element("p", { class: "notice" }, line)),
    list,
    element("div", { class: "row" },
      element("button", { type: "submit", class: "good" }, `${say("save")} `, element("kbd", {}, "Ctrl Enter")),
      element("button", { type: "button", onclick: cancel }, `${say("cancel")} `, element("kbd", {}, "Esc")),
      element("span", { class: "gap" }),
      element("button", { type: "button", class: "quiet", onclick: () => {
        add({ from: list.children.length % 2 ? "gpt" : "human", value: "" });
        list.lastChild.querySelector("textarea").focus();
      } }, say("add_message"))));
  form.hidden = false;
  form.onsubmit = (event) => { event.preventDefault(); save(read(list)); };
  form.onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    else return;
    event.preventDefault();
  };
  before = lines.length ? "" : JSON.stringify(read(list)); // a proposal is worth asking before it is left
  for (const field of list.querySelectorAll("textarea")) grow(field);
  const fields = list.querySelectorAll("textarea");
  (fields[1] ?? fields[0]).focus();
}

export function close() {
  $("editor").hidden = true;
  $("editor").replaceChildren();
}

function row(message) {
  const role = element("select", { "aria-label": say("role") },
    ...["human", "gpt"].map((name) => element("option", { value: name, selected: name === message.from }, say(name))));
  const field = element("textarea", { "aria-label": say("text"), rows: 1, oninput: () => grow(field) });
  field.value = message.value;
  const made = element("div", { class: "message" }, role, field,
    element("button", { type: "button", class: "quiet", title: say("remove_message"), "aria-label": say("remove_message"),
      onclick: () => made.remove() }, "✕"));
  return made;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function read(list) {
  return [...list.children].map((made) => ({
    from: made.querySelector("select").value, value: made.querySelector("textarea").value,
  }));
}

addEventListener("beforeunload", (event) => {
  const list = $("editor")?.querySelector(".rows");
  if (list && isOpen() && JSON.stringify(read(list)) !== before) event.preventDefault();
});
