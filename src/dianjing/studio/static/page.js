// What all parts of the page share: words, requests, elements made without parsing any text as HTML.

export const about = JSON.parse(document.getElementById("about").textContent);

export function say(name, values = {}) {
  return about.words[name].replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

export const $ = (id) => document.getElementById(id);

// element("p", {class: "x", onclick: f}, "text", other): texts become text nodes, whatever is in them.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A failure that the user has been told of; what waited for the answer ends there.
export class Told extends Error {}

addEventListener("unhandledrejection", (event) => {
  if (event.reason instanceof Told) event.preventDefault();
});

// The answer's JSON with its HTTP status; a failure is told and thrown, but for those in `expected`.
export async function request(path, body, expected = []) {
  const options = body === undefined
    ? {}
    : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return finish(await reach(path, options), expected);
}

export async function upload(path, file) {
  const type = file.type.startsWith("image/") ? file.type : "image/unknown";
  return finish(await reach(path, { method: "POST", headers: { "content-type": type }, body: file }), []);
}

export async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    toast(say("gone"), true);
    throw new Told("gone");
  }
}

async function finish(response, expected) {
  const value = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  if (!response.ok && !expected.includes(response.status)) {
    toast(value.error, true);
    throw new Told(value.error);
  }
  return { status: response.status, value };
}

let hiding = 0;

export function toast(text, bad = false) {
  const box = $("toast");
  box.textContent = text;
  box.classList.toggle("bad", bad);
  box.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.hidden = true; }, bad ? 12000 : 5000);
}

export function span(seconds) {
  const units = [["days", 86400], ["hours", 3600], ["minutes", 60]];
  const found = units.find(([, size]) => seconds >= size);
  return found ? say(found[0], { n: Math.floor(seconds / found[1]) }) : say("seconds", { n: Math.floor(seconds) });
}
