// The tabs, the keys, and the address: #review/17, #runs/name, #chat.

import { $, about } from "./page.js";
import * as chat from "./chat.js";
import * as review from "./review.js";
import * as runs from "./runs.js";

const tabs = { review, runs, chat };

function open() {
  const [name, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/");
  const tab = name in tabs ? name : about.data ? "review" : "runs";
  for (const other of Object.keys(tabs)) $(other).hidden = other !== tab;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.tab === tab) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const [other, part] of Object.entries(tabs)) if (other !== tab) part.leave();
  tabs[tab].enter(rest.join("/"));
}

function writing(target) {
  return target.closest("input, textarea, select, dialog") !== null;
}

addEventListener("hashchange", open);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || writing(event.target) || $("help").open) return;
  if (event.key === "?") $("help").showModal();
  else if ($("review").hidden || !review.key(event)) return;
  event.preventDefault();
});
$("show-help").addEventListener("click", () => $("help").showModal());
// The other language at the same place.
$("language").addEventListener("click", (event) => {
  event.preventDefault();
  location.href = event.currentTarget.getAttribute("href") + location.hash;
});

open();
