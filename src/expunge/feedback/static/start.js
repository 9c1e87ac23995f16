// The first page: enter a name; keep the list of raters current.
"use strict";

const REFRESH = 3000;
const form = document.getElementById("join");
const problem = document.getElementById("problem");

form.addEventListener("submit", async event => {
  event.preventDefault();
  problem.textContent = "";
  try {
    const reply = await fetch("/api/raters", {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({name: form.elements.name.value}),
    });
    if (reply.ok) return location.assign((await reply.json()).url);
    problem.textContent = await reply.text();
  } catch {
    problem.textContent = "The server does not answer. Is it still running?";
  }
  form.elements.name.focus();
});
// until here a tap would send the form as forms are sent without a script, which the page's policy blocks
form.querySelector("button").disabled = false;

setInterval(async () => {
  const status = document.getElementById("status");
  // replacing what has the focus would lose it
  if (document.hidden || status.contains(document.activeElement)) return;
  try {
    const reply = await fetch("/");
    if (!reply.ok) return;
    const fresh = new DOMParser().parseFromString(await reply.text(), "text/html").getElementById("status");
    status.replaceWith(document.adoptNode(fresh));
  } catch { /* the next round tries again */ }
}, REFRESH);
